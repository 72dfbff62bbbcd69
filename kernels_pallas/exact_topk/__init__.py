"""Exact top-k of rows of scores."""

from kernels_pallas.exact_topk.api import exact_topk

__all__ = ["exact_topk"]
