"""Attention over a sliding window, compressed entries (all visible ones, or a selection) and a sink."""

from kernels_pallas.sparse_attention.api import selection_form, sparse_attention, sparse_attention_decode
from kernels_pallas.sparse_attention.decode_sharded import merge_partials, sharded_sparse_attention_decode
from kernels_pallas.sparse_attention.sharded import sharded_sparse_attention

__all__ = [
    "merge_partials",
    "selection_form",
    "sharded_sparse_attention",
    "sharded_sparse_attention_decode",
    "sparse_attention",
    "sparse_attention_decode",
]
