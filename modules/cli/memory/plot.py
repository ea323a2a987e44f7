"""The bytes of caches against tokens, as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules.evaluation.plots import panels, save

FORMATS = (".svg", ".png", ".pdf")


def write_plot(result: dict[str, Any], path: str) -> None:
    """Draw the rows of `modules.cli.memory.run.figures`: a line a pair of bits, float16, and what a GPU has room for."""
    figure, axes = panels(1, 1, (6.4, 4.4))
    axis, rows = axes[0, 0], result["rows"]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault("float16", []).append((row["tokens"], row["float16_bytes"] / 1e9))
        sides = "keys {k_bits}, values {v_bits} bits".format(**row)
        lines.setdefault(sides if len(sides) < 40 else "bits of each layer", []).append(
            (row["tokens"], row["stored"]["bytes"] / 1e9)
        )
    for name, points in lines.items():
        axis.plot(*zip(*sorted(set(points))), marker="o", label=name, color="0.4" if name == "float16" else None)
    if "gpu" in result:
        axis.axhline(result["gpu"]["room_bytes"] / 1e9, linestyle="--", color="0.4")
        axis.annotate(
            f"beside the weights in {result['gpu']['memory']}",
            (min(row["tokens"] for row in rows), result["gpu"]["room_bytes"] / 1e9),
            va="bottom",
        )
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="cache, GB", title=result["model"])
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axis.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    save(figure, Path(path))
