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
from rich.table import Table

from kernels_pallas.aot import Measurement, measure_cases
from kernels_pallas.cases import Case, accepted_cycles, all_cases, find_cases, floor_cycles
from kernels_pallas.tpu import CHIPS, chip_named
from v4jax.errors import UsageError, UserError
from v4jax.plotting import new_figure


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
    """Ask for static-profile cycles too; they can take minutes for a kernel with large loop bodies."""
    seconds: int = 600
    """Limit for one compilation."""
    json: Path | None = None
    """Also write the figures to this file."""
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
    python = options.python or sys.executable
    if options.make_environment is not None:
        python = make_environment(options.make_environment)
    rows, versions = [], {}
    with Progress(console=Console(stderr=True)) as progress:
        total = sum(name in case.chips for name in options.chip for case in cases)
        task = progress.add_task("compiling", total=total)
        for name in options.chip:
            chip = chip_named(name)
            wanted = [case for case in cases if name in case.chips]
            measured = measure_cases(wanted, chip, python=python, static=options.static, seconds=options.seconds)
            for case, result in zip(wanted, measured, strict=True):
                rows.append(make_row(case, result))
                versions |= result.versions
                progress.update(task, advance=1, description=f"{name} {case.label}")
    report = {"rows": rows, "versions": versions, "date": datetime.date.today().isoformat()}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(markdown(report))
    if options.picture is not None:
        draw(report, options.picture)
    _print(report)
    failed = [row for row in rows if row["error"]]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} cases did not compile, the first: {failed[0]['error']}")


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


def make_row(case: Case, result: Measurement) -> dict[str, Any]:
    """One row of `--json`; null where a figure was not had. The ratio is S to the floor, or B where there is no S."""
    chip = chip_named(result.chip)
    cycles = result.cycles_static if result.cycles_static is not None else result.bundles
    floor = floor_cycles(case, chip)
    best, target = case.best.get(chip.name), case.targets.get(chip.name)
    return {
        "op": case.op,
        "case": case.name,
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


# ---- report ----------------------------------------------------------------------------------------------------------
_COLUMNS = (
    "chip",
    "operation",
    "case",
    "S",
    "B",
    "floor",
    "ratio",
    "to reach",
    "best known",
    "VMEM MiB",
    "HBM temp MiB",
)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def count(value: float | None) -> str:
        return "–" if value is None else f"{value / 1000:,.1f}k"

    def mebi(value: int | None) -> str:
        return "–" if value is None else f"{value / (1 << 20):.1f}"

    best = row["best_known"]
    return (
        row["chip"],
        row["op"],
        row["case"],
        count(row["cycles_static"]),
        count(row["bundles"]),
        count(row["floor_cycles"]),
        "failed" if row["error"] else "–" if row["ratio"] is None else f"{row['ratio']:.2f} {row['ratio_kind']}",
        "–" if row["target"] is None else f"{row['target']:.2f} {row['target_kind']}",
        "–" if best is None else f"{best['kind']} {count(best['cycles'])}",
        mebi(row["vmem_bytes"]),
        mebi(row["hbm_temp_bytes"]),
    )


def _print(report: dict[str, Any]) -> None:
    table = Table(title="the TPU compiler's cycles (its model, not times)", box=None, header_style="dim")
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*_cells(row))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    for row in report["rows"]:
        if row["error"] or row["note"]:
            message = f"{row['chip']} {row['op']}/{row['case']}: {row['error'] or row['note']}"
            console.print(message, markup=False, soft_wrap=True)
    console.print("  ".join(f"{name} {version}" for name, version in report["versions"].items()), style="dim")


def markdown(report: dict[str, Any]) -> str:
    """The table as Markdown, with date and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"Compiled on {report['date']} with {versions}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'|'.join('---' if i < 3 else '---:' for i in range(len(_COLUMNS)))}|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in report["rows"]]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], file: Path) -> None:
    """Bars of the ratio to the floor, target and best known figure as marks.

    Raises:
      UserError: matplotlib is not installed.
    """
    rows = [row for row in report["rows"] if row["ratio"] is not None]
    if not rows:
        raise UserError("--picture: no case has cycles to draw")
    try:
        figure, axes = new_figure(9, 1 + 0.32 * len(rows))
    except ImportError:
        raise UserError("--picture needs matplotlib: pip install 'v4jax[plot]'") from None
    names = [f"{row['chip']}  {row['op']}/{row['case']} ({row['ratio_kind']})" for row in rows]
    axes.barh(names, [row["ratio"] for row in rows], color="#4c72b0", label="ours")
    for i, row in enumerate(rows):
        if row["target"] is not None:
            axes.plot([row["target"]] * 2, [i - 0.4, i + 0.4], color="#55a868", label="to reach")
        if row["best_known"] is not None:
            axes.plot(row["best_known"]["cycles"] / row["floor_cycles"], i, "x", color="#c44e52", label="best known")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("compiler cycles ÷ floor")
    handles, labels = axes.get_legend_handles_labels()
    marks = dict(zip(labels, handles, strict=True))
    axes.legend(marks.values(), marks.keys())
    figure.savefig(file, dpi=130)
