"""Unigram and bigram models against their formulas, and the figures derived from a loss."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from v4jax.train.baselines import Bigram, Unigram
from v4jax.train.data import Batch, evaluation_batches
from v4jax.train.evaluate import bits_per_byte, evaluate_baselines
from v4jax.train.text import Corpus

V = 7


def corpus_of(*documents: list[int]) -> Corpus:
    tokens = np.concatenate([np.asarray(document, np.uint32) for document in documents])
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    return Corpus(tokens, offsets, text_bytes=3 * len(tokens), text_tokens=len(tokens))


@pytest.fixture
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(V - 1, 0.3), V - 1)

    def document() -> list[int]:
        tokens = [0]
        for _ in range(rng.integers(1, 40)):
            tokens.append(int(rng.choice(V - 1, p=chain[tokens[-1]])))
        return tokens

    return corpus_of(*(document() for _ in range(30)), [3])


def pairs_of(corpus: Corpus) -> Iterator[tuple[int, int]]:
    for document in np.split(corpus.tokens, corpus.offsets[1:-1]):
        yield from zip(document[:-1].tolist(), document[1:].tolist(), strict=True)


def test_bigram_is_interpolated_kneser_ney(corpus: Corpus) -> None:
    pairs = list(pairs_of(corpus))
    distinct = set(pairs)

    def discount(counts: list[int]) -> float:
        once, twice = counts.count(1), counts.count(2)
        return once / (once + 2 * twice) if once and twice else 0.5

    contexts = {c: sum(a == c for a, _ in pairs) for c in range(V)}
    predecessors = {w: sum(b == w for _, b in distinct) for w in range(V)}
    pair_discount = discount([pairs.count(pair) for pair in distinct])
    type_discount = discount([n for n in predecessors.values() if n])
    types = sum(n > 0 for n in predecessors.values())

    def continuation(w: int) -> float:
        return (max(predecessors[w] - type_discount, 0) + type_discount * types / V) / len(distinct)

    def probability(c: int, w: int) -> float:
        if not contexts[c]:
            return continuation(w)
        own = max(pairs.count((c, w)) - pair_discount, 0)
        return (own + pair_discount * sum(a == c for a, _ in distinct) * continuation(w)) / contexts[c]

    model = Bigram.fit(corpus, V)
    previous, following = (np.ravel(axis) for axis in np.indices((V, V)))
    expected = [-math.log(probability(c, w)) for c, w in zip(previous.tolist(), following.tolist(), strict=True)]
    np.testing.assert_allclose(model.losses(previous, following), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", [Unigram, Bigram])
def test_probabilities_sum_to_one_after_every_token(corpus: Corpus, kind: type[Unigram] | type[Bigram]) -> None:
    model = kind.fit(corpus, V)
    for previous in range(V):
        assert np.exp(-model.losses(np.full(V, previous), np.arange(V))).sum() == pytest.approx(1)


def test_counting_in_chunks_changes_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Bigram.fit(corpus, V)
    for chunk in (1, 2, 7, 100):
        monkeypatch.setattr("v4jax.train.baselines._CHUNK", chunk)
        for ours, theirs in zip(Bigram.fit(corpus, V), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_bigram_learns_what_a_unigram_cannot() -> None:
    cycle = corpus_of(*([0, 1, 2, 3] * 50 for _ in range(5)))
    levels = evaluate_baselines(cycle, evaluation_batches(cycle, sequence_length=64, batch_size=4), V)
    assert levels["unigram"] == pytest.approx(math.log(4), rel=0.01)
    assert levels["bigram"] < 0.02


def test_baselines_count_the_tokens_that_the_model_predicts() -> None:
    train = corpus_of([1, 2, 1, 2, 1, 2])
    batch = Batch(tokens=np.asarray([[1, 2, 2, 1, 0]], np.int32), segment_ids=np.asarray([[1, 1, 2, 2, 0]], np.int32))
    bigram = Bigram.fit(train, V)
    expected = bigram.losses(np.asarray([1, 2]), np.asarray([2, 1])).mean()
    assert evaluate_baselines(train, [batch], V)["bigram"] == pytest.approx(expected)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight() -> None:
    corpus = Corpus(np.zeros(10, np.uint32), np.asarray([0, 10]), text_bytes=10, text_tokens=10)
    assert bits_per_byte(math.log(256), corpus) == pytest.approx(8)
