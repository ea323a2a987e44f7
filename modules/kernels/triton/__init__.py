"""The backend "triton": attention, appending and packing on a GPU."""

from __future__ import annotations

import torch

from modules.kernels.backend import Backend
from modules.kernels.triton import append, attention, checks, pack
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step


class TritonBackend(Backend):
    """Kernels that read the codes as they lie and the lengths from the device; a step of one token waits for nothing."""

    name = "triton"

    def why_not(self, layer: PackedLayer) -> str | None:
        """See `Backend.why_not`."""
        return checks.why_not(layer)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: PackedLayer,
        scaling: float,
        step: Step,
    ) -> torch.Tensor:
        """See `Backend.attend`."""
        return attention.attend(query, key, value, layer, scaling, step)

    def append(self, layer: PackedLayer, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """See `Backend.append`."""
        if not append.append_token(layer, key, value, step):
            super().append(layer, key, value, step)

    def pack(self, side: PackedSide, sequences: slice, start: int, states: torch.Tensor) -> None:
        """See `Backend.pack`."""
        if not side.grouped:
            return super().pack(side, sequences, start, states)
        pack.pack_groups(side, sequences, start, states)


BACKEND = TritonBackend()
