"""Divisions and roundings of float32 that come out as on a CPU."""

from __future__ import annotations

import triton
import triton.language as tl

_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it off rounds a small float32 to an integer


@triton.jit
def reciprocal(x):
    """`1 / x`, correctly rounded but for rare last bits: one Newton step behind the fast division, which calls nothing."""
    one = tl.full(x.shape, 1.0, tl.float32)
    near = one / x
    return tl.fma(near, tl.fma(-near, x, one), near)


@triton.jit
def quotient(x, divisor, inverse):
    """`x / divisor`, rounded likewise, by the reciprocal of the divisor (Markstein, IBM J. Res. Dev. 34, 1990)."""
    near = x * inverse
    return tl.fma(tl.fma(-near, divisor, x), inverse, near)


@triton.jit
def round_within(x, low, high):
    """The integer next to `x`, the even one of two, within `low…high`, which are small integers; float32."""
    x = tl.minimum(tl.maximum(x, low), high)
    return (x + _HALF_EVEN) - _HALF_EVEN
