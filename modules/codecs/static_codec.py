"""Static INT8 as a codec: a side whose states are in code space from the moment they come, an int8 a channel.

Nothing is kept in full precision and nothing beside the codes, as the scales are the model's. Attention folds them:
`q·k = (q∘scale)·code + q·offset`, whose second part is the same for all tokens and drops out of the softmax, and
`Σ p v = scale∘(Σ p·code) + offset`, as the weights `p` add up to one.
"""

from __future__ import annotations

import dataclasses

import torch

from modules.codecs.codec import Packed, Part
from modules.codecs.static import ChannelScales

STATIC = "static"


@dataclasses.dataclass(frozen=True, eq=False)
class StaticCodec:
    """Codes as they are: what it encodes and decodes are whole numbers, which `scales` make of states.

    Attributes:
        scales: of this side, on the device of the states.
    """

    scales: ChannelScales
    group_size: int = 1
    bits: int = 8
    wide: int = 0
    rotary: int = 0
    limit: float = torch.finfo(torch.float32).max
    method: str = "none"
    layout: str = STATIC

    def parts(self, head_dim: int, dtype: torch.dtype) -> dict[str, Part]:
        """Codes alone."""
        return {"codes": Part(head_dim, torch.int8)}

    def encode(self, states: torch.Tensor, order: torch.Tensor | None) -> Packed:
        """Whole numbers `[b, H, T, D]` of any dtype as int8."""
        return Packed(states.to(torch.int8))

    def decode(self, packed: Packed, order: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The whole numbers `[b, H, T, D]`, in code space still; bfloat16 holds them exactly."""
        return packed.codes.to(dtype)
