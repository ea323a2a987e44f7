"""Fitting a scale and a minimum to groups, and rounding to codes: the arithmetic of `modules.codecs.grouped`."""

from __future__ import annotations

import triton
import triton.language as tl

from modules.codecs.grouped import CLIPPED, LSQ_ROUNDS, LSQ_START
from modules.kernels.triton.metadata import stored
from modules.kernels.triton.rounding import quotient, reciprocal, round_within

_ROUNDS = tl.constexpr(LSQ_ROUNDS)
_START = tl.constexpr(LSQ_START)
_MARGIN = tl.constexpr((1 - CLIPPED) / 2)


@triton.jit
def round_to_codes(x, scale, minimum, BITS: tl.constexpr):
    """Codes as float32: `round((x - minimum) / scale)` to even, within `0…2**BITS - 1`; one division a group."""
    safe = tl.where(scale > 0.0, scale, 1.0)
    inverse = tl.broadcast_to(reciprocal(safe), x.shape)
    return round_within(quotient(x - minimum, tl.broadcast_to(safe, x.shape), inverse), 0.0, (1 << BITS) - 1)


@triton.jit
def _error(x, codes, scale, minimum, shares, AXIS: tl.constexpr):
    difference = codes * scale + minimum - x
    return tl.sum(difference * difference * shares, AXIS)


@triton.jit
def fit(x, shares, AXIS: tl.constexpr, BITS: tl.constexpr, METHOD: tl.constexpr, METADATA: tl.constexpr):
    """Scale and minimum of groups along `AXIS` of `x`, float32 `[M, N]`, as `modules.codecs.grouped` finds them, and as they will
    be read; errors count their `shares`, which add up to 1 along `AXIS`."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    low, high = tl.min(x, AXIS), tl.max(x, AXIS)
    if METHOD == "clipped":
        margin = (high - low) * _MARGIN
        low, high = low + margin, high - margin
    levels = tl.full(low.shape, LEVELS, tl.float32)
    best_scale, best_minimum = stored(quotient(high - low, levels, reciprocal(levels)), low, BITS, METADATA)
    if METHOD == "lsq":
        scale, minimum = tl.expand_dims(best_scale, AXIS), tl.expand_dims(best_minimum, AXIS)
        best_error = _error(x, round_to_codes(x, scale, minimum, BITS), scale, minimum, shares, AXIS)
        mean_x = tl.sum(x * shares, AXIS)
        next_scale = (high - low) * (_START / LEVELS)
        next_minimum = (low + high) * 0.5 - (high - low) * (_START / 2)
        next_scale, next_minimum = stored(next_scale, next_minimum, BITS, METADATA)
        for _ in range(_ROUNDS):
            codes = round_to_codes(x, tl.expand_dims(next_scale, AXIS), tl.expand_dims(next_minimum, AXIS), BITS)
            mean_c = tl.sum(codes * shares, AXIS)
            centred = codes - tl.expand_dims(mean_c, AXIS)
            counted = centred * shares
            variance = tl.sum(counted * centred, AXIS)
            covariance = tl.sum(counted * x, AXIS) - mean_x * tl.sum(counted, AXIS)  # x - mean_x would spill
            variance = tl.maximum(variance, 1e-12)
            refit = quotient(covariance, variance, reciprocal(variance))
            next_scale, _ = stored(refit, mean_x - refit * mean_c, BITS, METADATA)
            next_scale, next_minimum = stored(next_scale, mean_x - next_scale * mean_c, BITS, METADATA)
            wide_scale, wide_minimum = tl.expand_dims(next_scale, AXIS), tl.expand_dims(next_minimum, AXIS)
            codes = round_to_codes(x, wide_scale, wide_minimum, BITS)
            error = _error(x, codes, wide_scale, wide_minimum, shares, AXIS)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best_scale = tl.where(better, next_scale, best_scale)
            best_minimum = tl.where(better, next_minimum, best_minimum)
    return best_scale, best_minimum
