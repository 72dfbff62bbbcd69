"""The verb `convert`."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import tyro

from v4jax.checkpoint.convert import convert
from v4jax.errors import UsageError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert a model directory: Hugging Face to v4jax and back, one layer in memory at a time."""

    src: tyro.conf.Positional[Path]
    """Hugging Face directory (any spelling) or v4jax directory."""
    dst: tyro.conf.Positional[Path]
    """New or empty directory."""
    weights: Literal["native", "bf16", "fp32"] = "native"
    """native keeps the stored bytes, FP8 and FP4 included; bf16 and fp32 dequantise."""
    to: Literal["v4jax", "hf"] = "v4jax"
    """v4jax: one file per layer, experts stacked. hf: official names, sharded."""
    shard_size: str = "5GB"
    """Size at which --to hf begins a new file."""


def run(options: Options) -> None:
    """Converts, with a progress bar, and says what was written."""
    from rich.console import Console
    from rich.progress import Progress

    max_shard_bytes = parse_size(options.shard_size)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting")
        summary = convert(
            options.src,
            options.dst,
            weights=options.weights,
            to=options.to,
            max_shard_bytes=max_shard_bytes,
            progress=lambda done, total, name: bar.update(task, completed=done, total=total, description=name),
        )
    for note in summary.notes:
        print(f"note: {note}")
    print(f"{summary.path}: {summary.tensors:,} tensors, {summary.nbytes:,} bytes in {len(summary.files)} files")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500 MiB` or a plain number.

    Raises:
      UsageError: for anything else, or zero.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.strip().upper())
    size = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if size == 0:
        raise UsageError(f"--shard-size: got {text!r}, need a positive size such as 5GB or 500MiB")
    return size
