"""Scales and minima as they are stored: as float16, or in 8 bits, with the arithmetic of `modules.codecs.metadata`.

`METADATA` says which, see `modules.kernels.triton.launch.PackTile`: "float16"; "8-bit keys", with scales of 8 bits; or
"8-bit values", with minima of 8 bits too, which count scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modules.codecs import metadata
from modules.kernels.triton.rounding import quotient, reciprocal, round_within

_SHIFT = tl.constexpr(metadata.SCALE_SHIFT)
_HALF = tl.constexpr(1 << metadata.SCALE_SHIFT - 1)
_LARGEST_SCALE = tl.constexpr(metadata.LARGEST_SCALE)
_LARGEST_MINIMUM = tl.constexpr(metadata.LARGEST_MINIMUM)
SMALL_MINIMUM = tl.constexpr(2.0)  # what 8-bit minima are divided by as operands
minimum_unit = triton.constexpr_function(metadata.minimum_unit)


@triton.constexpr_function
def _scales_asm():
    """One byte of each of two words into the bits of two float16 of one register; the selectors have zeros for the rest."""
    low, high = 1 << _SHIFT.value, 1 << 16 + _SHIFT.value
    return (
        "{ .reg .b32 low, high; prmt.b32 low, $1, 0, $3; prmt.b32 high, $2, 0, $4; "
        f"mul.lo.u32 low, low, {low}; mad.lo.u32 $0, high, {high}, low; }}"
    )


@triton.jit
def scales_of_words(words, byte, ASM: tl.constexpr):
    """8-bit scales, float16, each the `byte` of a word, int32."""
    if ASM:
        selector = tl.broadcast_to(byte + 0x4440, words.shape)
        return tl.inline_asm_elementwise(
            _scales_asm(), "=r,r,r,r,r", [words, selector], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return (((words >> (8 * byte)) & 0xFF) << _SHIFT).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def scale_of_words(words, GROUP: tl.constexpr, PER_WORD: tl.constexpr, SMALL: tl.constexpr):
    """Scale `GROUP` of a row, float16, that are read as integers of `PER_WORD`."""
    if SMALL:
        code = (words[GROUP // PER_WORD] >> (8 * (GROUP % PER_WORD))).to(tl.int16) & 0xFF
        return (code << _SHIFT).to(tl.float16, bitcast=True)
    else:
        return (words[GROUP // PER_WORD] >> (16 * (GROUP % PER_WORD))).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def minimum_of_words(words, scale, GROUP: tl.constexpr, PER_WORD: tl.constexpr, BITS: tl.constexpr):
    """8-bit minimum `GROUP` of a row, likewise, over `SMALL_MINIMUM`, without which the largest would not be float16; exact."""
    UNIT: tl.constexpr = minimum_unit(BITS) / SMALL_MINIMUM
    code = (words[GROUP // PER_WORD] >> (8 * (GROUP % PER_WORD))).to(tl.int8)
    return code.to(tl.float16) * UNIT * scale


@triton.jit
def _as_float16(x):
    """`x` as float16 will give it back."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _scale_codes(scale):
    """The codes, int32, next to float32 scales."""
    bits = scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return tl.minimum(tl.maximum((bits + _HALF) >> _SHIFT, 0), _LARGEST_SCALE)


@triton.jit
def _scales_of(codes):
    """The inverse, float32."""
    return (codes << _SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _minimum_codes(scale, minimum, BITS: tl.constexpr):
    """What the minima of values count, whole numbers as float32."""
    UNIT: tl.constexpr = minimum_unit(BITS)
    unit = tl.where(scale > 0.0, scale, 1.0) * UNIT
    return round_within(quotient(minimum, unit, reciprocal(unit)), -_LARGEST_MINIMUM, _LARGEST_MINIMUM)


@triton.jit
def stored(scale, minimum, BITS: tl.constexpr, METADATA: tl.constexpr):
    """`modules.codecs.metadata.Metadata.stored`: both, float32, as they will be read."""
    if METADATA == "float16":
        return _as_float16(scale), _as_float16(minimum)
    else:
        UNIT: tl.constexpr = minimum_unit(BITS)
        rounded = _scales_of(_scale_codes(scale))
        moved = minimum + (scale - rounded) * (((1 << BITS) - 1) / 2)
        if METADATA == "8-bit keys":
            return rounded, _as_float16(moved)
        else:
            reach = tl.full(scale.shape, _LARGEST_MINIMUM * UNIT, tl.float32)
            needed = quotient(tl.abs(minimum), reach, reciprocal(reach))
            above = tl.minimum(_scale_codes(needed) + 1, _LARGEST_SCALE)
            far = needed > rounded
            rounded = tl.where(far, _scales_of(above), rounded)
            return rounded, _minimum_codes(rounded, tl.where(far, minimum, moved), BITS) * rounded * UNIT


@triton.jit
def store_numbers(side, at, scale, minimum, inside, BITS: tl.constexpr, METADATA: tl.constexpr):
    """Keep at `at` of a side what `stored` gave, where `inside`, or everywhere for None."""
    if METADATA == "float16":
        tl.store(side.scale + at, scale.to(tl.float16), mask=inside)
    else:
        tl.store(side.scale + at, _scale_codes(scale).to(tl.uint8), mask=inside)
    if METADATA == "8-bit values":
        tl.store(side.minimum + at, _minimum_codes(scale, minimum, BITS).to(tl.int8), mask=inside)
    else:
        tl.store(side.minimum + at, minimum.to(tl.float16), mask=inside)


@triton.jit
def load_numbers(side, at, inside, BITS: tl.constexpr, METADATA: tl.constexpr):
    """Scale and minimum of values, float32, from `at` of a side where `inside`, else zeros."""
    scale = tl.load(side.scale + at, mask=inside, other=0)
    minimum = tl.load(side.minimum + at, mask=inside, other=0).to(tl.float32)
    if METADATA == "8-bit values":
        UNIT: tl.constexpr = minimum_unit(BITS)
        scale = _scales_of(scale.to(tl.int32))
        minimum = minimum * scale * UNIT
    return scale.to(tl.float32), minimum
