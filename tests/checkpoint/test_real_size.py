"""Conversion of matrices of the real size: memory, speed beside plain copying and writing, verification."""

import collections
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from real_size import flash_slice, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
MEMORY = 1 << 30
_NEEDED = 45_000_000_000
_ROUNDS = 3
_WEIGHTS = ("native", "bf16")

# Peak memory above that of the interpreter with everything imported, and seconds without the imports.
_CONVERT = """
import re, sys, time
from pathlib import Path
from v4jax.checkpoint.convert import convert
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
before, begun = peak(), time.monotonic()
summary = convert(sys.argv[1], sys.argv[2], weights=sys.argv[3], to=sys.argv[4], max_memory=int(sys.argv[5]))
print(time.monotonic() - begun, peak() - before, summary.nbytes)
"""


def run_conversion(source: Path, out: Path, weights: str, to: str) -> tuple[float, int, int]:
    """Seconds, bytes of peak memory above the interpreter's, bytes of tensors."""
    command = [sys.executable, "-c", _CONVERT, str(source), str(out), weights, to, str(MEMORY)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, memory, nbytes = found.stdout.split()
    return float(seconds), int(memory), int(nbytes)


def timed(work: Callable[[], None]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def copy_with_sync(source: Path, out: Path) -> None:
    out.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb+") as copy:
            os.fsync(copy.fileno())


def write_with_sync(out: Path, nbytes: int) -> None:
    out.mkdir()
    block = os.urandom(1 << 24)
    with (out / "plain").open("wb", buffering=0) as file:
        for start in range(0, nbytes, len(block)):
            file.write(block[: nbytes - start])
        os.fsync(file.fileno())


def measure(source: Path, folder: Path) -> dict[str, float]:
    """Shares of the plain speeds and peaks of memory: medians of rounds that alternate, each removing what it wrote."""
    out = folder / "out"
    found: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(_ROUNDS):
        for weights in _WEIGHTS:
            seconds, memory, nbytes = run_conversion(source, out, weights, "v4jax")
            shutil.rmtree(out)
            if weights == "native":
                plain = timed(lambda: copy_with_sync(source, out))
            else:
                plain = timed(lambda nbytes=nbytes: write_with_sync(out, nbytes))
            shutil.rmtree(out)
            found[f"{weights}_seconds"].append(seconds)
            found[f"{weights}_plain_seconds"].append(plain)
            found[f"{weights}_memory"].append(memory)
    medians = {name: statistics.median(values) for name, values in found.items()}
    shares = {f"{name}_share": medians[f"{name}_plain_seconds"] / medians[f"{name}_seconds"] for name in _WEIGHTS}
    return medians | shares


@pytest.mark.slow
@pytest.mark.nightly
def test_flash_sized_layers_convert_in_bounded_memory_at_the_speed_of_the_disk(tmp_path: Path, record_property):
    if shutil.disk_usage(tmp_path).free < _NEEDED:
        pytest.skip(f"needs {_NEEDED:,} bytes of disk")
    try:
        write_checkpoint(tmp_path / "source", flash_slice())
        found = measure(tmp_path / "source", tmp_path)
    finally:
        shutil.rmtree(tmp_path)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    record_property("figure", figures)
    print(figures)
    assert max(found["native_memory"], found["bf16_memory"]) <= 1.5 * 2**30, figures
    assert found["native_share"] >= 0.6, figures
    assert found["bf16_share"] >= 0.4, figures
