"""Sinkhorn rounds inside a kernel, recorded and differentiated; entries of the matrices are packed rows (`sums`).

A normalisation is m' = m · f with f = 1 / (Σ m + eps), so that dm = f · (dm' − Σ dm' · m'): its result and its factors
are all that the derivative needs. They are kept for every half of every round. Going back from the last result
instead, m = m' / f, would add up the rounding of all rounds.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.tpu import LANES, SUBLANES, round_up

Matrix = list[list[jax.Array]]
"""Entries [source][target]."""


def record_shape(count: int, iterations: int, tokens: int) -> tuple[int, int, int]:
    """Of the float32 scratch: two halves of each round, count² entries and `count` factors, packed."""
    lines = 1 if tokens % LANES else tokens // LANES
    return 2 * iterations, round_up(count * (count + 1) * lines, SUBLANES), tokens // lines


def record_first(logits: Matrix, saved: Any, eps: float) -> Matrix:
    """Begins to fill `saved` ([2 · iterations, …], see `record_shape`): the softmax, its columns."""
    matrix = []
    for row in logits:
        highest = functools.reduce(jnp.maximum, row)
        exponentials = [jnp.exp(c - highest) for c in row]
        factor = 1.0 / _sum(exponentials)
        matrix.append([c * factor for c in exponentials])
    _store(saved, 0, matrix, [])
    return _columns(saved, 1, [[c + eps for c in row] for row in matrix], eps)


def record_round(i: Any, matrix: Matrix, saved: Any, eps: float) -> Matrix:
    """Fills rows and columns of the i-th round after the first."""
    return _columns(saved, 2 * i + 3, _rows(saved, 2 * i + 2, matrix, eps), eps)


def differentiate(d_matrix: Matrix, saved: Any, iterations: int) -> Matrix:
    """Cotangents of the logits from those of the result."""

    def both(i: jax.Array, d_matrix: Matrix) -> Matrix:
        half = 2 * (iterations - 1 - i)
        return _undo_rows(saved, half, _undo_columns(saved, half + 1, d_matrix))

    d_matrix = _undo_columns(saved, 1, jax.lax.fori_loop(0, iterations - 1, both, d_matrix, unroll=True))
    softmax = _matrix(saved, 0, *_sizes(d_matrix))
    return [
        [s * (d - mean) for s, d in zip(row, d_row, strict=True)]
        for row, d_row in zip(softmax, d_matrix, strict=True)
        for mean in (_inner(row, d_row),)
    ]


def _rows(saved: Any, half: Any, matrix: Matrix, eps: float) -> Matrix:
    factors = [1.0 / (_sum(row) + eps) for row in matrix]
    return _store(saved, half, [[c * f for c in row] for row, f in zip(matrix, factors, strict=True)], factors)


def _columns(saved: Any, half: Any, matrix: Matrix, eps: float) -> Matrix:
    factors = [1.0 / (_sum(column) + eps) for column in zip(*matrix, strict=True)]
    return _store(saved, half, [[c * f for c, f in zip(row, factors, strict=True)] for row in matrix], factors)


def _undo_rows(saved: Any, half: Any, d_matrix: Matrix) -> Matrix:
    matrix, factors = _matrix(saved, half, *_sizes(d_matrix)), _factors(saved, half, *_sizes(d_matrix))
    found = []
    for row, d_row, factor in zip(matrix, d_matrix, factors, strict=True):
        mean = _inner(row, d_row)
        found.append([factor * (d - mean) for d in d_row])
    return found


def _undo_columns(saved: Any, half: Any, d_matrix: Matrix) -> Matrix:
    matrix, factors = _matrix(saved, half, *_sizes(d_matrix)), _factors(saved, half, *_sizes(d_matrix))
    columns = []
    for column, d_column, factor in zip(zip(*matrix, strict=True), zip(*d_matrix, strict=True), factors, strict=True):
        mean = _inner(column, d_column)
        columns.append([factor * (d - mean) for d in d_column])
    return [list(row) for row in zip(*columns, strict=True)]


def _sizes(matrix: Matrix) -> tuple[int, int]:
    """Lines of an entry, entries of a row."""
    return matrix[0][0].shape[0], len(matrix)


def _inner(a: Any, b: Any) -> jax.Array:
    return _sum([x * y for x, y in zip(a, b, strict=True)])


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def _store(saved: Any, half: Any, matrix: Matrix, factors: list[jax.Array]) -> Matrix:
    for i, value in enumerate([*itertools.chain(*matrix), *factors]):
        lines = value.shape[0]
        saved[half, i * lines : (i + 1) * lines] = value
    return matrix


def _matrix(saved: Any, half: Any, lines: int, count: int) -> Matrix:
    return [[_entry(saved, half, lines, count * j + k) for k in range(count)] for j in range(count)]


def _factors(saved: Any, half: Any, lines: int, count: int) -> list[jax.Array]:
    return [_entry(saved, half, lines, count * count + i) for i in range(count)]


def _entry(saved: Any, half: Any, lines: int, i: int) -> jax.Array:
    return saved[half, i * lines : (i + 1) * lines]
