"""Decode on a TPU: checks the arguments and picks the kernel, by rows for a selection and by pages for all entries."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.sparse_attention.block_sizes_decode import DecodeBlockSizes
from kernels_pallas.sparse_attention.kernel_decode_pages import attend_pages
from kernels_pallas.sparse_attention.kernel_decode_rows import attend_rows
from kernels_pallas.tpu import LANES, current_chip, round_up


def sparse_attention_decode(
    q: Float[Array, "B N H"],
    ring: Float[Array, "L B W H"],
    ring_count: Int[Array, " B"],
    sink: Float[Array, " N"],
    entries: Float[Array, "L B P *R"] | None,
    entry_count: Int[Array, " B"] | None,
    selection: Int[Array, "B K"] | None,
    *,
    layer: Int[Array, ""],
    scale: float,
    is_partial: bool,
    block_sizes: DecodeBlockSizes | None,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.sparse_attention_decode`; caches are stacked.

    Raises:
      ValueError: dtypes that differ or that the kernel lacks, or blocks that do not fit the chip's VMEM.
    """
    batch, _, dim = q.shape
    dtypes = {x.dtype for x in (q, ring, entries) if x is not None}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"sparse_attention_decode: q, ring and entries are {found}; need one of bfloat16, float32")
    if batch == 0:
        empty = jnp.zeros(q.shape, jnp.float32 if is_partial else q.dtype)
        return (empty, empty[..., 0], empty[..., 0]) if is_partial else empty
    if entries is not None and (entries.shape[2] == 0 or (selection is not None and selection.shape[1] == 0)):
        entries = None
    # A word of a row holds two bf16 channels that lie 128 apart.
    width = round_up(dim, LANES * (4 // q.dtype.itemsize))
    if entries is not None:
        if selection is None and entries.ndim == 5:  # stored for single rows: all of them, rather than a copy
            selection = jnp.broadcast_to(jnp.arange(entries.shape[2]), (batch, entries.shape[2]))
        if width != dim:
            entries = _pad_last(entries.reshape(*entries.shape[:3], dim), width)
        row = (width,) if selection is None else (width // LANES, LANES)
        entries = entries.reshape(*entries.shape[:3], *row)
    counts = jnp.zeros_like(ring_count) if entry_count is None else entry_count
    arguments = (layer.reshape(1), ring_count, counts, _pad_last(q, width), _pad_last(ring, width))
    options = {"scale": scale, "is_partial": is_partial, "chip": current_chip()}
    sink = sink.astype(jnp.float32)
    if entries is None or selection is None:
        sizes = block_sizes or DecodeBlockSizes()
        results = attend_pages(*arguments, sink, entries, block_sizes=sizes, **options)
    else:
        results = attend_rows(*arguments, sink, entries, selection, **options)
    out = results[0][..., :dim]
    return (out, results[1][..., 0], results[2][..., 0]) if is_partial else out


def _pad_last(x: jax.Array, width: int) -> jax.Array:
    """Zeros behind the last axis: a copy, which head sizes of whole lanes do not need."""
    if x.shape[-1] == width:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
