"""What of a layer is alive, as flat tensors: sequence after sequence, without room to grow. And a layer filled from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from modules.codecs.codec import Packed
from modules.store.layer import PackedLayer
from modules.store.ledger import Ledger
from modules.store.side import PackedSide

Tensors = Callable[[str], torch.Tensor]
_BY_SEQUENCE = ("order", "query_energy")  # of these sequences are the first dimension


@dataclasses.dataclass(frozen=True)
class Extent:
    """What is alive of one sequence, in tokens.

    Attributes:
        sinks, packed: how many.
        first: the oldest token that the window holds, counted behind the sinks: packed ones too, as long as no later token
            has taken their slots, so that taking tokens back is as exact as it was.
        window: tokens from there on.
    """

    sinks: int
    packed: int
    first: int
    window: int


def extents(ledger: Ledger) -> list[Extent]:
    """What is alive of each sequence."""
    sink_length = ledger.geometry.sink_length
    return [
        Extent(min(length, sink_length), packed, first, max(0, length - sink_length - first))
        for length, packed, first in zip(ledger.lengths, ledger.packed, ledger.held_from())
    ]


def live_tensors(layer: PackedLayer) -> dict[str, torch.Tensor]:
    """The tensors of a layer, on the CPU and contiguous, by a dotted name.

    Of each side: the packed parts `[H, Σ packed tokens / every, width]`, `sinks` and `window` `[H, Σ tokens, D]`, `order` as
    it is. Of the queries: `query_energy` as it is, and `newest_energy`
    `[n, B, H, D]` with `newest_tokens` `[n]`.
    """
    tensors = live_of_rows(layer, range(layer.batch_size))
    if layer.newest_energy:
        tokens, squares = zip(*layer.newest_energy)
        tensors |= {"newest_tokens": torch.tensor(tokens), "newest_energy": torch.stack(squares)}
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def live_of_rows(layer: PackedLayer, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """`live_tensors` of the sequences `rows`, on the device of the layer and without the newest queries."""
    tensors: dict[str, torch.Tensor] = {}
    for name, side in _named_sides(layer):
        tensors |= {f"{name}.{part}": t for part, t in _live_of_side(side, layer, rows).items()}
    if layer.query_energy is not None:
        tensors["query_energy"] = layer.query_energy[list(rows)]
    return tensors


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `live_of_rows` gave of several layers, as of one layer with all of the sequences."""
    return {
        name: torch.cat([part[name] for part in parts], dim=0 if name.endswith(_BY_SEQUENCE) else 1)
        for name in parts[0]
    }


def fill(layer: PackedLayer, names: set[str], tensor: Tensors) -> None:
    """Put what `live_tensors` gave into a layer without tokens whose ledger says what there is.

    Raises:
        ValueError: for tensors that do not fit the layer, and for floats beyond its dtype.
    """
    layer.room_for(max(layer.packed, default=0))
    expected = set()
    for name, side in _named_sides(layer):
        expected |= {f"{name}.{part}" for part in _fill_side(side, layer, _within(tensor, name))}
    device = layer.key.window.device
    if layer.query_energy is not None:
        expected.add("query_energy")
        layer.query_energy = _fitting("query_energy", tensor("query_energy"), layer.query_energy).to(device, copy=True)
    if "newest_tokens" in names:
        expected |= {"newest_tokens", "newest_energy"}
        squares = tensor("newest_energy").to(device, copy=True)
        layer.newest_energy = list(zip(tensor("newest_tokens").tolist(), squares))
    if names != expected:
        raise ValueError(f"the layer has the tensors {sorted(expected)}; got {sorted(names)}.")


def _within(tensor: Tensors, prefix: str) -> Tensors:
    return lambda name: tensor(f"{prefix}.{name}")


def _named_sides(layer: PackedLayer) -> Iterator[tuple[str, PackedSide]]:
    return zip(("key", "value"), layer.sides)


def _live_of_side(side: PackedSide, layer: PackedLayer, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    geometry, alive = layer.ledger.geometry, extents(layer.ledger)
    spans = [(row, alive[row]) for row in rows]
    tensors = {}
    for name, part in side.parts.items():
        stored = getattr(side, name)
        tensors[name] = torch.cat([stored[row, :, : span.packed // part.every] for row, span in spans], dim=1)
    tensors["sinks"] = torch.cat([side.sinks[row, :, : span.sinks] for row, span in spans], dim=1)
    slots = [
        side.window[row, :, slot]
        for row, span in spans
        for slot in geometry.window_slots(layer.lengths[row], span.first)
    ]
    tensors["window"] = torch.cat(slots or [side.window[0, :, :0]], dim=1)
    if side.order is not None:
        tensors["order"] = side.order[list(rows)]
    return tensors


def _fill_side(side: PackedSide, layer: PackedLayer, tensor: Tensors) -> list[str]:
    """Fill a side; the names of the tensors that it took."""
    spans = extents(layer.ledger)
    heads, head_dim = side.window.shape[1], side.window.shape[3]

    def read(name: str, rows: list[int], width: int, like: torch.Tensor) -> Iterator[torch.Tensor]:
        """A flat tensor, cut by sequences: `[1, H, rows[b], width]` each."""
        flat = tensor(name)
        if tuple(flat.shape) != (heads, sum(rows), width):
            raise ValueError(
                f"{side.what}, {name}: expected the shape {(heads, sum(rows), width)}; got {tuple(flat.shape)}."
            )
        return iter(converted(name, flat, like.dtype)[None].split(rows, dim=2))

    packed = {
        name: list(read(name, [span.packed // part.every for span in spans], part.width, getattr(side, name)))
        for name, part in side.parts.items()
    }
    sinks = read("sinks", [span.sinks for span in spans], head_dim, side.sinks)
    window = read("window", [span.window for span in spans], head_dim, side.window)
    for row, span in enumerate(spans):
        rows = slice(row, row + 1)
        side.write(rows, 0, Packed(**{name: parts[row] for name, parts in packed.items()}))
        side.sinks[rows, :, : span.sinks] = next(sinks)
        side.write_window(rows, span.first, next(window))
    taken = [*side.parts, "sinks", "window"]
    if side.order is not None:
        taken.append("order")
        side.order.copy_(_fitting("order", tensor("order"), side.order))
    return taken


def _fitting(name: str, given: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if given.shape != like.shape or given.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected {like.dtype} of the shape {tuple(like.shape)}; got {given.dtype} of {tuple(given.shape)}."
        )
    return given


def converted(name: str, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """States in another floating dtype: exact where that is wider, else rounded as a model of that dtype would have.

    Raises:
        ValueError: for codes of another dtype, and where `dtype` cannot say a state.
    """
    if states.dtype == dtype:
        return states
    if not (states.dtype.is_floating_point and dtype.is_floating_point):
        raise ValueError(f"{name}: expected {dtype}; got {states.dtype}.")
    converted = states.to(dtype)
    if not bool((converted.isfinite() == states.isfinite()).all()):
        raise ValueError(
            f"{name} reach {states.abs().max().item():.5g}, beyond {dtype}; load in {states.dtype}, in which they were saved, or in "
            "bfloat16."
        )
    return converted
