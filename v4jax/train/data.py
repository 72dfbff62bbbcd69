"""Tokens to batches: documents packed into rows, shuffled, batched, with an iterator state that resumes exactly.

A row holds whole documents side by side, told apart by `segment_ids` (1, 2, … within the row; 0 is padding, on the
right). A document longer than a row is cut into pieces, each a document of its own.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from v4jax.errors import UserError
from v4jax.train.text import Corpus

if TYPE_CHECKING:
    import grain

_PACKING_BINS = 64
"""Rows that are filled at once: more bins, less padding."""


Batch = dict[str, np.ndarray]
"""`tokens` and `segment_ids`, both int32 [B, S]."""


class Pieces:
    """The documents of a corpus, cut to at most `sequence_length` tokens: a random-access source for grain."""

    def __init__(self, corpus: Corpus, sequence_length: int) -> None:
        lengths = np.diff(corpus.offsets)
        counts = -(-lengths // sequence_length)
        document = np.repeat(np.arange(len(lengths)), counts)
        within = np.arange(len(document)) - (np.cumsum(counts) - counts)[document]
        self._tokens = corpus.tokens
        self._starts = corpus.offsets[:-1][document] + within * sequence_length
        self._stops = np.minimum(self._starts + sequence_length, corpus.offsets[1:][document])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self._tokens[self._starts[index] : self._stops[index]].astype(np.int32)}


def training_batches(
    corpus: Corpus, *, sequence_length: int, batch_size: int, seed: int
) -> "grain.DatasetIterator[Batch]":
    """Endless batches, shuffled anew in every epoch.

    `get_state()` of the iterator is a JSON object; `set_state` with it goes on at the very next batch.

    Raises:
        UserError: the corpus is empty.
    """
    grain = _import_grain()
    pieces = _non_empty(Pieces(corpus, sequence_length))
    bins = max(_PACKING_BINS, batch_size)
    shuffled = grain.MapDataset.source(pieces).shuffle(seed=seed).repeat()
    rows = pack(shuffled, sequence_length=sequence_length, bins=bins, seed=seed)
    return iter(rows.batch(batch_size, drop_remainder=True))


def evaluation_batches(
    corpus: Corpus, *, sequence_length: int, batch_size: int, max_tokens: int | None = None, seed: int = 0
) -> Iterator[Batch]:
    """Every document once, in a fixed random order; the last batch is filled up with rows of padding.

    `max_tokens` stops after the row in which that many tokens are reached: always the same rows of the same corpus.
    """
    grain = _import_grain()
    pieces = _non_empty(Pieces(corpus, sequence_length))
    rows = pack(grain.MapDataset.source(pieces).shuffle(seed=seed), sequence_length=sequence_length)
    pending: list[Batch] = []
    seen = 0
    for row in rows:
        pending.append(row)
        seen += np.count_nonzero(row["segment_ids"])
        is_enough = max_tokens is not None and seen >= max_tokens
        if len(pending) == batch_size:
            yield _stack(pending, batch_size)
            pending = []
        if is_enough:
            break
    if pending:
        yield _stack(pending, batch_size)


def pack(
    pieces: "grain.MapDataset", *, sequence_length: int, bins: int = _PACKING_BINS, seed: int | None = None
) -> "grain.IterDataset[Batch]":
    """Rows of `sequence_length` from a dataset of `{"tokens": int32 [n]}`, n ≤ `sequence_length`, by best fit.

    With a seed, the rows of each group of `bins` are shuffled.
    """
    grain = _import_grain()
    # The tokens are mapped memory, so grain's reader threads would only contend for the interpreter.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = grain.experimental.BestFitPackIterDataset(
        pieces.to_iter_dataset(options),
        length_struct={"tokens": sequence_length},
        num_packing_bins=bins,
        shuffle_bins=seed is not None,
        seed=seed or 0,
    )
    return rows.map(lambda row: Batch(tokens=row["tokens"], segment_ids=row["tokens_segment_ids"]))


def _stack(rows: list[Batch], batch_size: int) -> Batch:
    def field(name: str) -> np.ndarray:
        stacked = np.stack([row[name] for row in rows])
        return np.pad(stacked, ((0, batch_size - len(rows)), (0, 0)))

    return Batch(tokens=field("tokens"), segment_ids=field("segment_ids"))


def _non_empty(pieces: Pieces) -> Pieces:
    if not len(pieces):
        raise UserError("--data: no tokens in this split; give more text")
    return pieces


def _import_grain() -> Any:
    try:
        import grain
    except ImportError:
        raise UserError("training needs grain; install it with: pip install 'v4jax[train]'") from None
    return grain
