"""Storing new tokens, in plain torch."""

from __future__ import annotations

from typing import Protocol

import torch

from modules.store.layer import PackedLayer
from modules.store.side import PackedSide


class Packer(Protocol):
    """What packs groups."""

    def pack(self, side: PackedSide, sequences: slice, start: int, states: torch.Tensor) -> None:
        """See `modules.kernels.backend.Backend.pack`."""


def append_sequences(
    packer: Packer, layer: PackedLayer, sequences: slice, key: torch.Tensor, value: torch.Tensor
) -> None:
    """New tokens `[b, H, n, D]` of equally long sequences into sinks and window, and full groups through `packer`."""
    sequence, count, geometry = sequences.start or 0, key.shape[2], layer.ledger.geometry
    length, packed = layer.lengths[sequence], layer.packed[sequence]
    packed_after = geometry.packed_after(length + count, packed)
    slots = layer.window_slots(sequence)
    for side, new in zip(layer.sides, (key, value)):
        to_sinks = min(count, max(0, layer.sink_length - length))
        if to_sinks:
            side.sinks[sequences, :, length : length + to_sinks] = new[:, :, :to_sinks]
        rest = new[:, :, to_sinks:]
        stored = length + to_sinks - layer.sink_length  # tokens after the sinks, before `rest`
        if packed_after > packed:
            from_new = max(0, packed_after - stored)
            parts = [side.window[sequences, :, slot] for slot in slots] + [rest[:, :, :from_new]]
            groups = (torch.cat(parts, dim=2) if slots else parts[-1])[:, :, : packed_after - packed]
            if side is layer.key and not packed:
                layer.choose_wide(sequences, groups)
            packer.pack(side, sequences, packed, groups)
        first = max(0, packed_after - geometry.draft_room - stored)  # earlier ones of `rest` are packed and stay so
        side.write_window(sequences, stored + first, rest[:, :, first:])
