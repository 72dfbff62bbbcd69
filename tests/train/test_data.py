"""Packing, shuffling, batching, and exact resume of the iterator."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.train.data import Batch, Pieces, evaluation_batches, training_batches
from v4jax.train.text import Corpus


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents whose tokens are all different, so that each can be found again."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets, int(offsets[-1]), int(offsets[-1]))


def pieces_in(batch: Batch) -> list[tuple[int, ...]]:
    """The documents of a batch's rows, by their segment ids."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        ids = segments[segments > 0]
        assert np.all(segments[: len(ids)] == ids), "padding is on the right"
        assert not len(ids) or (ids[0] == 1 and set(np.diff(ids)) <= {0, 1}), "segments count up from 1"
        found += [tuple(tokens[segments == n].tolist()) for n in range(1, int(segments.max()) + 1)]
    return found


def expected_pieces(corpus: Corpus, length: int) -> list[tuple[int, ...]]:
    documents = np.split(corpus.tokens, corpus.offsets[1:-1])
    return [tuple(doc[n : n + length].tolist()) for doc in documents for n in range(0, len(doc), length)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    sequence_length=st.integers(2, 20),
    batch_size=st.integers(1, 7),
)
def test_evaluation_reads_every_document_once_in_its_own_segment(
    lengths: list[int], sequence_length: int, batch_size: int
) -> None:
    corpus = corpus_of(lengths)
    batches = list(evaluation_batches(corpus, sequence_length=sequence_length, batch_size=batch_size))
    assert all(batch["tokens"].shape == (batch_size, sequence_length) for batch in batches)
    found = [piece for batch in batches for piece in pieces_in(batch)]
    assert sorted(found) == sorted(expected_pieces(corpus, sequence_length))


@settings(max_examples=5)
@given(lengths=st.lists(st.integers(1, 40), min_size=10, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_training_goes_through_every_document_before_it_repeats_one(lengths: list[int], seed: int) -> None:
    corpus = corpus_of(lengths)
    expected = expected_pieces(corpus, 16)
    batches = training_batches(corpus, sequence_length=16, batch_size=1, seed=seed)
    counts = dict.fromkeys(expected, 0)
    for _ in range(80):
        for piece in pieces_in(next(batches)):
            counts[piece] += 1
    # Rows of one group of bins come in any order, so a piece may be a group's epochs ahead, never more.
    slack = 1 + -(-64 * 16 // sum(lengths))
    assert min(counts.values()) > 0
    assert max(counts.values()) - min(counts.values()) <= slack


def test_packing_wastes_little() -> None:
    corpus = corpus_of(np.random.default_rng(0).integers(3, 400, 2000).tolist())
    batches = training_batches(corpus, sequence_length=128, batch_size=8, seed=0)
    assert np.mean([np.mean(next(batches)["segment_ids"] > 0) for _ in range(50)]) > 0.95


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 50])
def test_iterator_goes_on_at_the_very_next_batch(steps: int) -> None:
    corpus = corpus_of(np.random.default_rng(0).integers(3, 60, 100).tolist())

    def batches():
        return training_batches(corpus, sequence_length=32, batch_size=8, seed=3)

    first = batches()
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = batches()
    second.set_state(state)
    for _ in range(20):
        expected, found = next(first), next(second)
        np.testing.assert_array_equal(found["tokens"], expected["tokens"])
        np.testing.assert_array_equal(found["segment_ids"], expected["segment_ids"])


def test_seeds_give_different_orders_and_epochs_do_too() -> None:
    corpus = corpus_of([8] * 64)

    def epochs(seed: int) -> list[bytes]:
        batches = training_batches(corpus, sequence_length=8, batch_size=64, seed=seed)
        return [next(batches)["tokens"].tobytes() for _ in range(2)]

    assert len({*epochs(0), *epochs(1)}) == 4 - (epochs(0)[1] == epochs(1)[0])
    assert epochs(5) == epochs(5)


def test_max_tokens_always_gives_the_same_rows() -> None:
    corpus = corpus_of(np.random.default_rng(0).integers(3, 60, 300).tolist())
    first, second = (
        list(evaluation_batches(corpus, sequence_length=32, batch_size=4, max_tokens=500)) for _ in range(2)
    )
    assert 500 <= sum(np.count_nonzero(batch["segment_ids"]) for batch in first) < 500 + 32
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_batches_are_int32_rows() -> None:
    batch = next(training_batches(corpus_of([5, 9]), sequence_length=8, batch_size=3, seed=0))
    assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
        "tokens": (np.int32, (3, 8)),
        "segment_ids": (np.int32, (3, 8)),
    }


def test_pieces_hold_no_copy_of_the_tokens() -> None:
    corpus = corpus_of([1000])
    assert Pieces(corpus, 10)._tokens is corpus.tokens
