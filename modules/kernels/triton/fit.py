"""Fitting a scale and a minimum to groups, and rounding to codes: the arithmetic of `modules.codecs.grouped`."""

from __future__ import annotations

import triton
import triton.language as tl

from modules.codecs.grouped import CLIPPED, LSQ_ROUNDS, LSQ_START

_ROUNDS = tl.constexpr(LSQ_ROUNDS)
_START = tl.constexpr(LSQ_START)
_MARGIN = tl.constexpr((1 - CLIPPED) / 2)
_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it off rounds a small float32 to an integer


@triton.jit
def _as_stored(x):
    """`x` as float16 will give it back."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _reciprocal(x):
    """`1 / x`, correctly rounded but for rare last bits: one Newton step behind the fast division, which calls nothing."""
    one = tl.full(x.shape, 1.0, tl.float32)
    near = one / x
    return tl.fma(near, tl.fma(-near, x, one), near)


@triton.jit
def _quotient(x, divisor, inverse):
    """`x / divisor`, rounded likewise, by the reciprocal of the divisor (Markstein, IBM J. Res. Dev. 34, 1990)."""
    near = x * inverse
    return tl.fma(tl.fma(-near, divisor, x), inverse, near)


@triton.jit
def round_to_codes(x, scale, minimum, BITS: tl.constexpr):
    """Codes as float32: `round((x - minimum) / scale)` to even, within `0…2**BITS - 1`; one division a group."""
    safe = tl.where(scale > 0.0, scale, 1.0)
    inverse = tl.broadcast_to(_reciprocal(safe), x.shape)
    codes = _quotient(x - minimum, tl.broadcast_to(safe, x.shape), inverse)
    codes = tl.minimum(tl.maximum(codes, 0.0), (1 << BITS) - 1)
    return (codes + _HALF_EVEN) - _HALF_EVEN


@triton.jit
def _error(x, codes, scale, minimum, AXIS: tl.constexpr):
    difference = codes * scale + minimum - x
    return tl.sum(difference * difference, AXIS)


@triton.jit
def fit(x, AXIS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, METHOD: tl.constexpr):
    """Scale and minimum of groups of `COUNT` along `AXIS` of `x`, float32 `[M, N]`, as
    `modules.codecs.grouped` finds them."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    low, high = tl.min(x, AXIS), tl.max(x, AXIS)
    if METHOD == "clipped":
        margin = (high - low) * _MARGIN
        low, high = low + margin, high - margin
    levels = tl.full(low.shape, LEVELS, tl.float32)
    best_scale = _as_stored(_quotient(high - low, levels, _reciprocal(levels)))
    best_minimum = _as_stored(low)
    if METHOD == "lsq":
        scale, minimum = tl.expand_dims(best_scale, AXIS), tl.expand_dims(best_minimum, AXIS)
        best_error = _error(x, round_to_codes(x, scale, minimum, BITS), scale, minimum, AXIS)
        mean_x = tl.sum(x, AXIS) * (1.0 / COUNT)
        next_scale = _as_stored((high - low) * (_START / LEVELS))
        next_minimum = _as_stored((low + high) * 0.5 - (high - low) * (_START / 2))
        for _ in range(_ROUNDS):
            codes = round_to_codes(x, tl.expand_dims(next_scale, AXIS), tl.expand_dims(next_minimum, AXIS), BITS)
            mean_c = tl.sum(codes, AXIS) * (1.0 / COUNT)
            centred = codes - tl.expand_dims(mean_c, AXIS)
            variance = tl.sum(centred * centred, AXIS)
            covariance = tl.sum(centred * (x - tl.expand_dims(mean_x, AXIS)), AXIS)
            variance = tl.maximum(variance, 1e-12)
            next_scale = _as_stored(_quotient(covariance, variance, _reciprocal(variance)))
            next_minimum = _as_stored(mean_x - next_scale * mean_c)
            wide_scale, wide_minimum = tl.expand_dims(next_scale, AXIS), tl.expand_dims(next_minimum, AXIS)
            error = _error(x, round_to_codes(x, wide_scale, wide_minimum, BITS), wide_scale, wide_minimum, AXIS)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best_scale = tl.where(better, next_scale, best_scale)
            best_minimum = tl.where(better, next_minimum, best_minimum)
    return best_scale, best_minimum
