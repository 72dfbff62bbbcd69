"""A step on a mesh gives the numbers of one device: training and decoding, on each axis alone and on mixtures.

The tiny model has both routers, both compressors, the indexer and an MTP block; its random routers load experts very
unequally and leave some empty (`test_the_case_is_hard`).
"""

import functools

import numpy as np
import pytest
from sharding.tiny_steps import (
    CONFIG,
    LENGTH,
    ROWS,
    SEGMENTS,
    STEPS,
    TOKENS,
    Result,
    generate,
    placed,
    tiny_model,
    train,
)
from tolerances import GRADIENT_REORDERING, LOSS_RELATIVE, assert_gradients_close, assert_logits_close

from v4jax.model import exchange, travel

LENGTHS = np.array([96, 5, 64, 33], np.int32)
nightly = pytest.mark.nightly
# Mixtures run in CI and hold every axis; each axis alone runs at night.
MIXTURES = ["data=2,expert=2,tensor=2", "fsdp=2,expert=2,sequence=2", "fsdp=2,sequence=2,tensor=2"]
ALONE = ["data=4", "fsdp=8", "expert=4", "sequence=2", "sequence=8", "tensor=8"]
MESHES = [*MIXTURES, *(pytest.param(mesh, marks=nightly) for mesh in [*ALONE, "expert=2,sequence=4"])]


@functools.cache
def trained() -> Result:
    return train(tiny_model())


@functools.cache
def generated() -> tuple[list[np.ndarray], np.ndarray]:
    return generate(tiny_model(), (96,), LENGTHS)


def assert_same_step(got: Result, want: Result) -> None:
    is_real = SEGMENTS > 0
    has_next = (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & is_real[:, 1:]
    assert_logits_close(got.logits[is_real], want.logits[is_real])
    assert_logits_close(got.mtp_logits[has_next], want.mtp_logits[has_next])
    for name, value in want.sums.items():
        np.testing.assert_allclose(got.sums[name], value, rtol=LOSS_RELATIVE, err_msg=name)
    assert_gradients_close(got.gradients, want.gradients, GRADIENT_REORDERING)


def test_the_case_is_hard() -> None:
    load = trained().sums["expert_load"]
    assert (load == 0).any()
    assert (load.max(1) > 3 * load.mean(1)).sum() >= 2
    assert np.diff(SEGMENTS, axis=1)[:, LENGTH // 2 - 1].any(), "a document begins where a shard does"
    assert (SEGMENTS == 0).any()
    assert CONFIG.index_topk < LENGTH // 4
    assert len(np.unique(LENGTHS)) == ROWS


@pytest.mark.parametrize("mesh", MESHES)
def test_training_on_a_mesh_equals_one_device(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "GATHER_TOKENS", 0)  # so few tokens would not travel
    assert_same_step(train(placed(tiny_model(), mesh, "train")), trained())


@pytest.mark.parametrize("mesh", MESHES)
def test_prefill_and_decoding_on_a_mesh_equal_one_device(mesh: str) -> None:
    (logits, mtp_logits), steps = generate(placed(tiny_model(), mesh, "decode"), (96,), LENGTHS)
    (want, want_mtp), want_steps = generated()
    is_real = np.arange(96) < LENGTHS[:, None]
    assert_logits_close(logits[is_real], want[is_real])
    # The MTP block lags by one token.
    assert_logits_close(mtp_logits[:, :95][is_real[:, 1:]], want_mtp[:, :95][is_real[:, 1:]])
    assert want_steps.shape == (STEPS, ROWS, CONFIG.vocab_size)
    assert_logits_close(steps, want_steps)


@pytest.mark.nightly
def test_one_row_on_a_mesh_whose_axes_do_not_divide_it() -> None:
    # One sequence in two chunks, of which the second is too short to be divided.
    lengths = np.array([70], np.int32)
    got = generate(placed(tiny_model(), "expert=2,sequence=2,tensor=2", "decode"), (64, 6), lengths, steps=8)
    want = generate(tiny_model(), (64, 6), lengths, steps=8)
    for a, b in zip(got[0][::2], want[0][::2], strict=True):
        assert_logits_close(a, b)
    assert_logits_close(got[1], want[1])


@pytest.mark.nightly
def test_rows_that_do_not_fill_their_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    # 117 tokens on four shards, which the exchange takes in several rounds.
    assert -(-117 // 64) * 64 * ROWS * CONFIG.hidden_size * 4 > 4 * 4096
    monkeypatch.setattr(exchange, "GATHER_TOKENS", 0)
    monkeypatch.setattr(travel, "BUFFER_BYTES", 4096)
    model = tiny_model()
    tokens = TOKENS[:, :117]
    got = placed(model, "expert=2,sequence=4", "train")(tokens)
    assert_logits_close(np.asarray(got), np.asarray(model(tokens)))
