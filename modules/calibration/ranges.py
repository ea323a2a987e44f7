"""What was calibrated, for people: a table of the layers and a plot of every channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
import torch

from modules.codecs.static import StaticParameters
from modules.evaluation.plots import panels, save
from modules.evaluation.tables import plain

SIDES = ("keys", "values")


def reach(parameters: StaticParameters, side: int) -> dict[int, torch.Tensor]:
    """The largest magnitude of each channel, float32 `[H, D]`, by layer; of the keys (0) or the values (1)."""
    bounds = {layer: ranges[2 * side : 2 * side + 2] for layer, ranges in parameters.ranges.items()}
    return {layer: torch.maximum(low.abs(), high.abs()) for layer, (low, high) in bounds.items()}


def range_rows(parameters: StaticParameters) -> list[dict[str, Any]]:
    """For each layer the lowest and highest state, and the reach of its widest channel as a multiple of the median's."""
    reaches = [reach(parameters, side) for side in range(2)]
    rows = []
    for layer, ranges in parameters.ranges.items():
        row: dict[str, Any] = {"layer": layer}
        for side, name in enumerate(SIDES):
            low, high = ranges[2 * side : 2 * side + 2]
            widest = reaches[side][layer]
            row |= {
                f"{name} from": low.min().item(),
                f"{name} to": high.max().item(),
                f"{name}, widest / median": (widest.max() / widest.median().clamp_min(1e-12)).item(),
            }
        rows.append(row)
    return rows


def range_table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """`range_rows` as a table of text."""
    return pandas.DataFrame(rows, dtype=object).map(plain)


def draw_ranges(models: Mapping[str, StaticParameters], path: Path) -> None:
    """The reach of each channel in each layer as a map, keys on the left and values on the right, a row for each model."""
    from matplotlib.colors import LogNorm

    figure, axes = panels(len(models), 2, (5.6, 3.2), layout="constrained")
    figure.set_facecolor("white")  # whatever is around it
    for row, (name, parameters) in zip(axes, models.items()):
        sides = [reach(parameters, side) for side in range(2)]
        maps = [torch.stack([channels.flatten() for channels in side.values()]) for side in sides]
        both = torch.cat([channels.flatten() for channels in maps]).clamp_min(1e-6)
        norm = LogNorm(both.quantile(0.01).item(), both.max().item())
        for axis, side, channels in zip(row, SIDES, maps):
            image = axis.imshow(channels.numpy(), norm=norm, cmap="magma", aspect="auto", interpolation="nearest")
            layers, head_dim = list(parameters.ranges), parameters.model["head_dim"]
            ticks = range(0, len(layers), max(1, len(layers) // 6))
            axis.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
            for head in range(1, channels.shape[1] // head_dim):
                axis.axvline(head * head_dim - 0.5, color="white", linewidth=0.6)
            axis.set(title=f"{name}: {side}", xlabel="channel, head by head", ylabel="layer")
        figure.colorbar(image, ax=list(row), label="largest magnitude")
    save(figure, path)
