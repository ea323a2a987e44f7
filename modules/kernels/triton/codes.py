"""Codes as operands of tensor cores, without a conversion.

Masked out of its byte and read as the bits of a float16, a code `c` is the subnormal number `c·2⁻²⁴` (times `4ⁿ` for plane
`n` of 2 bits), exact in the product with a float16 and in the float32 sum. So one `and` makes two operands; the powers of
two go into the query and the result.

Every function has a plain path beside its inline assembly, `ASM` false, which the interpreter runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

TWO_24 = tl.constexpr(16777216.0)  # 2**24: a code read as float16 bits is 2**-24 of its value


@triton.constexpr_function
def _twice(value):
    """`value` in both halves of a 32-bit register."""
    return value * 0x00010001


@triton.constexpr_function
def _spread_asm(mask):
    """Four bytes of one register, masked, into four 16-bit lanes of two registers."""
    return (
        "{ .reg .b32 low, high; prmt.b32 low, $2, 0, 0x4140; prmt.b32 high, $2, 0, 0x4342; "
        f"and.b32 $0, low, {_twice(mask)}; and.b32 $1, high, {_twice(mask)}; }}"
    )


@triton.constexpr_function
def _mask_asm(mask, shift):
    """The low or high byte of two 16-bit lanes, masked."""
    if shift:
        return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, {_twice(mask)}; }}"
    return f"and.b32 $0, $1, {_twice(mask)};"


@triton.constexpr_function
def _spread_two_asm():
    """`_spread_asm` with the mask in a register of four bytes; a mask that is constant a register costs nothing."""
    return (
        "{ .reg .b32 x, m; prmt.b32 x, $2, 0, 0x4140; prmt.b32 m, $3, 0, 0x4140; and.b32 $0, x, m; "
        "prmt.b32 x, $2, 0, 0x4342; prmt.b32 m, $3, 0, 0x4342; and.b32 $1, x, m; }"
    )


@triton.constexpr_function
def _mask_two_asm(shift):
    """`_mask_asm` with the mask in a register."""
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, $2; }}"


@triton.constexpr_function
def plane_mask(bits, plane):
    """The bits of a byte in which the codes of a plane lie."""
    return ((1 << bits) - 1) << (bits * plane)


@triton.jit
def codes_of_bytes(x, MASK: tl.constexpr, ASM: tl.constexpr):
    """Bytes, uint8, to float16 whose bits are the masked byte: `code * 2**-24` times the plane's power of two."""
    if ASM:
        return tl.inline_asm_elementwise(_spread_asm(MASK), "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return (x & MASK).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def codes_of_pairs(x, MASK: tl.constexpr, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """The same for byte `SHIFT / 8` of int16 pairs of bytes."""
    if ASM:
        return tl.inline_asm_elementwise(_mask_asm(MASK, SHIFT), "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return ((x >> SHIFT) & MASK).to(tl.float16, bitcast=True)


@triton.jit
def masked_bytes(x, mask, ASM: tl.constexpr):
    """`codes_of_bytes` with a mask for every column, where several planes of the same bytes lie side by side."""
    masks = tl.broadcast_to(mask.to(tl.uint8), x.shape)
    if ASM:
        return tl.inline_asm_elementwise(
            _spread_two_asm(), "=r,=r,r,r", [x, masks], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        return (x & masks).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def two_planes_of_pairs(x, second, MASK: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """`codes_of_pairs` where rows marked `second` hold the next plane of the same bytes."""
    mask = tl.broadcast_to(tl.where(second, MASK << BITS, MASK).to(tl.int16), x.shape)
    if ASM:
        return tl.inline_asm_elementwise(
            _mask_two_asm(SHIFT), "=r,r,r", [x, mask], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return ((x >> SHIFT) & mask).to(tl.float16, bitcast=True)


@triton.jit
def numbers(x, dtype, ASM: tl.constexpr):
    """States, or int8 codes, as an operand beside one of `dtype`."""
    if ASM:
        return x.to(dtype)
    else:
        return x.to(tl.float32)  # the interpreter knows no way from int8 to bfloat16


@triton.jit
def dot(a, b, acc, ASM: tl.constexpr):
    """`acc + a b` in float32 of full-precision states; float32 ones are not rounded to tf32."""
    if not ASM:  # the interpreter has no bfloat16 arithmetic
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
