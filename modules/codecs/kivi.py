"""KIVI's codec: grouped codes, keys per channel and values per token (arXiv 2402.02750), some channels of which are wide."""

from __future__ import annotations

import dataclasses

import torch

from modules.codecs.codec import Codec, Packed, Part
from modules.codecs.full_precision import FullPrecisionCodec
from modules.codecs.grouped import (
    FLOAT16_MAX,
    dequantize_keys,
    dequantize_values,
    dequantize_wide_keys,
    place_channels,
    quantize_keys,
    quantize_values,
)
from modules.codecs.metadata import EIGHT_BIT_KEYS, EIGHT_BIT_VALUES, FLOAT16, Metadata
from modules.options import FULL_PRECISION_BITS, KIVIOptions

GROUPED = "grouped"
EIGHT_BIT_METADATA = "grouped, metadata of 8 bits"


@dataclasses.dataclass(frozen=True)
class KeyCodec:
    """Keys: a scale and a minimum a channel and group of tokens; `wide` channels have two bits more than the others.

    The first `rotary` channels of a head are rotated by position, in pairs: wide are both of a pair or neither.
    """

    bits: int
    group_size: int
    method: str
    wide: int = 0
    limit: float = FLOAT16_MAX
    metadata: Metadata = FLOAT16
    rotary: int = 0

    @property
    def layout(self) -> str:
        """See `Codec.layout`."""
        return GROUPED if self.metadata.exact else EIGHT_BIT_METADATA

    def parts(self, head_dim: int, dtype: torch.dtype) -> dict[str, Part]:
        """Codes, metadata a group of tokens and, with wide channels, their low bits."""
        scale, minimum = (Part(head_dim, t, self.group_size) for t in (self.metadata.scale, self.metadata.minimum))
        parts = {"codes": Part(head_dim * self.bits // 8, torch.uint8), "scale": scale, "minimum": minimum}
        return parts | ({"extra": Part(self.wide // 4, torch.uint8)} if self.wide else {})

    def encode(self, states: torch.Tensor, order: torch.Tensor | None) -> Packed:
        """Codes of whole groups `[b, H, T, D]`, channels in `order`."""
        if order is None:
            return quantize_keys(states, self.bits, self.group_size, self.method, self.metadata)
        placed = place_channels(states, order)
        return quantize_keys(placed, self.bits, self.group_size, self.method, self.metadata, self.wide)

    def decode(self, packed: Packed, order: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The keys `[b, H, T, D]`, channels as the model has them."""
        if order is None:
            return dequantize_keys(packed, self.bits, self.group_size, dtype)
        return dequantize_wide_keys(packed, self.bits, order, self.group_size).to(dtype)


@dataclasses.dataclass(frozen=True)
class ValueCodec:
    """Values: a scale and a minimum a token and group of channels."""

    bits: int
    group_size: int
    method: str
    wide: int = 0
    limit: float = FLOAT16_MAX
    metadata: Metadata = FLOAT16
    rotary: int = 0

    @property
    def layout(self) -> str:
        """See `Codec.layout`."""
        return GROUPED if self.metadata.exact else EIGHT_BIT_METADATA

    def parts(self, head_dim: int, dtype: torch.dtype) -> dict[str, Part]:
        """Codes and metadata a token."""
        groups = head_dim // self.group_size
        scale, minimum = (Part(groups, t) for t in (self.metadata.scale, self.metadata.minimum))
        return {"codes": Part(head_dim * self.bits // 8, torch.uint8), "scale": scale, "minimum": minimum}

    def encode(self, states: torch.Tensor, order: torch.Tensor | None) -> Packed:
        """Codes of values `[b, H, T, D]`."""
        return quantize_values(states, self.bits, self.group_size, self.method, self.metadata)

    def decode(self, packed: Packed, order: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The values `[b, H, T, D]`, as they were given: rotated, if they were."""
        return dequantize_values(packed, self.bits, self.group_size, dtype)


def codecs_of(options: KIVIOptions, bits: tuple[int, int], head_dim: int, rotary: int = 0) -> tuple[Codec, Codec]:
    """The codecs of a layer's keys and values at `bits`; `rotary` is that of `KeyCodec`."""
    metadata = tuple(
        small if count == 8 else FLOAT16
        for small, count in zip((EIGHT_BIT_KEYS, EIGHT_BIT_VALUES), options.metadata_of(*bits))
    )
    key: Codec = FullPrecisionCodec(options.group_size)
    value: Codec = FullPrecisionCodec(options.value_group_size(bits[1], head_dim))
    if bits[0] != FULL_PRECISION_BITS:
        wide = options.wide_count(bits[0], head_dim)
        key = KeyCodec(bits[0], options.group_size, options.k_range, wide, metadata=metadata[0], rotary=rotary)
    if bits[1] != FULL_PRECISION_BITS:
        value = ValueCodec(bits[1], value.group_size, options.value_range(bits[1]), metadata=metadata[1])
    return key, value
