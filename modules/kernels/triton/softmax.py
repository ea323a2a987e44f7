"""A softmax over parts of the tokens: every warp keeps its own, and the warps of a program, then the splits, are merged by
their log-sum-exp (Milakov & Gimelshein, arXiv 1805.02867)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1.0e30)  # maximum of no scores; finite, so that differences are never NaN


class Partial(NamedTuple):
    """Where splits leave what they found.

    Attributes:
        sums: float32 `[B * Hkv, row blocks, splits + 1, N, D]`, weighted by the split's own maximum.
        softmax: float32 `[B * Hkv, row blocks, splits + 1, N, 2]`: maximum (in powers of two) and sum of weights.
    """

    sums: Any
    softmax: Any


@triton.jit
def merge_warps(x, weights):
    """Weighted sum over the warps: `[WARPS, M, N]` and `[WARPS, N]` to `[M, N]`."""
    return tl.sum(x * weights[:, None, :], 0)


@triton.jit
def store_softmax(partial, out_at, maximum, total, N: tl.constexpr):
    """Merge the warps' `maximum` `[WARPS, N]` and `total` `[WARPS, *, N]`; the weights `[WARPS, N]` they merge with."""
    top = tl.max(maximum, 0)  # [N]
    weights = tl.exp2(maximum - top[None, :])
    merged = tl.sum(tl.sum(total, 1) * weights, 0)  # [N]
    at = partial.softmax + out_at.to(tl.int64) * (2 * N) + 2 * tl.arange(0, N)
    tl.store(at, top)
    tl.store(at + 1, merged)
    return weights
