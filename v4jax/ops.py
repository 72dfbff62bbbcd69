"""The switchboard: the only file of the model's that calls `kernels_pallas`.

A model file asks for an operation by name; which implementation runs is the platform's default (TPU: pallas where there
is one; elsewhere xla, else reference) unless `--implementation op=…` forces one. The choice is made while tracing.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from kernels_pallas import grouped_experts as _grouped_experts
from kernels_pallas import hyper_connection as _hyper_connection
from kernels_pallas import index_topk as _index_topk
from kernels_pallas import sparse_attention as _sparse_attention
from kernels_pallas.dispatch import parse_overrides
from kernels_pallas.grouped_experts.reference import swiglu
from kernels_pallas.grouped_experts.stacks import ExpertStack, k_major
from kernels_pallas.hyper_connection import unpack_maps
from kernels_pallas.index_topk.reference import scores as index_scores
from kernels_pallas.loops import data_loop
from kernels_pallas.materialize import materialized, with_materialized_gradient
from kernels_pallas.ordering import by_key, gather_sum
from kernels_pallas.sparse_attention import merge_partials
from kernels_pallas.vectors import are_few, are_joined, matrix_vector, times_few
from v4jax.errors import UsageError

__all__ = [
    "ExpertStack",
    "are_few",
    "are_joined",
    "by_key",
    "data_loop",
    "forced_implementations",
    "gather_sum",
    "grouped_experts",
    "hyper_connection_leave",
    "hyper_connection_seam",
    "hyper_connection_write",
    "implementations",
    "index_scores",
    "index_topk",
    "index_topk_decode",
    "k_major",
    "materialized",
    "matrix_vector",
    "merge_partials",
    "selection_form",
    "sparse_attention",
    "sparse_attention_decode",
    "swiglu",
    "times_few",
    "unpack_maps",
    "with_materialized_gradient",
]

_OVERRIDES: ContextVar[dict[str, str] | None] = ContextVar("implementation overrides", default=None)


@contextlib.contextmanager
def implementations(choices: Iterable[str]) -> Iterator[None]:
    """Forces implementations, each written `op=implementation`, for whatever is traced inside.

    Raises:
      UsageError: for an unknown operation, or an implementation that it lacks.
    """
    try:
        overrides = parse_overrides(choices)
    except ValueError as error:
        raise UsageError(str(error)) from None
    token = _OVERRIDES.set((_OVERRIDES.get() or {}) | overrides)
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def forced_implementations() -> frozenset[tuple[str, str]]:
    """The choices in force, as (operation, implementation)."""
    return frozenset((_OVERRIDES.get() or {}).items())


def _switched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, implementation=(_OVERRIDES.get() or {}).get(name), **kwargs)

    call.__name__, call.__doc__ = name, function.__doc__
    return call


grouped_experts = _switched("grouped_experts", _grouped_experts.grouped_experts)
index_topk = _switched("index_topk", _index_topk.index_topk)
index_topk_decode = _switched("index_topk_decode", _index_topk.index_topk_decode)
selection_form = _switched("sparse_attention", _sparse_attention.selection_form)
sparse_attention = _switched("sparse_attention", _sparse_attention.sparse_attention)
sparse_attention_decode = _switched("sparse_attention_decode", _sparse_attention.sparse_attention_decode)
hyper_connection_seam = _switched("hyper_connection_seam", _hyper_connection.seam)
hyper_connection_leave = _switched("hyper_connection_leave", _hyper_connection.leave)
hyper_connection_write = _switched("hyper_connection_write", _hyper_connection.write)
