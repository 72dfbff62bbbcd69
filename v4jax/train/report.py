"""What a run leaves to look at: `metrics.jsonl`, one JSON object a line, and `loss.png`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from v4jax.plotting import new_figure

Row = dict[str, Any]


class MetricsLog:
    """`metrics.jsonl`, appended to; opening it drops what lies beyond a step, so that a resumed run repeats no row.

    Without a path nothing is written.
    """

    def __init__(self, path: Path | None, *, last_step: int) -> None:
        self._path, self._file = path, None
        self.rows: list[Row] = []
        if path is None:
            return
        self.rows = [row for row in _read_rows(path) if row["step"] <= last_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(partial, path)

    def __enter__(self) -> "MetricsLog":
        if self._path is not None:
            self._file = open(self._path, "a")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        """Appends a row, which has a `step`; it survives a kill of the process from here on."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def _read_rows(path: Path) -> list[Row]:
    """The whole lines of the file; a kill can leave the last one cut. Damaged lines are dropped, with a note."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    found = [_read_row(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    rows = [row for row in found if row is not None]
    if dropped := len(found) - len(rows):
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"note: {path}: {dropped} damaged line(s) dropped", markup=False)
    return rows


def _read_row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def plot_losses(rows: Sequence[Row], path: Path, levels: Mapping[str, float] | None = None) -> None:
    """Draws train and held-out loss over steps, with horizontal lines for `levels` (label → nats).

    Raises:
        ImportError: matplotlib is missing.
    """
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    figure, axes = new_figure(8, 4.5)
    end = max(step for step, _ in train + held_out)
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color="#9ecae1", linewidth=0.8, label="train, each step")
        axes.plot(steps, _smooth(values), color="#2171b5", linewidth=1.8, label="train, running mean")
    if held_out:
        steps, values = zip(*held_out, strict=True)
        axes.plot(steps, values, color="#d94801", linewidth=1.8, marker="o", markersize=4, label="held-out")
        axes.annotate(
            f"{values[-1]:.2f}", (steps[-1], values[-1]), (6, 0), textcoords="offset points",
            color="#d94801", va="center", fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    for label, value in (levels or {}).items():
        axes.axhline(value, color="#636363", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{label} {value:.2f}", (end, value), (-4, 3), textcoords="offset points", ha="right", color="#636363"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("next-token loss (nats)")
    axes.set_xlim(0, max(end, 1) * 1.02)
    axes.locator_params(axis="x", integer=True)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(0.97, 1.0))
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    os.replace(partial, path)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    smooth, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        smooth.append(mean / total)
    return smooth
