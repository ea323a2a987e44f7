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

    At 2, 4 and 8 bits codes are uint8 `[..., T, D*bits/8]`; `scale` and `minimum` `[..., T/G, D]` for keys and
    `[..., T, D/G]` for values, in the dtypes of `modules.codecs.metadata.Metadata`; `extra` uint8 `[..., T, W/4]`, the low two bits of keys' first
    `W` channels, four neighbours a byte.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    extra: torch.Tensor | None = None

    @property
    def metadata(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum as they are stored; `ValueError` where the codec has none."""
        if self.scale is None or self.minimum is None:
            raise ValueError(
                "these tokens are packed without scale and minimum; read `codes` as their codec wrote them."
            )
        return self.scale, self.minimum


class Codec(Protocol):
    """How one side of a layer is stored."""

    @property
    def bits(self) -> int:
        """Of a code; 16 where there are none."""

    @property
    def group_size(self) -> int:
        """Tokens (keys) or channels (values) that share metadata."""

    @property
    def wide(self) -> int:
        """Channels of a head that come first in an order of its own, 0 where channels lie as they are."""

    @property
    def rotary(self) -> int:
        """The first channels of a head, which positions rotate in pairs; 0 where that does not matter."""

    @property
    def limit(self) -> float:
        """The largest magnitude that can be stored."""

    @property
    def method(self) -> str:
        """How the range of a group is found."""

    @property
    def layout(self) -> str:
        """What its bytes mean; a backend attends over those that it knows."""

    def parts(self, head_dim: int, dtype: torch.dtype) -> dict[str, Part]:
        """The tensors it needs, by the names of `Packed`, for states of `dtype`."""

    def encode(self, states: torch.Tensor, order: torch.Tensor | None) -> Packed:
        """Whole groups of states `[b, H, T, D]`; `order`, int64 `[b, H, D]`, says how their channels are to lie."""

    def decode(self, packed: Packed, order: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The states `[b, H, T, D]` of whole groups, dequantized, in `dtype`."""
