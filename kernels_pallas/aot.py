"""Compiles kernels for TPUs that are not there, and reads the compiler's cycles.

libtpu carries the whole compiler and describes topologies, so that any x86 host will do. It reads its flags once per
process and an estimate can abort the process, hence the subprocesses: `measure_cases` is what callers want.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kernels_pallas import llo
from kernels_pallas.cases import Case, find_cases
from kernels_pallas.tpu import Chip, chip_named

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # libtpu only compiles
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these two only keep it from asking the cloud who it is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the compiler said about one case on one chip; None where it said nothing."""

    label: str
    chip: str
    error: str | None = None
    """Why it did not compile, or that the compiler aborted."""
    cycles_static: int | None = None
    """S, summed over `programs`."""
    bundles: int | None = None
    """B, summed likewise."""
    programs: dict[str, int] = dataclasses.field(default_factory=dict)
    """S of each program: the kernels and what XLA adds around them."""
    vmem_bytes: int | None = None
    """Of the program that allots most."""
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes in HBM: argument, output, temp, alias."""
    note: str = ""
    """What is missing, and why."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


# ---- in a process that has libtpu ------------------------------------------------------------------------------------
def topology_device(chip: Chip) -> Any:
    """A device of this kind to compile for.

    Raises:
      RuntimeError: libtpu is missing.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    except Exception as error:
        raise RuntimeError(f"no TPU compiler here (pip install 'jax[tpu]'): {error}") from error


def compile_for(chip: Chip, function: Callable[..., Any], arguments: tuple[Any, ...], **jit_options: Any) -> Any:
    """Compiles a function for one device of a chip.

    Args:
      arguments: trees of `ShapeDtypeStruct`, without shardings.

    Returns:
      The `jax.stages.Compiled`.
    """
    import jax

    device = topology_device(chip)
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    with jax.default_device(device):
        traced = jax.jit(function, **jit_options).trace(*placed)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def memory_bytes(compiled: Any) -> dict[str, int]:
    """HBM of a compiled program by use."""
    found = compiled.memory_analysis()
    return {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}


def _measure_here(case: Case, chip: Chip, folder: Path) -> Measurement:
    """Compiles a case in this process, whose libtpu writes into `folder`."""
    for name in ("static", "llo"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    try:
        compiled = compile_for(chip, *case.build())
    except Exception as error:
        message = _first_lines(f"{type(error).__name__}: {error}")
        return Measurement(case.label, chip.name, error=message, programs=llo.static_cycles(folder))
    programs, counted = llo.static_cycles(folder), llo.bundles(folder, case.region_shares)
    known = [count for count in counted.values() if count is not None]
    return Measurement(
        case.label,
        chip.name,
        cycles_static=sum(programs.values()) or None,
        bundles=sum(known) if known and len(known) == len(counted) else None,
        programs=programs,
        vmem_bytes=max(llo.vmem_bytes(folder).values(), default=None),
        memory=memory_bytes(compiled),
        versions=_versions(),
    )


def _first_lines(text: str) -> str:
    return text if len(text) <= 1500 else f"{text[:1500]} …"


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"python": sys.version.split()[0], **found}


# ---- in the caller ---------------------------------------------------------------------------------------------------
def measure_cases(
    cases: Sequence[Case],
    chip: Chip,
    *,
    python: str = sys.executable,
    batch: int = 1,
    static: bool = True,
    seconds: int = 600,
    static_seconds: int | None = None,
    keep: Path | None = None,
) -> Iterator[Measurement]:
    """Compiles cases, `batch` of them per subprocess; those that a dying process took with it run again alone.

    Args:
      python: interpreter with jax and libtpu, for instance of a newer environment.
      static: whether to ask for S. Where the compiler aborts over it or exceeds its time, B alone is given and
        `note` says so.
      seconds: limit per case.
      static_seconds: limit per case where S is asked for, by default the same.
      keep: folder for the compiler's listings, by default removed.

    Yields:
      One measurement per case, in their order.
    """
    static = static and all(case.static for case in cases)
    limit = static_seconds or seconds if static else seconds
    for start in range(0, len(cases), batch):
        group = list(cases[start : start + batch])
        found = _subprocess(group, chip, python, static, limit, keep)
        for case in group:
            result = found.get(case.label)
            if result is None or (_aborted(result) and len(group) > 1):
                result = _subprocess([case], chip, python, static, limit, keep)[case.label]
            if _aborted(result) and static:
                without = _subprocess([case], chip, python, False, seconds, keep)[case.label]
                if without.error is None:
                    result = dataclasses.replace(without, note=f"no static cycles: {result.error}")
            elif static and result.error is not None and result.programs:
                # Profiling, the compiler puts more of XLA's arrays into VMEM and may then refuse what fits without.
                without = _subprocess([case], chip, python, False, seconds, keep)[case.label]
                if without.error is None:
                    cycles = sum(result.programs.values())
                    result = dataclasses.replace(without, cycles_static=cycles, programs=result.programs)
            yield result


def _aborted(result: Measurement) -> bool:
    return result.error is not None and result.error.startswith(_ABORT)


_ABORT = "the compiler aborted"


def _subprocess(
    cases: list[Case], chip: Chip, python: str, static: bool, seconds: int, keep: Path | None
) -> dict[str, Measurement]:
    """Measurements of one process: of all cases, or up to the one in which it died."""
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aot-")))
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ENVIRONMENT
        environment.pop("TPU_LIBRARY_PATH", None)  # importing jax set it to the libtpu of this interpreter
        package_root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        environment["LIBTPU_INIT_ARGS"] = " ".join(
            filter(None, (os.environ.get("LIBTPU_INIT_ARGS"), llo.flags(folder, static=static, bundles=True)))
        )
        command = [python, "-m", __name__, "--chip", chip.name, "--folder", str(folder), *(c.label for c in cases)]
        try:
            process = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=seconds * len(cases)
            )
            output, errors, code = process.stdout, process.stderr, process.returncode
        except subprocess.TimeoutExpired as expired:
            output, errors, code = expired.stdout or b"", f"no answer within {expired.timeout:.0f} s", _TIMEOUT
            output = output.decode() if isinstance(output, bytes) else output
    found = {}
    for line in output.splitlines():
        if line.startswith(_MARK):
            result = Measurement(**json.loads(line.removeprefix(_MARK)))
            found[result.label] = result
    missing = [case.label for case in cases if case.label not in found]
    if missing:
        died = code == _TIMEOUT or code < 0 or code > 128
        reason = f"{_ABORT} ({_signal(code)})" if died else f"the compiling process failed ({code})"
        lines = errors.strip().splitlines()
        last = next((line for line in lines if "Check failed" in line), "\n".join(lines[-8:]))
        found[missing[0]] = Measurement(missing[0], chip.name, error=_first_lines(f"{reason}: {last}"))
    return found


_MARK = "measurement: "
_TIMEOUT = 124


def _signal(code: int) -> str:
    if code == _TIMEOUT:
        return "out of time"
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"exit code {code}"


def main() -> None:
    """The subprocess: one line of JSON per case."""
    parser = argparse.ArgumentParser(description="Compile cases for a TPU; one JSON object per line.")
    parser.add_argument("--chip", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where LIBTPU_INIT_ARGS points")
    parser.add_argument("labels", nargs="+")
    options = parser.parse_args()
    chip = chip_named(options.chip)
    for case in find_cases(tuple(options.labels)):
        result = _measure_here(case, chip, options.folder)
        print(_MARK + json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
