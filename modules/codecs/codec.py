"""What a codec is: how the keys or the values of a layer become the bytes that are kept, and states again."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Part(NamedTuple):
    """One of the tensors in which packed tokens lie: `[B, H, tokens / every, width]`."""

    width: int
    dtype: torch.dtype
    every: int = 1  # tokens that share a row


class Packed(NamedTuple):
    """Packed tokens, part by part: `codes` `[..., T, width]` and what belongs to them, None where a codec has no such part.

    At 2, 4 and 8 bits codes are uint8 `[..., T, D*bits/8]`; `scale` and `minimum` float16, `[..., T/G, D]` for keys and
    `[..., T, D/G]` for values; `extra` uint8 `[..., T, W/4]`, the low two bits of the first `W` channels of 2-bit keys,
    four neighbours a byte.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    extra: torch.Tensor | None = None


class Codec(Protocol):
    """How one side of a layer is stored.

    Attributes:
        bits: of a code; 16 where there are none.
        group_size: tokens (keys) or channels (values) that share metadata.
        wide: channels of a head that come first in an order of its own, 0 where channels lie as they are.
        limit: the largest magnitude that can be stored.
        method: how the range of a group is found.
        layout: what its bytes mean; a backend attends over those that it knows.
    """

    bits: int
    group_size: int
    wide: int
    limit: float
    method: str
    layout: str

    def parts(self, head_dim: int, dtype: torch.dtype) -> dict[str, Part]:
        """The tensors it needs, by the names of `Packed`, for states of `dtype`."""

    def encode(self, states: torch.Tensor, order: torch.Tensor | None) -> Packed:
        """Whole groups of states `[b, H, T, D]`; `order`, int64 `[b, H, D]`, says how their channels are to lie."""

    def decode(self, packed: Packed, order: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The states `[b, H, T, D]` of whole groups, dequantized, in `dtype`."""
