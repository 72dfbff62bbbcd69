"""`v4jax bench kernels`: every kernel at its production shapes through the real TPU compiler, no TPU needed.

The figures are the compiler's own model, never times: S static-profile cycles, B bundles × trip counts.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kernels_pallas.aot import Measurement, measure_cases
from kernels_pallas.cases import Case, accepted_cycles, all_cases, find_cases, floor_cycles
from kernels_pallas.tpu import CHIPS, chip_named
from v4jax.bench_kernels_report import draw, markdown, print_table
from v4jax.errors import UsageError, UserError, check_json_place


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """Compiles the kernels for TPUs and prints the compiler's cycles beside floor, target and the best figure known."""

    chip: tuple[str, ...] = ("v6e", "tpu7x")
    """TPUs to compile for: v5e v5p v6e tpu7x."""
    op: tuple[str, ...] = ()
    """Operations, or `op/case`; all by default."""
    python: str | None = None
    """Interpreter with another jax and libtpu, for instance of Python 3.12: tpu7x has no static cycles before
    libtpu 0.0.50."""
    make_environment: Path | None = None
    """Make such an environment in this folder with `python3.12 -m venv`, and use it."""
    static: bool = True
    """Static-profile cycles too, which can take minutes for a kernel with large loop bodies; --no-static leaves them
    out."""
    batch: int = 1
    """Cases per process, which saves its start; those that a dying one takes with it run again alone. Only with
    --no-static: static cycles are asked for case by case."""
    seconds: int = 600
    """Limit for one compilation."""
    static_seconds: int | None = None
    """Limit for one that is asked for static cycles, by default the same; beyond it the case has bundles alone."""
    json: Path | None = None
    """Also write the figures to this file, after every case."""
    resume: bool = False
    """Keep what --json holds from before, of other chips and cases too, and compile only what is missing there: a case
    without figures, or, unless --no-static, one not asked for static cycles. Figures say which versions they are of."""
    markdown: Path | None = None
    """Also write the table to this file, with the date and the compilers' versions."""
    picture: Path | None = None
    """Also draw the ratios to the floor into this file."""


def run(options: KernelOptions) -> None:
    """The verb."""
    cases = select_cases(options.op)
    unknown = [name for name in options.chip if name not in CHIPS]
    if unknown:
        raise UsageError(f"--chip: got {', '.join(unknown)}, need {', '.join(CHIPS)}")
    if options.batch < 1 or (options.batch > 1 and options.static):
        raise UsageError(f"--batch: got {options.batch}, need 1, or at least 1 with --no-static")
    check_json_place(options.json)
    rows = _read_rows(options)
    python = options.python or sys.executable
    if options.make_environment is not None:
        python = make_environment(options.make_environment)
    wanted = [
        (name, case)
        for name in options.chip
        for case in cases
        if name in case.chips and _is_missing(rows.get(_key(name, case)), case, options.static)
    ]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        for name in options.chip:
            of_chip = [case for chip, case in wanted if chip == name]
            for start in range(0, len(of_chip), options.batch):
                group = of_chip[start : start + options.batch]
                progress.update(task, description=f"{name} {group[0].label}")
                measured = measure_cases(
                    group, chip_named(name), python=python, batch=len(group), static=options.static,
                    seconds=options.seconds, static_seconds=options.static_seconds,
                )  # fmt: skip
                for case, result in zip(group, measured, strict=True):
                    rows[_key(name, case)] = make_row(case, result, static=options.static)
                    if options.json is not None:
                        _write(options.json, make_report(rows.values()))
                    progress.update(task, advance=1)
    report = make_report(rows.values())
    if options.json is not None:
        _write(options.json, report)
    if options.markdown is not None:
        picture = options.picture and os.path.relpath(options.picture, options.markdown.parent)
        options.markdown.write_text(markdown(report, picture))
    if options.picture is not None:
        draw(report, options.picture)
    print_table(report)
    failed = [row for row in report["rows"] if row["error"]]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} cases did not compile, the first: {failed[0]['error']}")


def _key(chip: str, case: Case) -> tuple[str, str, str]:
    return chip, case.op, case.name


