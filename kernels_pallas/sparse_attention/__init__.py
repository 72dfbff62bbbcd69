"""Attention over a sliding window, compressed entries (all visible ones, or a selection) and a sink."""

from kernels_pallas.sparse_attention.api import sparse_attention, sparse_attention_decode

__all__ = ["sparse_attention", "sparse_attention_decode"]
