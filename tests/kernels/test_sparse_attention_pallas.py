"""The prefill kernels in TPU interpret mode: memory that nobody wrote is NaN, reads out of bounds raise."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from kernels_pallas.sparse_attention import prefill, sharded_sparse_attention, sparse_attention
from kernels_pallas.sparse_attention.block_sizes import BlockSizes, check_backward, default_block_sizes
from kernels_pallas.sparse_attention.kernel_bits import bits_of_selection
from kernels_pallas.sparse_attention.reference import listed, unpacked_mask
from kernels_pallas.tpu import CHIPS

SCALE = 0.2
RATIO = 2
SMALL = BlockSizes(8, 4, 128)
DIFFERENTIATED = ("q", "keys", "sink", "entries")


def problem(seed, *, batch=1, queries=40, heads=8, dim=16, window=20, entries=0, topk=None, documents=1, past=0):
    """Rows of documents, `past` tokens of which came before the queries; entries cover 2 tokens each."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    cuts = np.sort(rng.integers(0, queries + 1, (batch, documents - 1)), axis=1)
    index = np.arange(queries)
    segment = 1 + (index >= cuts[..., None]).sum(1) if documents > 1 else np.ones((batch, queries), int)
    start = np.array([[np.argmax(row == s) for s in row] for row in segment])
    position = np.where(segment == 1, index + past, index - start)
    before = np.where(np.arange(-window, 0) >= -past, 1, -1)
    key_segment = np.concatenate([np.tile(before, (batch, 1)), segment], axis=1)
    inputs = dict(
        q=draw(batch, queries, heads, dim), keys=draw(batch, window + queries, dim), sink=draw(heads),
        q_position=position.astype(np.int32), q_segment=segment.astype(np.int32),
        key_segment=key_segment.astype(np.int32),
    )  # fmt: skip
    if entries:
        owner, end = np.full((batch, entries), -1), np.zeros((batch, entries), int)
        for b in range(batch):
            found = [(1, e) for e in range(RATIO - 1, past, RATIO)]
            found += [(s, p) for s, p in zip(segment[b], position[b], strict=True) if p % RATIO == RATIO - 1]
            for j, (s, p) in enumerate(found[:entries]):
                owner[b, j], end[b, j] = s, p
        inputs |= dict(
            entries=draw(batch, entries, dim), entry_end=end.astype(np.int32), entry_segment=owner.astype(np.int32)
        )
    if topk:
        chosen = np.argsort(rng.random((batch, queries, entries)), axis=-1)[..., :topk].astype(np.int32)
        chosen[:, ::3, -1] = -1
        inputs |= dict(selection=chosen)
    return {name: jnp.asarray(value) for name, value in inputs.items()}, window


def interpreted(function, *, races=False):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=races)):
        return jax.block_until_ready(function())


def with_gradients(function, inputs, window, dtype=jnp.float32):
    """The output and the gradients of its product with a fixed array."""
    names = [name for name in DIFFERENTIATED if name in inputs]
    cast = {name: value.astype(dtype) if name in ("q", "keys", "entries") else value for name, value in inputs.items()}
    cotangent = np.random.default_rng(9).standard_normal(inputs["q"].shape).astype(np.float32)

    def objective(some):
        out = function(**cast | some, window=window, scale=SCALE)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    def run(some):
        (_, out), gradients = jax.value_and_grad(objective, has_aux=True)(some)
        return {"out": out} | gradients

    return jax.jit(run)({name: cast[name] for name in names})


def kernel(sizes=None):
    def function(q, keys, sink, q_position, q_segment, key_segment, *, window, scale, **far):
        some = dict.fromkeys(("entries", "entry_end", "entry_segment", "selection")) | far
        return prefill.sparse_attention(
            q, keys, sink, q_position, q_segment, key_segment, **some, window=window, scale=scale,
            forward_sizes=sizes, backward_sizes=sizes,
        )  # fmt: skip

    return function


