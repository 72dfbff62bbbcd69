"""Unigram and bigram models of a training text: what a language model must beat to have learned anything in context."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from v4jax.train.text import Corpus

_CHUNK = 1 << 24


class Unigram(NamedTuple):
    """Add-one smoothed frequencies of the tokens that follow another one in a document."""

    log_probability: Float[np.ndarray, " V"]

    @classmethod
    def fit(cls, corpus: Corpus, vocab_size: int) -> "Unigram":
        """Counts every token of the corpus that has a predecessor in its document."""
        counts = np.ones(vocab_size)
        for _, following in _pairs(corpus):
            counts += np.bincount(following, minlength=vocab_size)
        return cls(np.log(counts / counts.sum()))

    def losses(self, previous: Int[np.ndarray, " N"], following: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Negative log-probabilities of `following`, nats."""
        del previous
        return -self.log_probability[following]


class Bigram(NamedTuple):
    """Interpolated Kneser–Ney: absolute discounting backed off to how many contexts a token follows.

        P(w|c) = max(n(c,w) − D, 0) / n(c) + D·N(c,·) / n(c) · Q(w),   Q(w) likewise from N(·,w), backed off to 1/V

    with n the counts, N the numbers of distinct pairs and D = n₁ / (n₁ + 2·n₂) from the pairs seen once and twice.
    """

    vocab_size: int
    pairs: Int[np.ndarray, " P"]
    """Distinct c·V + w, sorted."""
    discounted: Float[np.ndarray, " P"]
    """max(n(c,w) − D, 0) / n(c)."""
    backoff: Float[np.ndarray, " V"]
    """D·N(c,·) / n(c); 1 for a context never seen."""
    continuation: Float[np.ndarray, " V"]
    """Q."""

    @classmethod
    def fit(cls, corpus: Corpus, vocab_size: int) -> "Bigram":
        """Counts every pair of neighbours within a document. Memory: 32 bytes per distinct pair."""
        pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for previous, following in _pairs(corpus):
            pairs, counts = _merge(pairs, counts, previous.astype(np.int64) * vocab_size + following)
        contexts, followers = pairs // vocab_size, pairs % vocab_size
        context_counts = np.bincount(contexts, counts, minlength=vocab_size)
        discount = _discount(counts)
        seen = np.maximum(context_counts, 1)
        distinct = np.bincount(contexts, minlength=vocab_size)
        preceding = np.bincount(followers, minlength=vocab_size)
        total = max(len(pairs), 1)
        spread = _discount(preceding[preceding > 0])
        rest = spread * np.count_nonzero(preceding) / total if len(pairs) else 1.0
        return cls(
            vocab_size=vocab_size,
            pairs=pairs,
            discounted=np.maximum(counts - discount, 0) / seen[contexts],
            backoff=np.where(context_counts > 0, discount * distinct / seen, 1.0),
            continuation=np.maximum(preceding - spread, 0) / total + rest / vocab_size,
        )

    def losses(self, previous: Int[np.ndarray, " N"], following: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Negative log-probabilities of `following` after `previous`, nats."""
        wanted = previous.astype(np.int64) * self.vocab_size + following
        index = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        own = np.where(self.pairs[index] == wanted, self.discounted[index], 0.0)
        return -np.log(own + self.backoff[previous] * self.continuation[following])


def _discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once and twice else 0.5


def _merge(pairs: np.ndarray, counts: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    new, new_counts = np.unique(more, return_counts=True)
    merged, index = np.unique(np.concatenate([pairs, new]), return_inverse=True)
    return merged, np.bincount(index, np.concatenate([counts, new_counts])).astype(np.int64)


def _pairs(corpus: Corpus) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Neighbours within documents, (token, next token), a chunk of the corpus at a time."""
    starts = corpus.offsets[1:-1]
    for begin in range(0, len(corpus.tokens) - 1, _CHUNK):
        chunk = np.asarray(corpus.tokens[begin : begin + _CHUNK + 1], np.int64)
        is_pair = np.ones(len(chunk) - 1, bool)
        cuts = starts[(starts > begin) & (starts < begin + len(chunk))] - begin - 1
        is_pair[cuts] = False
        yield chunk[:-1][is_pair], chunk[1:][is_pair]
