"""Compiles one request: `python -m v4jax.plan.worker REQUEST RESULT [HLO]`, started by `compile.compile_request`."""

import pickle
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from kernels_pallas.tpu import chip_named
from v4jax.compilation import compiler_options
from v4jax.errors import UserError
from v4jax.plan.compile import Compiled, Failure
from v4jax.plan.costs import program_costs
from v4jax.plan.program import build, implementations, lower
from v4jax.plan.request import Request


def _compile(request: Request, hlo: Path | None) -> Compiled | Failure:
    start = time.process_time()
    program = build(request)
    lowered = lower(request, program)
    traced = time.process_time()
    try:
        chip = chip_named(request.topology.chip.name)
        compiled = lowered.compile(compiler_options("tpu", chip=chip, is_training=request.step == "train"))
    except Exception as error:  # the compiler's own exception types differ between versions
        text = str(error)
        if isinstance(error, UserError):
            raise
        kind = "memory" if "RESOURCE_EXHAUSTED" in text or "exceeds available" in text else "error"
        return Failure(kind, text[:6000])
    seconds = time.process_time() - traced
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    if hlo is not None:
        hlo.write_text(text)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # What is alive at once. What does not fit is refused; the temporaries of what fits may sum up to more than memory.
    peak = getattr(memory, "peak_memory_in_bytes", 0) or used + memory.temp_size_in_bytes
    packages = ("jax", "jaxlib", "libtpu", "v4jax")
    return Compiled(
        weight_bytes=program.weight_bytes,
        optimizer_bytes=program.optimizer_bytes,
        cache_bytes=program.cache_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temp_bytes=max(peak - used, 0),
        peak_bytes=peak,
        costs=program_costs(text, request.mesh),
        trace_seconds=traced - start,
        compile_seconds=seconds,
        host_peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        hlo_lines=text.count("\n"),
        implementations=implementations(request),
        versions={name: _version(name) for name in packages},
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _main(given: str, result: str, hlo: str | None = None) -> None:
    request, cpu_seconds = pickle.loads(Path(given).read_bytes())
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    try:
        answer: Any = _compile(request, None if hlo is None else Path(hlo))
    except UserError as error:
        answer = Failure("error", str(error))
    temporary = Path(result + ".part")
    temporary.write_bytes(pickle.dumps(answer))
    temporary.replace(result)


if __name__ == "__main__":
    _main(*sys.argv[1:])