reference = functools.partial(sparse_attention, implementation="reference")


def relative(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


CASES = {
    "window alone": dict(queries=135),
    "window of two tiles": dict(window=150, queries=10, past=500, heads=3),
    "all entries, several tiles": dict(entries=290, past=520, batch=2, queries=12),
    "selection, several tiles": dict(entries=290, past=520, topk=40, queries=24),
    "packed, selection larger than what is visible": dict(entries=300, documents=3, queries=100, topk=280, heads=5),
    "one token": dict(queries=1, entries=130, past=261, topk=7),
    "no entry visible": dict(queries=20, entries=130, documents=20),
    "128 heads and more": dict(queries=8, heads=136, entries=20, past=50),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_references(case):
    inputs, window = problem(0, **CASES[case])
    got = interpreted(lambda: with_gradients(kernel(SMALL), inputs, window))
    want = with_gradients(reference, inputs, window)
    for name in want:
        if np.any(want[name]):
            assert relative(got[name], want[name]) <= tolerances.ATTENTION_FLOAT32, name
        else:
            np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("case", ["window alone", "selection, several tiles"])
def test_bfloat16_errs_hardly_more_than_the_reference_in_bfloat16(case):
    inputs, window = problem(1, **CASES[case])
    exact = with_gradients(reference, inputs, window)
    theirs = with_gradients(reference, inputs, window, jnp.bfloat16)
    ours = interpreted(lambda: with_gradients(kernel(SMALL), inputs, window, jnp.bfloat16))
    for name, want in exact.items():
        error, allowed = relative(ours[name], want), tolerances.ATTENTION_BFLOAT16_RATIO * relative(theirs[name], want)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@settings(max_examples=3)
@given(
    queries=st.integers(1, 40), past=st.integers(0, 300), entries=st.integers(1, 200), topk=st.integers(1, 200),
    documents=st.integers(1, 4), window=st.integers(1, 140), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_lengths_documents_and_selections(queries, past, entries, topk, documents, window, seed):
    inputs, window = problem(
        seed, queries=queries, past=past, entries=entries, topk=min(topk, entries), documents=documents, window=window
    )
    got = interpreted(lambda: kernel(SMALL)(**inputs, window=window, scale=SCALE))
    want = reference(**inputs, window=window, scale=SCALE)
    assert relative(got, want) <= tolerances.ATTENTION_FLOAT32


def test_default_blocks_and_the_public_function_give_the_same():
    inputs, window = problem(2, queries=130, heads=16, entries=140, past=120, topk=50)
    call = functools.partial(sparse_attention, **inputs, window=window, scale=SCALE)
    got = interpreted(lambda: call(implementation="pallas"))
    assert relative(got, call(implementation="reference")) <= tolerances.ATTENTION_FLOAT32


def test_extreme_sinks_take_all_or_none_of_the_weight():
    inputs, window = problem(3, queries=9, entries=5, past=20)
    inputs["sink"] = jnp.asarray([1e4, -jnp.inf] * 4, jnp.float32)
    got = interpreted(lambda: with_gradients(kernel(SMALL), inputs, window))
    want = with_gradients(reference, inputs, window)
    np.testing.assert_array_equal(got["out"][:, :, ::2], 0)
    assert relative(got["out"], want["out"]) <= tolerances.ATTENTION_FLOAT32
    assert all(np.isfinite(np.asarray(x)).all() for x in got.values())


def test_an_empty_batch_gives_an_empty_result():
    inputs, window = problem(4)
    inputs = {name: value if name == "sink" else value[:0] for name, value in inputs.items()}
    got = sparse_attention(**inputs, window=window, scale=SCALE, implementation="pallas")
    assert got.shape == (0, 40, 8, 16)


@pytest.mark.slow
def test_entries_whose_gradients_exceed_vmem_are_differentiated_in_parts(monkeypatch):
    inputs, window = problem(5, queries=8, entries=4200, past=8400, topk=300, dim=8)
    whole = with_gradients(reference, inputs, window)
    monkeypatch.setattr(prefill, "vmem_budget", lambda chip: 0)
    sizes = BlockSizes(8, 8, 2048)
    got = interpreted(lambda: with_gradients(kernel(sizes), inputs, window))
    for name, want in whole.items():
        assert relative(got[name], want) <= tolerances.ATTENTION_FLOAT32, name


def test_the_copies_of_the_backward_kernel_do_not_race(capfd):
    inputs, window = problem(6, queries=16, entries=200, past=390, batch=2)
    interpreted(lambda: with_gradients(kernel(SMALL), inputs, window), races=True)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_sharded_over_batch_and_heads_equals_one_device():
    inputs, window = problem(7, batch=2, queries=16, heads=32, entries=60, past=100, topk=20)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    sharded = functools.partial(
        sharded_sparse_attention, mesh=mesh, batch_axes="data", head_axes=("tensor",), implementation="xla"
    )
    got, want = with_gradients(sharded, inputs, window), with_gradients(reference, inputs, window)
    for name in want:
        assert relative(got[name], want[name]) <= tolerances.ATTENTION_FLOAT32, name
    with pytest.raises(ValueError, match="2 devices do not divide 1"):
        sharded(**problem(7)[0], window=window, scale=SCALE)


# ---- masks of bits ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "count", "queries"), [(1, 3, 1), (100, 9, 3), (4200, 200, 9)])
def test_bits_name_what_the_list_names(size, count, queries):
    selection = jnp.asarray(np.random.default_rng(size).integers(-1, size, (2, queries, count)), jnp.int32)
    words = interpreted(lambda: bits_of_selection(selection, size, CHIPS["v6e"]))
    np.testing.assert_array_equal(unpacked_mask(words, size), listed(selection, size))
    assert words.shape == (2, queries, -(-size // 32))


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_a_mask_of_bits_equals_the_list(implementation):
    inputs, window = problem(8, queries=70, entries=60, past=90, topk=9)
    call = functools.partial(sparse_attention, window=window, scale=SCALE)
    want = call(**inputs, implementation="reference")
    chosen = np.asarray(listed(inputs.pop("selection"), 60))
    words = np.packbits(np.pad(chosen, [(0, 0), (0, 0), (0, 4)]), axis=-1, bitorder="little").view(np.int32)
    got = interpreted(lambda: call(**inputs, selection_mask=jnp.asarray(words), implementation=implementation))
    np.testing.assert_allclose(got, want, atol=2e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=19), "60 keys for 40 queries and a window of 19"),
        (dict(scale=-1.0), "scale -1.0, need a positive one"),
        (dict(sound_topk=0), "sound_topk 0, need at least 1"),
        (dict(entry_end=None), "need all or none"),
        (dict(selection_mask=jnp.zeros((1, 40, 3), jnp.int32)), "3 words for 50 entries, need 2"),
        (dict(selection_mask=jnp.zeros((1, 40, 2), jnp.int32), selection=jnp.zeros((1, 40, 2), jnp.int32)), "one of"),
        (dict(entries=jnp.zeros((1, 50, 16), jnp.bfloat16)), "entries of bfloat16, need the queries' float32"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(change, message):
    inputs, window = problem(9, entries=50, past=60)
    with pytest.raises(ValueError, match=message):
        sparse_attention(**dict(window=window, scale=SCALE) | inputs | change, implementation="pallas")


def test_blocks_beyond_vmem_are_refused_with_the_bytes():
    sizes = default_block_sizes(64, 1 << 20, jnp.bfloat16, is_backward=True)
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes of VMEM, v5p has 62,914,560 available"):
        check_backward(sizes, 64, 512, 128, 1 << 9, jnp.bfloat16, CHIPS["v5p"])
    with pytest.raises(ValueError, match="need queries 8, 16"):
        BlockSizes(24, 8, 128)
