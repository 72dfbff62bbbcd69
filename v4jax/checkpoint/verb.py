"""The verb `convert`."""

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.layout import Layout, Weights
from v4jax.checkpoint.orbax_tree import write_orbax
from v4jax.checkpoint.writer import Summary
from v4jax.errors import UsageError

_UNITS = {"": 1} | {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", start=1)}

Place = Annotated[str, tyro.conf.arg(metavar="PATH|URL")]


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert a model directory: Hugging Face to v4jax and back, a few rows of a few matrices in memory at a time."""

    src: tyro.conf.Positional[Place]
    """Hugging Face directory (any spelling) or v4jax directory; a path or a URL such as gs://bucket/model."""
    dst: tyro.conf.Positional[Place]
    """New or empty directory; a path or a URL."""
    weights: Weights = "native"
    """native keeps the stored bytes, FP8 and FP4 included (with --base: the base's formats); bf16 and fp32 dequantise;
    fp4 and fp8 are the released formats with FP4 or FP8 experts: lossless from quantised weights, else rounded."""
    to: Annotated[str, tyro.conf.arg(metavar="v4jax|hf|orbax")] = "v4jax"
    """v4jax: one file per layer, experts stacked. hf: sharded. orbax: one uncompressed tree, held in memory."""
    layout: Layout = "official"
    """Names of --to hf: the released ones, or those of transformers' modules."""
    shard_size: str = "5GB"
    """Size at which --to hf begins a new file."""
    max_memory: str = "2GiB"
    """What buffers may take, beside the interpreter itself."""
    base: Place | None = None
    """The checkpoint that SRC was fine-tuned from: tensors with its values keep its bytes, others are quantised."""
    resume: bool = False
    """Go on after an interruption; finished files are checked by their checksums."""
    verify: bool = False
    """Then compare every tensor with its source and run a forward pass, one layer in memory at a time. On a finished
    DST this is all that is done."""


def run(options: Options) -> None:
    """Converts, with a progress bar, verifies if asked, and says what was written."""
    if options.to not in ("v4jax", "hf", "orbax"):
        raise UsageError(f"--to: got {options.to!r}, need v4jax, hf or orbax")
    if options.layout != "official" and options.to == "v4jax":
        raise UsageError(f"--layout {options.layout} is one of Hugging Face directories: add --to hf, or leave it out")
    shard_bytes = parse_size(options.shard_size)
    max_memory = parse_size(options.max_memory, "--max-memory")
    if options.to == "orbax":
        if options.resume or options.verify or options.base or options.layout != "official":
            raise UsageError("--to orbax has no --resume, --verify, --base or --layout: leave them out")
        summary = write_orbax(options.src, options.dst, weights=options.weights, max_memory=max_memory)
    else:
        summary = _convert(options, shard_bytes, max_memory)
    for note in summary.notes:
        print(f"note: {note}")
    print(f"{summary.path}: {summary.tensors:,} tensors, {summary.nbytes:,} bytes in {len(summary.files)} files")
    if options.verify:
        from v4jax.verify import verify_and_print

        verify_and_print(options.dst, source=options.src)


def _convert(options: Options, shard_bytes: int, max_memory: int) -> Summary:
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return _run(options, shard_bytes, max_memory, _Log())
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        return _run(options, shard_bytes, max_memory, _Bar(bar, bar.add_task("converting", total=None)))


class _Bar:
    """Progress on a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def on_section(self, done: int, total: int, name: str) -> None:
        """A section is written."""
        self._bar.update(self._task, description=f"{name} {done}/{total}")

    def on_bytes(self, done: int, total: int) -> None:
        """So many bytes are written."""
        self._bar.update(self._task, completed=done, total=total)


class _Log:
    """Progress elsewhere: a line now and then, with the speed since the start and the time left.

    Args:
        clock: seconds.
    """

    INTERVAL = 30.0
    """Seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._section = clock, "converting"
        self._start: tuple[float, int] | None = None
        self._last = clock()

    def on_section(self, done: int, total: int, name: str) -> None:
        """A section is written."""
        self._section = f"{name} {done}/{total}"

    def on_bytes(self, done: int, total: int) -> None:
        """So many bytes are written."""
        now = self._clock()
        self._start = self._start or (now, done)  # what an earlier run wrote is no speed
        if now - self._last < self.INTERVAL:
            return
        self._last = now
        speed = (done - self._start[1]) / max(now - self._start[0], 1e-9)
        left = f", {(total - done) / speed / 60:.0f} min left" if speed else ""
        print(
            f"{self._section}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e6:.0f} MB/s{left}",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _run(options: Options, shard_bytes: int, max_memory: int, shown: _Bar | _Log) -> Summary:
    return convert(
        options.src,
        options.dst,
        weights=options.weights,
        to="hf" if options.to == "hf" else "v4jax",
        layout=options.layout,
        max_shard_bytes=shard_bytes,
        max_memory=max_memory,
        base=options.base,
        resume=options.resume,
        keep_finished=options.verify,
        progress=shown.on_section,
        on_bytes=shown.on_bytes,
    )


def parse_size(text: str, flag: str = "--shard-size") -> int:
    """Bytes of `5GB`, `500 MiB` or a plain number.

    Raises:
      UsageError: for anything else, or zero.
    """
    match = re.fullmatch(r"([0-9]{1,18})\s*([KMGT]I?B)?", text.strip().upper())
    size = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if size == 0:
        raise UsageError(f"{flag}: got {text!r}, need a positive size such as 5GB or 500MiB")
    return size
