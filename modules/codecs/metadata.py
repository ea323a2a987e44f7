"""How scales and minima are stored: as float16, or in fewer bits where that costs next to nothing.

With 8 bits a scale is a float16 without a sign and with 3 bits of mantissa of its 10: at most 6 % off, which a fit of the
minimum around the middle of the group makes up for. The minimum of a group of values is a multiple of its scale, since
values lie about zero; that of keys stays float16, as a channel may lie far from zero for its range.
"""

from __future__ import annotations

import dataclasses

import torch

from modules.codecs.codec import Packed

SCALE_SHIFT = 7  # bits of a float16's mantissa that an 8-bit scale leaves out
LARGEST_SCALE = 0xF7  # the last 8-bit scale that is finite
LARGEST_MINIMUM = 127
Numbers = tuple[torch.Tensor, torch.Tensor]


def minimum_unit(bits: int) -> float:
    """What 8-bit minima of codes of `bits` count: this many scales, a 48th to a 64th of the group's range."""
    return 2.0 ** (bits - 6)


def scale_codes(scale: torch.Tensor) -> torch.Tensor:
    """The 8-bit scales next to `scale`, float of no sign; uint8."""
    bits = scale.to(torch.float16).view(torch.int16).to(torch.int32)
    return ((bits + (1 << SCALE_SHIFT - 1)) >> SCALE_SHIFT).clamp_(0, LARGEST_SCALE).to(torch.uint8)


def scales_of(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_codes`, float32."""
    return (codes.to(torch.int16) << SCALE_SHIFT).view(torch.float16).float()


def numbers_of(packed: Packed, bits: int) -> Numbers:
    """Scale and minimum of packed groups with codes of `bits`, float32, as they are meant."""
    scale, minimum = packed.metadata
    scale = scales_of(scale) if scale.dtype == torch.uint8 else scale.float()
    return scale, minimum * scale * minimum_unit(bits) if minimum.dtype == torch.int8 else minimum.float()


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The way in which one side stores its metadata.

    Attributes:
        scale, minimum: dtypes: both float16; or uint8, and float16 (keys) or int8 (values).
    """

    scale: torch.dtype = torch.float16
    minimum: torch.dtype = torch.float16

    @property
    def exact(self) -> bool:
        """Both are float16."""
        return self.scale == torch.float16

    def stored(self, scale: torch.Tensor, minimum: torch.Tensor, bits: int) -> Numbers:
        """Both, float32, as they will be read; a scale that is rounded moves the minimum, so that the middle stays.

        A minimum too large for 8 bits makes the scale larger: what is stored gets coarser, never wrong.
        """
        if self.exact:
            return scale.to(torch.float16).float(), minimum.to(torch.float16).float()
        rounded, unit = scales_of(scale_codes(scale)), minimum_unit(bits)
        moved = minimum + (scale - rounded) * ((1 << bits) - 1) / 2
        if self.minimum == torch.float16:
            return rounded, moved.to(torch.float16).float()
        needed = minimum.abs() / (LARGEST_MINIMUM * unit)
        above = (scale_codes(needed) + 1).clamp_(max=LARGEST_SCALE)  # the next one, which is never too small
        far = needed > rounded
        rounded = torch.where(far, scales_of(above), rounded)
        return rounded, self._codes(rounded, torch.where(far, minimum, moved), unit) * rounded * unit

    def pack(self, scale: torch.Tensor, minimum: torch.Tensor, bits: int) -> Numbers:
        """What `stored` gave, in the dtypes that are kept."""
        if self.exact:
            return scale.to(torch.float16), minimum.to(torch.float16)
        if self.minimum == torch.float16:
            return scale_codes(scale), minimum.to(torch.float16)
        return scale_codes(scale), self._codes(scale, minimum, minimum_unit(bits)).to(torch.int8)

    @staticmethod
    def _codes(scale: torch.Tensor, minimum: torch.Tensor, unit: float) -> torch.Tensor:
        safe = torch.where(scale > 0, scale, torch.ones_like(scale)) * unit
        return (minimum / safe).round_().clamp_(-LARGEST_MINIMUM, LARGEST_MINIMUM)


FLOAT16 = Metadata()
EIGHT_BIT_KEYS = Metadata(torch.uint8, torch.float16)
EIGHT_BIT_VALUES = Metadata(torch.uint8, torch.int8)
