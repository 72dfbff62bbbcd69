"""What must not change the result: packing, padding, scanning, batching, the order of experts, later tokens.

One unpadded forward pass of four rows is the reference of all tests, so that few programs are compiled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from model.random_model import build, random_model, random_tensors, small_config

from v4jax.cache import Cache
from v4jax.config import RouterKind
from v4jax.model.transformer import Transformer
from v4jax.train.loss import next_token_labels, token_loss

CONFIG = small_config()
ROWS, LENGTH = 4, 72
DOCUMENTS = (29, 1, 17, 20)  # lengths: prefixes of the rows; 1 closes no window and predicts nothing
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32)
HASHED = [n for n, router in enumerate(CONFIG.mlp_layer_types) if router is RouterKind.HASH]


class Result(NamedTuple):
    logits: jax.Array
    mtp_logits: jax.Array
    expert_load: jax.Array


@jax.jit
def run(model: Transformer, tokens: jax.Array, segment_ids: jax.Array | None = None) -> Result:
    output = model.hidden(tokens, segment_ids)
    mtp_hidden = model.mtp_hidden(output.streams, tokens, segment_ids)
    return Result(model.logits(output.hidden), model.logits(mtp_hidden), output.expert_load)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def reference(model: Transformer) -> Result:
    return run(model, TOKENS)


# ---- packing and padding ---------------------------------------------------------------------------------------------
def _place(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, list[list[tuple[int, int]]]]:
    """Lays out documents (by number) in rows: tokens, segment ids, per row (document, start). Padding is real ids."""
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    segment_ids, places = np.zeros_like(tokens), []
    for row, documents in enumerate(rows):
        start, place = 0, []
        for document in documents:
            end = start + DOCUMENTS[document]
            tokens[row, start:end] = TOKENS[document, : end - start]
            segment_ids[row, start:end] = document + 1
            place.append((document, start))
            start = end
        places.append(place)
    return tokens, segment_ids, places


LAYOUTS = {
    "padded": [[0], [1], [2], [3]],
    "packed": [[0, 1, 2, 3], [3, 0, 2, 1], [1, 2, 0, 3], [2, 3, 1, 0]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_and_packed_documents_equal_unpadded_ones(model: Transformer, reference: Result, layout: str) -> None:
    tokens, segment_ids, places = _place(LAYOUTS[layout])
    got = run(model, tokens, segment_ids)
    for name, last in (("logits", 0), ("mtp_logits", 1)):  # MTP: a document's last token has no successor
        pieces = [
            (getattr(got, name)[row, start : start + size], getattr(reference, name)[document, :size])
            for row, place in enumerate(places)
            for document, start in place
            if (size := DOCUMENTS[document] - last)
        ]
        tolerances.assert_logits_close(*(np.concatenate(side) for side in zip(*pieces, strict=True)))
    assert got.expert_load.sum() == (segment_ids > 0).sum() * CONFIG.num_experts_per_tok * CONFIG.num_hidden_layers


def test_an_id_that_returns_is_another_document(model: Transformer) -> None:
    tokens, segment_ids, _ = _place(LAYOUTS["packed"])
    changes = np.diff(segment_ids, axis=1, prepend=0) != 0
    alternating = np.where(segment_ids > 0, np.cumsum(changes, axis=1) % 2 + 1, 0).astype(np.int32)
    got, want = run(model, tokens, alternating), run(model, tokens, segment_ids)
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_array_equal(got.mtp_logits, want.mtp_logits)
    for ahead in (1, 2):
        counted, expected = (
            next_token_labels(jnp.asarray(tokens), jnp.asarray(ids), ahead=ahead)[1]
            for ids in (alternating, segment_ids)
        )
        np.testing.assert_array_equal(counted, expected)


def test_gradients_of_packed_documents_are_those_of_separate_ones() -> None:
    # With seed 0 a hidden value of an expert lies within rounding of the SwiGLU clamp, where the derivative jumps.
    model = random_model(CONFIG, seed=1)

    @jax.jit
    def gradient(model: Transformer, tokens: jax.Array, segment_ids: jax.Array) -> Transformer:
        def loss(parameters: Transformer) -> jax.Array:
            hidden = parameters.hidden(tokens, segment_ids).hidden
            return token_loss(hidden, parameters.head_weight, *next_token_labels(tokens, segment_ids)).loss

        return jax.grad(loss, allow_int=True)(model)

    def tensors(layout: str) -> dict[str, np.ndarray]:
        top, layers, _ = gradient(model, *_place(LAYOUTS[layout])[:2]).to_tensors()
        named = top | {f"layers.{n}.{key}": value for n, layer in enumerate(layers) for key, value in layer.items()}
        return {key: value for key, value in named.items() if value.dtype == np.float32}

    # Each of the four packed rows holds every document.
    want = {key: ROWS * value for key, value in tensors("padded").items()}
    tolerances.assert_gradients_close(tensors("packed"), want, tolerances.GRADIENT_REORDERING)


# ---- views and batches -----------------------------------------------------------------------------------------------
def test_unrolled_layers_equal_scanned_segments(model: Transformer, reference: Result) -> None:
    assert [segment.spec.repeats for segment in model.segments] == [1, 1, 2]
    got = run(model.unstack(), TOKENS)
    tolerances.assert_logits_close(got.logits, reference.logits)
    tolerances.assert_logits_close(got.mtp_logits, reference.mtp_logits)
    np.testing.assert_array_equal(got.expert_load, reference.expert_load)


@jax.jit
def _extend(model: Transformer, tokens: jax.Array, cache: Cache, lengths: jax.Array) -> tuple[jax.Array, Cache]:
    return model.prefill(tokens, cache, lengths)


@jax.jit
def _step(model: Transformer, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return model.decode_step(tokens, cache)


@pytest.mark.parametrize("stacked", [True, False], ids=["scanned", "unrolled"])
def test_sequences_of_unequal_lengths_prefill_and_decode_as_if_alone(
    model: Transformer, reference: Result, stacked: bool
) -> None:
    model = model if stacked else model.unstack()
    lengths, steps = np.array([33, 1, 16, 12], np.int32), 39
    prompts = np.where(np.arange(33) < lengths[:, None], TOKENS[:, :33], 7)
    logits, cache = _extend(model, prompts, model.init_cache(ROWS, LENGTH), lengths)
    got, want = [], []
    for row, length in enumerate(lengths):
        got.append(logits[row, :length])
        want.append(reference.logits[row, :length])
    rows = np.arange(ROWS)
    for step in range(steps):
        logits, cache = _step(model, jnp.asarray(TOKENS[rows, lengths + step]), cache)
        got.append(logits)
        want.append(reference.logits[rows, lengths + step])
    tolerances.assert_logits_close(np.concatenate(got), np.concatenate(want))
    np.testing.assert_array_equal(cache.length, lengths + steps)


# ---- experts ---------------------------------------------------------------------------------------------------------
def test_permuting_the_experts_changes_nothing(reference: Result) -> None:
    tensors = random_tensors(CONFIG, 0)
    rng = np.random.default_rng(2)
    for section, layer in tensors.items():
        if section == "top":
            continue
        order = rng.permutation(CONFIG.n_routed_experts)
        for key in ("experts.w1.weight", "experts.w2.weight", "experts.w3.weight", "gate.weight", "gate.bias"):
            if f"ffn.{key}" in layer:
                layer[f"ffn.{key}"] = layer[f"ffn.{key}"][order]
        if "ffn.gate.tid2eid" in layer:
            layer["ffn.gate.tid2eid"] = np.argsort(order).astype(np.int32)[layer["ffn.gate.tid2eid"]]
    got = run(build(CONFIG, tensors), TOKENS)
    assert not np.array_equal(got.expert_load, reference.expert_load)
    tolerances.assert_logits_close(got.logits, reference.logits)
    tolerances.assert_logits_close(got.mtp_logits, reference.mtp_logits)


def test_hash_layers_pick_experts_by_token_id_alone(reference: Result) -> None:
    tensors, others = random_tensors(CONFIG, 0), random_tensors(CONFIG, 1)
    for layer in HASHED:
        table = tensors["layers", layer]["ffn.gate.tid2eid"]
        others["layers", layer]["ffn.gate.tid2eid"] = table
        load = np.bincount(table[TOKENS].ravel(), minlength=CONFIG.n_routed_experts)
        np.testing.assert_array_equal(reference.expert_load[layer], load)
    got = run(build(CONFIG, others), TOKENS)
    for layer in range(CONFIG.num_hidden_layers):
        is_same = np.array_equal(got.expert_load[layer], reference.expert_load[layer])
        assert is_same == (layer in HASHED), f"layer {layer}"


# ---- causality -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("position", [16, 31, 47, 71])  # where windows of 4 and 16 begin and end
def test_no_logit_depends_on_a_later_token(model: Transformer, reference: Result, position: int) -> None:
    tokens = TOKENS.copy()
    tokens[:, position] = (tokens[:, position] + 1) % CONFIG.vocab_size
    got = run(model, tokens)
    tolerances.assert_logits_close(got.logits[:, :position], reference.logits[:, :position])
    tolerances.assert_logits_close(got.mtp_logits[:, : position - 1], reference.mtp_logits[:, : position - 1])
    assert np.abs(got.logits[:, position] - reference.logits[:, position]).min(-1).max() > 1e-3
