"""Draw the pictures of docs/method.md that show no measurement: python docs/site/drawings.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

from modules.evaluation.plots import panels, save  # noqa: E402
from modules.store.ledger import Geometry  # noqa: E402

INK, SOFT = "#1f2328", "#6e7781"
SINKS, PACKED, WINDOW = "#f6c26b", "#7aa7f0", "#9fd8a4"
GROUP, TOKENS, CHANNELS = 4, 12, 16  # of the small example that is drawn
EDGE: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.8}


def states(outliers: dict[int, float]) -> numpy.ndarray:
    """Made-up states `[TOKENS, CHANNELS]`: some channels are far from zero at every token, as in real keys."""
    drawn = numpy.random.default_rng(0).normal(0, 1, (TOKENS, CHANNELS))
    for channel, offset in outliers.items():
        drawn[:, channel] += offset
    return drawn


def groups(path: Path) -> None:
    """Which keys, and which values, share a scale and a minimum."""
    figure, axes = panels(1, 2, (4.6, 3.6))
    sides = (
        ("keys: a channel over a group of tokens", states({2: 5, 9: -6, 13: 4}), (9, 4), (1, GROUP)),
        ("values: a token over a group of channels", states({}), (4, 5), (2 * GROUP, 1)),
    )
    for axis, (title, drawn, corner, size) in zip(axes[0], sides):
        axis.imshow(drawn, cmap="RdBu", vmin=-7, vmax=7, aspect="auto")
        width, height = size
        for left in range(0, CHANNELS, width):
            for top in range(0, TOKENS, height):
                axis.add_patch(
                    Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=SOFT, linewidth=0.4)
                )
        axis.add_patch(
            Rectangle((corner[0] - 0.5 - corner[0] % width, corner[1] - 0.5), *size, fill=False, ec=INK, lw=2.5)
        )
        axis.set_title(title, fontsize=10, color=INK)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel("channels of a head", color=INK)
        axis.set_ylabel("tokens", color=INK)
    figure.text(0.5, 0.02, "one frame, one scale and one minimum", ha="center", fontsize=9, color=SOFT)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save(figure, path)


def strip(axis: Any, y: float, parts: list[tuple[str, int, str]], unit: float, height: float = 0.8) -> list[float]:
    """Boxes side by side, `unit` wide for each token, with a name in each; where each begins, and the end."""
    left, edges = 0.0, [0.0]
    for name, count, color in parts:
        width = count * unit
        axis.add_patch(Rectangle((left, y), width, height, facecolor=color, **EDGE))
        axis.text(left + width / 2, y + height / 2, name, ha="center", va="center", fontsize=8, color=INK)
        left += width
        edges.append(left)
    return edges


def sequence(path: Path) -> None:
    """Where the tokens of a sequence lie, before and after the token that fills a group."""
    figure, axes = panels(1, 1, (9.2, 3.0))
    axis, geometry = axes[0][0], Geometry(group_size=32, residual_length=128, sink_length=4)
    unit = 0.05
    for y, length in ((2.2, 227), (0.5, 228)):
        packed = geometry.packed_after(length, 0)
        window = length - geometry.sink_length - packed
        groups_packed = packed // geometry.group_size
        parts = [("", geometry.sink_length, SINKS), *[("32", geometry.group_size, PACKED)] * groups_packed]
        parts += [(f"window: {window} tokens, full precision", window, WINDOW)]
        edges = strip(axis, y, parts, unit)
        axis.text(0, y + 0.95, f"after {length} tokens", fontsize=9, color=INK)
    axis.text(0, 0.2, "4 sinks", fontsize=8, color=SOFT, va="top")
    axis.text(edges[1] + 0.9, 0.2, "packed codes, a group of 32 tokens at a time", fontsize=8, color=SOFT, va="top")
    begin = unit * (geometry.sink_length + geometry.packed_after(227, 0) + 16)
    axis.add_patch(FancyArrowPatch((begin, 2.15), (begin, 1.35), arrowstyle="-|>", mutation_scale=12, color=INK))
    axis.text(begin + 0.15, 1.72, "the oldest group of the window is packed", fontsize=8, color=INK, va="center")
    axis.set_xlim(-0.1, edges[-1] + 0.1)
    axis.set_ylim(-0.2, 3.5)
    axis.axis("off")
    figure.tight_layout()
    save(figure, path)


PICTURES = {"method-groups.svg": groups, "method-sequence.svg": sequence}


def main(folder: Path) -> None:
    """Every picture into a folder."""
    for name, draw in PICTURES.items():
        draw(folder / name)
        print(f"written: {folder / name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
