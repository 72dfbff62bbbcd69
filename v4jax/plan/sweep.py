"""Contexts × batches of one step by formula: a table and a plot."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from v4jax.errors import UserError, check_place
from v4jax.plan.meshes import candidates
from v4jax.plan.request import Request
from v4jax.plotting import new_figure
from v4jax.sharding import format_mesh

CONTEXTS = (8192, 32768, 131072, 524288, 1048576)
BATCHES = (1, 8, 64, 256)


def sweep(request: Request, name: str) -> dict[str, Any]:
    """The best mesh by formula of every batch and context up to the model's, which stands alone if it is below all.

    Returns:
      An object of JSON: what is asked, and `rows` of `context batch mesh fits bytes_per_device bound_seconds limit
      tokens_per_second_per_chip_bound`; where no mesh divides the rows, `mesh` is null.
    """
    rows, longest = [], request.config.max_position_embeddings
    for context in [size for size in CONTEXTS if size <= longest] or [longest]:
        for batch in BATCHES:
            own = dataclasses.replace(request, context=context, batch=batch)
            row: dict[str, Any] = {"context": context, "batch": batch, "mesh": None}
            try:
                best = candidates(own)[0]
            except UserError:
                rows.append(row)
                continue
            bound = best.estimate.seconds.bound
            speed = batch * own.tokens / bound / request.topology.chips
            row |= {
                "mesh": format_mesh(best.mesh),
                "fits": best.fits,
                "bytes_per_device": best.estimate.total_bytes,
                "bound_seconds": bound,
                "limit": best.estimate.seconds.limit,
                "tokens_per_second_per_chip_bound": speed,
            }
            rows.append(row)
    return {
        "model": name, "step": request.step, "topology": request.topology.name, "weights": request.weights,
        "hbm_limit_bytes": request.topology.chip.hbm_limit, "rows": rows,
    }  # fmt: skip


def table(facts: dict[str, Any]) -> Table:
    """One line per context and batch."""
    made = Table(title=f"{facts['model']} {facts['step']} on {facts['topology']}, by formula", box=None)
    for column in ("context", "batch", "GiB/device", "bound ms", "tokens/s/chip"):
        made.add_column(column, justify="right")
    for column in ("limit", "fits", "mesh"):
        made.add_column(column)
    for row in facts["rows"]:
        if row["mesh"] is None:
            made.add_row(f"{row['context']:,}", str(row["batch"]), "–", "–", "–", "–", "–", "no mesh divides it")
            continue
        made.add_row(
            f"{row['context']:,}", str(row["batch"]), f"{row['bytes_per_device'] / 2**30:.1f}",
            f"{1e3 * row['bound_seconds']:.3g}", f"{row['tokens_per_second_per_chip_bound']:.4g}", row["limit"],
            "yes" if row["fits"] else "no", row["mesh"],
        )  # fmt: skip
    return made


def check_plot(file: Path) -> None:
    """Refuses what `plot` could not write: called before the work.

    Raises:
      UserError: matplotlib is missing, the name's ending is none that it writes, or the place cannot be written.
    """
    kinds = _figure()[0].canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise UserError(f"--plot: got {file}, need a name ending in {' '.join(f'.{kind}' for kind in sorted(kinds))}")
    check_place("--plot", file)


def plot(facts: dict[str, Any], file: Path) -> None:
    """Tokens per second and chip over the context, one line per batch; hollow where it does not fit.

    Raises:
      UserError: matplotlib is missing.
    """
    figure, axes = _figure()
    for batch in sorted({row["batch"] for row in facts["rows"]}):
        own = [row for row in facts["rows"] if row["batch"] == batch and row["mesh"] is not None]
        places = [row["context"] for row in own]
        speeds = [row["tokens_per_second_per_chip_bound"] for row in own]
        (line,) = axes.plot(places, speeds, label=f"batch {batch}")
        for place, speed, row in zip(places, speeds, own, strict=True):
            fill = line.get_color() if row["fits"] else "white"
            axes.plot(place, speed, "o", color=line.get_color(), markerfacecolor=fill)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="tokens/s per chip, at most")
    axes.set_title(f"{facts['model']} {facts['step']} on {facts['topology']} by formula; hollow: does not fit")
    axes.legend()
    figure.savefig(file, dpi=120)


def _figure() -> tuple[Any, Any]:
    try:
        return new_figure(7, 4.5)
    except ImportError:
        raise UserError('--plot needs matplotlib: pip install "v4jax[plot]"') from None
