"""States kept as they are: a side at 16 bits."""

from __future__ import annotations

import dataclasses

import torch

from modules.codecs.codec import Packed, Part

FULL_PRECISION = "full precision"


@dataclasses.dataclass(frozen=True)
class FullPrecisionCodec:
    """Keeps states in the model's dtype."""

    group_size: int
    bits: int = 16
    wide: int = 0
    rotary: int = 0
    limit: float = torch.finfo(torch.float32).max
    method: str = "none"
    layout: str = FULL_PRECISION

    def parts(self, head_dim: int, dtype: torch.dtype) -> dict[str, Part]:
        """Codes that are the states."""
        return {"codes": Part(head_dim, dtype)}

    def encode(self, states: torch.Tensor, order: torch.Tensor | None) -> Packed:
        """The states."""
        return Packed(states)

    def decode(self, packed: Packed, order: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The states."""
        return packed.codes.to(dtype)
