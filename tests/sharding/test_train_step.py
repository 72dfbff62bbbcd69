"""The train step on a mesh: what its program gathers, and that AdamW moves divided parameters as whole ones."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.random_model import random_model
from sharding.tiny_steps import CONFIG, fast_jit, placed
from tolerances import LOSS_RELATIVE

from v4jax.config import AttentionKind, ModelConfig, RouterKind
from v4jax.train.optimizer import make_optimizer
from v4jax.train.recipes import TrainOptions
from v4jax.train.step import TrainState, make_train_step, take_apart

# A scanned segment of three layers, and sizes that name what they belong to.
REPEATS, VOCABULARY, EXPERTS, WIDTH = 3, 112, 8, 24
OPTIONS = TrainOptions(steps=20, warmup_steps=0, batch_size=4, sequence_length=64, learning_rate=3e-3, remat=True)


def config(depth: int = REPEATS) -> ModelConfig:
    return dataclasses.replace(
        CONFIG.without_mtp(),
        vocab_size=VOCABULARY,
        num_hidden_layers=depth,
        layer_types=(AttentionKind.CSA,) * depth,
        mlp_layer_types=(RouterKind.TOPK,) * depth,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=WIDTH,
    )


class Gather(NamedTuple):
    """One collective of a compiled program: the dimensions of its results, and the text."""

    shapes: list[tuple[int, ...]]
    text: str


def collectives(program: str, kind: str) -> list[Gather]:
    found = []
    for line in program.splitlines():
        if match := re.search(rf"= (.*?) {kind}(?:-start)?\(", line):
            shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", match.group(1))]
            found.append(Gather(shapes, line.strip()[:200]))
    return found


def lowered(depth: int = REPEATS) -> Any:
    """The step on fsdp=2 × expert=2 × tensor=2, before the compiler."""
    own = config(depth)
    layout, state, frozen = take_apart(placed(random_model(own, seed=0), "fsdp=2,expert=2,tensor=2", "train"), OPTIONS)
    step: Any = make_train_step(layout, own, OPTIONS, state)
    batch = {name: np.ones((4, 64), np.int32) for name in ("tokens", "segment_ids")}
    return fast_jit(step.__wrapped__).lower(state, frozen, batch)


@pytest.fixture(scope="module")
def program() -> str:
    """HLO of the step."""
    return lowered().compile().as_text()


def test_the_program_does_not_grow_with_depth() -> None:
    lengths = {depth: lowered(depth).as_text().count("\n") for depth in (2, 7)}
    assert lengths[2] == lengths[7] > 1000


def test_the_step_gathers_no_logits_no_vocabulary_matrix_not_all_experts_and_no_segment(program: str) -> None:
    gathers = collectives(program, "all-gather")
    assert len(gathers) > 10, "FSDP gathers the parameters of each layer"
    for gather in gathers:
        for shape in gather.shapes:
            dims = [size for size in shape if size > 1]
            assert not {VOCABULARY, VOCABULARY // 2} & set(dims), f"logits or head: {gather.text}"
            is_of_experts, is_of_segment = {EXPERTS, WIDTH} <= set(dims), len(dims) > 2 and dims[0] == REPEATS
            assert not is_of_experts, f"all experts: {gather.text}"
            assert not is_of_segment, f"a segment: {gather.text}"


def test_gradients_of_gathered_parameters_are_scattered(program: str) -> None:
    # On CPU XLA keeps what the program asks for: one reduce-scatter for each gather that training differentiates.
    scatters = collectives(program, "reduce-scatter")
    assert len(scatters) > 10
    # Nothing of a whole matrix is reduced everywhere: what is, is small or was never divided.
    largest = max(
        (int(np.prod(shape)) for one in collectives(program, "all-reduce") for shape in one.shapes), default=0
    )
    assert largest < REPEATS * EXPERTS // 2 * WIDTH // 2 * CONFIG.hidden_size


def test_adamw_moves_divided_parameters_as_whole_ones() -> None:
    model = random_model(config(), seed=0)
    rng = np.random.default_rng(0)
    results = []
    gradients: dict[str, np.ndarray] = {}
    for mesh in (None, "fsdp=2,expert=2,tensor=2"):
        own = random_model(config(), seed=0) if mesh is None else placed(model, mesh, "train")
        layout, state, _ = take_apart(own, OPTIONS)
        gradients = gradients or {
            k: rng.standard_normal(v.shape).astype(np.float32) for k, v in state.parameters.items()
        }
        optimizer = make_optimizer(OPTIONS, layout.roles)

        def step(state: TrainState, gradients: dict[str, jax.Array], optimizer: Any = optimizer) -> Any:
            updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
            return jax.tree.map(jnp.add, state.parameters, updates), moments

        if mesh is not None:
            assert sum(not p.sharding.is_fully_replicated for p in state.parameters.values()) > 15
            moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1]
            assert any(not leaf.sharding.is_fully_replicated for leaf in moments)
        results.append(jax.tree.map(np.asarray, fast_jit(step)(state, gradients)))
    for got, want in zip(*map(jax.tree.leaves, results[::-1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=LOSS_RELATIVE, atol=1e-9)
