"""Plots as SVG files that are the same for the same numbers, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of `rows` times `columns` panels of `size` (inches), and its axes `[rows, columns]`."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kivi"
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(columns * size[0], rows * size[1]), squeeze=False, **options)


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
