"""Experts on several devices: three forms of the exchange against all experts on one, for any routing."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharding.tiny_steps import fast_jit

from v4jax import ops, parallel
from v4jax.model import exchange, travel
from v4jax.sharding import Placement, make_mesh, parse_mesh

DEVICES, TOKENS, CHOICES, EXPERTS, HIDDEN, WIDTH = 4, 64, 3, 8, 16, 12
PLACEMENT = Placement(make_mesh(parse_mesh(f"expert={DEVICES}"), jax.devices()[:DEVICES]), "train")


def routing(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :CHOICES]
    if kind == "one device":
        # Every token wants the same experts: two of one device, and one of another.
        chosen = np.broadcast_to([5, 4, 0], (TOKENS, CHOICES)).copy()
    if kind == "first half":
        chosen[: TOKENS // 2] = [0, 1, 2]
    return chosen.astype(np.int32)


def case(kind: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(1)
    shapes = [(TOKENS, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    x, *matrices = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x, *matrices, jnp.asarray(routing(kind)), jnp.asarray(rng.random((TOKENS, CHOICES)), jnp.float32)


def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Output, and gradients of x, the matrices and the weights."""

    def loss(floats: tuple[jax.Array, ...], experts: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*floats[:4], experts, floats[4])
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    step = jax.value_and_grad(loss, has_aux=True)
    return fast_jit(lambda x, w1, w3, w2, experts, weights: step((x, w1, w3, w2, weights), experts))


def placed(batch: tuple[str, ...]) -> Callable[..., jax.Array]:
    """`routed_experts` of the tokens of all devices."""
    shard, tokens = parallel.Shard(PLACEMENT, batch, ()), P("expert") if batch else P()

    def run(*arguments: jax.Array) -> jax.Array:
        def local(_: tuple, *arguments: jax.Array) -> jax.Array:
            x, *matrices, experts, weights = arguments
            stacks = [ops.ExpertStack(matrix) for matrix in matrices]
            return exchange.routed_experts(x, *stacks, experts, weights, limit=1.0)

        return parallel.run(local, shard, (), arguments, (tokens, *[P("expert")] * 3, tokens, tokens), tokens)

    return run


def emulated_ragged_all_to_all(
    operand: jax.Array, output: jax.Array, input_offsets: jax.Array, send_sizes: jax.Array,
    output_offsets: jax.Array, recv_sizes: jax.Array, *, axis_name: tuple[str, ...],
) -> jax.Array:  # fmt: skip
    """Its documented meaning, by gathering everything: the CPU has none."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    own = jax.lax.axis_index(axis_name)
    operands, starts, sizes, places = (gather(a) for a in (operand, input_offsets, send_sizes, output_offsets))
    rows = jnp.arange(output.shape[0])
    for sender in range(DEVICES):
        offset = rows - places[sender, own]
        is_sent = (offset >= 0) & (offset < sizes[sender, own])
        source = jnp.clip(starts[sender, own] + offset, 0, operand.shape[0] - 1)
        is_sent = is_sent.reshape(-1, *[1] * (output.ndim - 1))
        output = jnp.where(is_sent, operands[sender][source], output)
    # Each receiver must know what it gets.
    return output * jnp.where(jnp.all(recv_sizes == sizes[:, own]), 1, jnp.nan).astype(output.dtype)


FORMS = ["same tokens", "gathered", "dense", "rounds", "ragged"]


@pytest.mark.parametrize("kind", ["random", "one device", "first half"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_all_experts_on_one_device(form: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form in ("dense", "rounds", "ragged"):
        monkeypatch.setattr(exchange, "GATHER_TOKENS", 0)
    if form == "rounds":
        monkeypatch.setattr(travel, "BUFFER_BYTES", CHOICES * HIDDEN * 4 * 6)  # six of 16 tokens at a time
    if form == "ragged":
        monkeypatch.setattr(Placement, "has_ragged_exchange", True)
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    arguments = case(kind)
    with ops.implementations(("grouped_experts=reference",)):
        (_, want), wanted = gradient(functools.partial(ops.grouped_experts, limit=1.0))(*arguments)
        (_, got), gradients = gradient(placed(() if form == "same tokens" else ("expert",)))(*arguments)
    np.testing.assert_allclose(got, want, atol=1e-4)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_exchange_of_a_tpu_is_differentiated_and_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "GATHER_TOKENS", 0)
    monkeypatch.setattr(Placement, "has_ragged_exchange", True)
    lowered = gradient(placed(("expert",))).trace(*case("random")).lower(lowering_platforms=("tpu",))
    # Rows and shares there, sums back; and again, with cotangents, for two gradients.
    assert lowered.as_text().count("ragged_all_to_all") >= 8
