"""The backend "numba": compiled attention and packing on the CPU."""

from __future__ import annotations

import torch

from modules.kernels.backend import Backend
from modules.kernels.numba import attention, packing
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step


class NumbaBackend(Backend):
    """Vectorized kernels for float32, bfloat16 and float16 on any CPU."""

    name = "numba"

    def why_not(self, layer: PackedLayer) -> str | None:
        """See `Backend.why_not`."""
        return attention.why_not(layer)

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

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer, scaling: float
    ) -> torch.Tensor | None:
        """See `Backend.decode`."""
        return attention.decode(query, key, value, layer, scaling)

    def pack(self, side: PackedSide, sequences: slice, start: int, states: torch.Tensor) -> None:
        """See `Backend.pack`."""
        packing.pack(side, sequences, start, states)


BACKEND = NumbaBackend()
