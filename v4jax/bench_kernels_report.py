"""The report of `bench kernels`: a table on the terminal or as Markdown, and a picture."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from v4jax.errors import UserError
from v4jax.plotting import new_figure

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


def print_table(report: dict[str, Any]) -> None:
    """The table on the terminal, then what failed and why, then the versions."""
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


_PREFACE = """# TPU kernels: the compiler's cycles

Made by `v4jax bench kernels`; the figures are the TPU compiler's own model, never times.
S: static-profile cycles of the whole program. B: bundles × trip counts, no stalls. The floor is the larger of
compulsory HBM traffic and matrix-unit work at their peaks; the ratio is max(S or B, traffic) to it. – : not asked for,
not had in the time given, or without meaning (a trip count that depends on data; regions that run in one of many grid
steps).
"""


def markdown(report: dict[str, Any], picture: str | None = None) -> str:
    """A table per chip as Markdown, with date and versions.

    Args:
      picture: path of `draw`'s, seen from the table's.
    """
    lines = [_PREFACE]
    lines += [f"![Ratios to the floor]({picture})", ""] if picture else []
    for chip in dict.fromkeys(row["chip"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["chip"] == chip]
        versions: dict[str, dict[str, str]] = {}
        for row in rows:
            text = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            versions |= {text: row["versions"]} if text else {}
        lines += [
            f"## {chip}",
            "",
            f"Compiled until {report['date']} with {'; '.join(versions) or 'unknown versions'}.",
            "",
            f"| {' | '.join(_COLUMNS[1:])} |",
            f"|{'|'.join('---' if i < 2 else '---:' for i in range(len(_COLUMNS) - 1))}|",
            *(f"| {' | '.join(_cells(row)[1:])} |" for row in rows),
            "",
        ]
        lines += [f"- {row['op']}/{row['case']}: {row['error'].splitlines()[0]}" for row in rows if row["error"]]
        lines += [""] if lines[-1] else []
    return "\n".join(lines).rstrip() + "\n"


def draw(report: dict[str, Any], file: Path) -> None:
    """A panel per chip: bars of the ratio to the floor of the production shapes, target and best known as marks.

    Raises:
      UserError: matplotlib is not installed, or nothing has cycles.
    """
    rows = [row for row in report["rows"] if row["ratio"] is not None and row["model"] != "ugly"]
    if not rows:
        raise UserError("--picture: no case of Flash or Pro has cycles to draw")
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    names = list(dict.fromkeys(f"{row['op']}/{row['case']}" for row in rows))
    try:
        figure = new_figure(5 + 3.2 * len(chips), 1.4 + 0.21 * len(names))[0]
    except ImportError:
        raise UserError("--picture needs matplotlib: pip install 'v4jax[plot]'") from None
    figure.clear()
    panels = figure.subplots(1, len(chips), sharex=True, sharey=True, squeeze=False)[0]
    marks: dict[str, Any] = {}
    for axes, chip in zip(panels, chips, strict=True):
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        for row in (row for row in rows if row["chip"] == chip):
            place = names.index(f"{row['op']}/{row['case']}")
            color = "#4c72b0" if row["ratio_kind"] == "S" else "#a9bcd8"
            label = "static cycles" if row["ratio_kind"] == "S" else "bundles"
            # From just below 1, so that a ratio of 1 is a bar too.
            marks[label] = axes.barh(place, row["ratio"] - 0.9, left=0.9, color=color)
            if row["target"] is not None:
                (marks["to reach"],) = axes.plot([row["target"]] * 2, [place - 0.4, place + 0.4], color="#2f8f4e", lw=2)
            if row["best_known"] is not None:
                ratio = row["best_known"]["cycles"] / row["floor_cycles"]
                (marks["best known"],) = axes.plot(ratio, place, "x", color="#c44e52", markersize=5)
        axes.set_title(chip)
        axes.set_xlabel("compiler cycles ÷ floor")
        axes.grid(axis="x", which="both", alpha=0.25)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=len(marks), fontsize=9)
    figure.savefig(file, dpi=110)
