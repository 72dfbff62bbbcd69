"""Compiles a request in a process of its own (`worker`): the compiler can abort, and only that process then ends."""

import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# libtpu compiles for a slice that it is told of: it must not look for one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Failure:
    """A compilation that gave no program."""

    kind: str
    """"memory" (does not fit the device), "time", "abort" (the compiler ended its process) or "error"."""
    message: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a request; bytes are per device."""

    weight_bytes: int
    optimizer_bytes: int
    cache_bytes: int
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temp_bytes: int
    """Temporaries at the peak."""
    peak_bytes: int
    costs: Any
    """`costs.Costs`, per device."""
    trace_seconds: float
    compile_seconds: float
    """CPU seconds of lowering and compiling."""
    host_peak_bytes: int
    hlo_lines: int
    implementations: dict[str, str]
    versions: dict[str, str]


def compile_request(request: Any, *, cpu_seconds: int = 1800, hlo: Path | None = None) -> Compiled | Failure:
    """Compiles in a subprocess; anything that goes wrong there comes back as a `Failure`.

    Args:
      request: a `request.Request`.
      cpu_seconds: after so much CPU time the subprocess ends.
      hlo: where to keep the compiled text.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "request"), Path(folder, "result")
        given.write_bytes(pickle.dumps((request, cpu_seconds)))
        command = [
            sys.executable,
            "-m",
            "v4jax.plan.worker",
            str(given),
            str(result),
            *([] if hlo is None else [str(hlo)]),
        ]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
        if result.exists():
            return pickle.loads(result.read_bytes())
    last = done.stderr.strip().splitlines()[-8:]
    if done.returncode in (-24, -9):
        return Failure("time", f"ended by the system after at most {cpu_seconds} s of CPU time, or for lack of memory")
    return Failure("abort", f"the compiler ended its process (exit {done.returncode}): " + " | ".join(last))
