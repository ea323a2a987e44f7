"""The backend "torch"."""

from __future__ import annotations

import torch

from modules.kernels.backend import Backend
from modules.kernels.reference import attention, rebuilt
from modules.store.layer import PackedLayer
from modules.store.step import Step

MANY_TOKENS = 32  # new ones that are worth rebuilding the past for, on a CPU


class TorchBackend(Backend):
    """Plain torch: any device, any layout."""

    name = "torch"

    def why_not(self, layer: PackedLayer) -> str | None:
        """Nothing does."""
        return None

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
        way = rebuilt if query.device.type == "cpu" and query.shape[2] >= MANY_TOKENS else attention
        return way.attend(query, key, value, layer, scaling, step)


BACKEND = TorchBackend()
