"""Converts a checkpoint into a v4jax or a Hugging Face directory, a section at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from v4jax.checkpoint.names import Section, sections
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError
from v4jax.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    Progress,
    Summary,
    Weights,
    dequantised_config,
    stored_section,
    write_hf,
    write_v4jax,
)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    weights: Weights = "native",
    to: Literal["v4jax", "hf"] = "v4jax",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Summary:
    """Converts between any two of the directory layouts, in either direction.

    Args:
        src: a Hugging Face directory in any spelling, a v4jax directory, or a safetensors file beside `config.json`.
        dst: a new or empty directory.
        weights: "native" keeps the stored bytes, FP8 and FP4 included; "bf16" and "fp32" dequantise the matrices, while
            norms, hyper-connections, sinks and biases become F32 (exactly) and hash tables I64.
        to: "v4jax" (one file per layer, experts stacked) or "hf" (official names, one tensor per expert, sharded).
        max_shard_bytes: for "hf", the size at which a new shard begins.
        progress: called with sections done, sections in all and the last one's name.

    Raises:
        ConfigError: `src` has no valid `config.json`.
        CheckpointError: `src` cannot be read, `dst` is not empty or cannot be written, or they are the same.
    """
    src, dst = Path(src), Path(dst)
    if src.resolve() == dst.resolve():
        raise CheckpointError(f"{dst}: is the checkpoint to be converted; give another output directory")
    if weights not in ("native", "bf16", "fp32"):
        raise CheckpointError(f"weights: got {weights!r}, need native, bf16 or fp32")
    if to not in ("v4jax", "hf"):
        raise CheckpointError(f"to: got {to!r}, need v4jax or hf")
    checkpoint = open_checkpoint(src)
    config = checkpoint.config if weights == "native" else dequantised_config(checkpoint.config, weights)
    assets = src if src.is_dir() else src.parent
    stream = _stream(checkpoint, weights)
    if to == "hf":
        return write_hf(
            dst,
            config,
            stream,
            assets_from=assets,
            max_shard_bytes=max_shard_bytes,
            notes=checkpoint.notes,
            progress=progress,
        )
    return write_v4jax(
        dst,
        config,
        stream,
        weights=weights,
        assets_from=assets,
        source=_describe(checkpoint),
        notes=checkpoint.notes,
        progress=progress,
    )


def _stream(checkpoint: Checkpoint, weights: Weights) -> Iterator[tuple[Section, dict[str, np.ndarray]]]:
    for section in sections(checkpoint.config):
        if weights == "native":
            yield section, checkpoint.native(section)
        else:
            tensors = checkpoint.section(section, "bfloat16" if weights == "bf16" else "float32")
            yield section, stored_section(checkpoint.config, section, tensors, weights)


def _describe(checkpoint: Checkpoint) -> dict[str, object]:
    files = {info.file for info in checkpoint.inventory.values()}
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return {
        "path": str(checkpoint.path.resolve()),
        "spelling": checkpoint.spelling.value,
        "files": {str(file.relative_to(root)): file.stat().st_size for file in sorted(files)},
        "tensors": len(checkpoint.inventory),
        "bytes": checkpoint.nbytes,
        "ignored": list(checkpoint.ignored),
    }