def _is_missing(row: dict[str, Any] | None, case: Case, static: bool) -> bool:
    """Whether a case is to be compiled (again)."""
    if row is None or row["error"] is not None:
        return True
    return static and case.static and not row["static_asked"]


def _read_rows(options: KernelOptions) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows of an earlier run that still have a case.

    Raises:
      UsageError: nowhere to resume from.
      UserError: the file is none of ours.
    """
    if not options.resume:
        return {}
    if options.json is None:
        raise UsageError("--resume: got no --json, need the file of the run to go on with")
    if not options.json.exists():
        return {}
    try:
        rows = json.loads(options.json.read_text())["rows"]
        known = {(case.op, case.name) for case in all_cases()}
        return {(r["chip"], r["op"], r["case"]): r for r in rows if (r["op"], r["case"]) in known}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {options.json} is no report of bench kernels: {error!r}; remove it") from None


def _write(file: Path, report: dict[str, Any]) -> None:
    """All of the file or nothing."""
    beside = file.with_name(file.name + ".part")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(file)


def make_report(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` holds: rows by chip and case, the versions of each, all versions, today's date."""
    place = {(case.op, case.name): i for i, case in enumerate(all_cases())}
    rows = sorted(rows, key=lambda row: (list(CHIPS).index(row["chip"]), place.get((row["op"], row["case"]), 0)))
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"]
    return {"rows": rows, "versions": versions, "date": datetime.date.today().isoformat()}


def select_cases(names: Iterable[str]) -> tuple[Case, ...]:
    """Cases of these operations or labels; all for none.

    Raises:
      UsageError: a name that is neither.
    """
    cases = all_cases()
    if not (names := tuple(names)):
        return cases
    operations = {case.op for case in cases}
    found: list[Case] = []
    for name in names:
        if name in operations:
            found += [case for case in cases if case.op == name]
            continue
        try:
            found += find_cases((name,))
        except ValueError:
            raise UsageError(f"--op: got {name!r}, need {', '.join(sorted(operations))}, or op/case") from None
    return tuple({case.label: case for case in found}.values())


def make_row(case: Case, result: Measurement, *, static: bool = True) -> dict[str, Any]:
    """One row of `--json`; null where a figure was not had.

    The ratio is S to the floor, or B where there is no S and B means anything.

    Args:
      static: whether S was asked for.
    """
    chip = chip_named(result.chip)
    cycles = result.cycles_static
    if cycles is None and case.counts_bundles:
        cycles = result.bundles
    floor = floor_cycles(case, chip)
    best, target = case.best.get(chip.name), case.targets.get(chip.name)
    return {
        "op": case.op,
        "case": case.name,
        "model": case.model,
        "chip": chip.name,
        "cycles_static": result.cycles_static,
        "bundles": result.bundles,
        "floor_cycles": floor,
        "ratio": None if cycles is None else accepted_cycles(case, chip, cycles) / floor,
        "ratio_kind": None if cycles is None else "S" if result.cycles_static is not None else "B",
        "target": target,
        "target_kind": case.target_kind if target else None,
        "vmem_bytes": result.vmem_bytes,
        "hbm_temp_bytes": result.memory.get("temp"),
        "best_known": None if best is None else dataclasses.asdict(best),
        "measured_seconds": None,
        "inputs": case.inputs,
        "note": result.note,
        "error": result.error,
        "static_asked": static and case.static,
        "versions": result.versions,
    }


def make_environment(folder: Path) -> str:
    """A Python 3.12 environment with jax 0.12 and its libtpu. Returns its interpreter.

    Raises:
      UserError: there is no python3.12, or the installation failed.
    """
    python = folder / "bin" / "python"
    packages = ["jax[tpu]>=0.12,<0.13", "jaxtyping", "numpy"]
    try:
        if not python.exists():
            subprocess.run(["python3.12", "-m", "venv", os.fspath(folder)], check=True)
        subprocess.run([os.fspath(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--make-environment {folder}: {error}; install python3.12, or name one with --python"
        ) from None
    return os.fspath(python)
