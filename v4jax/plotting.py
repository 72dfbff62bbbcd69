"""The one place that imports matplotlib (the `plot` extra): empty figures that draw without a display."""

from typing import Any


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of that many inches and its axes; `figure.savefig` writes it.

    Raises:
      ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
