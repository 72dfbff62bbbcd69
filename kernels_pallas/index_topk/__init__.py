"""Lightning-indexer scores and exact top-k selection."""

from kernels_pallas.index_topk.api import index_topk, index_topk_decode

__all__ = ["index_topk", "index_topk_decode"]
