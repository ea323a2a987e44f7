"""The query rows of a program, and how they are made ready for products with codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from modules.kernels.triton.codes import TWO_24


class Query(NamedTuple):
    """`N` rows of queries, new token major: row `t * GROUP + g` is new token `t` of the `g`-th query head.

    Attributes:
        states: pointer to the first row's token.
        offsets: `[N]`, where each row starts.
        token: `[N]`, the new token of each row.
        real: `[N]`, whether there is such a token.
    """

    states: Any
    offsets: Any
    token: Any
    real: Any


class Folded(NamedTuple):
    """Queries as operands, each float16 `[BATCH, K_USED_PAD, N]` (at 16 bits the states' own type).

    Attributes:
        plain: a tuple with an operand a segment and product of planes, to go with the minima.
        scaled: the same times the planes' powers of two, to go with the codes once a scale is on them.
        low: `[BATCH, WIDE_PAD, N]`, to go with the low bits of wide channels.
        to_score: float32 `[N]`, from sums of products to scores in powers of two.
    """

    plain: Any
    scaled: Any
    low: Any
    to_score: Any


@triton.jit
def query_rows(query, sequence, kv_head, row_block, new_tokens, TILE: tl.constexpr):
    """The rows of block `row_block` of a KV head."""
    N: tl.constexpr = TILE.N
    GROUP: tl.constexpr = TILE.GROUP
    row = row_block * N + tl.arange(0, N)
    token = row // GROUP
    offsets = (row % GROUP) * query.stride_h + token * query.stride_t
    first = sequence.to(tl.int64) * query.stride_b + kv_head * GROUP * query.stride_h
    return Query(query.states + first, offsets, token, token < new_tokens)


@triton.jit
def load_channels(query, channel, inside=None):
    """Channels `[M]` of the rows, `[1, M, N]`; zeros where not `inside`, if that is given."""
    mask = query.real[None, None, :]
    if inside is not None:
        mask = mask & inside[None, :, None]
    return tl.load(query.states + query.offsets[None, None, :] + channel[None, :, None], mask=mask, other=0.0)


@triton.jit
def _row_scale(query, TILE: tl.constexpr):
    """Powers of two `(r, 1/r)` a row with `|q| < r`, so that `q / r` times any float16 scale stays in float16."""
    D: tl.constexpr = TILE.D
    D_PAD: tl.constexpr = TILE.D_PAD
    d = tl.arange(0, D_PAD)
    x = tl.load(
        query.states + query.offsets[None, :] + d[:, None],
        mask=query.real[None, :] & (d[:, None] < D),
        other=0.0,
    )  # [D_PAD, N]
    exponent = tl.max(tl.abs(x.to(tl.float32)), 0).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(exponent, 252 << 23)
    return (exponent + (1 << 23)).to(tl.float32, bitcast=True), ((253 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _select(whole, channel, D_PAD: tl.constexpr):
    """Channels of `whole`, float16 `[1, D_PAD, N]`, as float32 `[1, M, N]`; zeros for -1.

    A product with ones and zeros, exact: what it gives lies in the registers as the products that follow want it, which
    loads of scattered channels do not (a sixth more instructions in the loop).
    """
    one_hot = tl.where(channel[None, :, None] == tl.arange(0, D_PAD)[None, None, :], 1.0, 0.0).to(tl.float16)
    return tl.dot(one_hot, whole)


@triton.jit
def _whole(query, inverse, TILE: tl.constexpr):
    """All channels, scaled down, float16 `[1, D_PAD, N]`."""
    D: tl.constexpr = TILE.D
    D_PAD: tl.constexpr = TILE.D_PAD
    d = tl.arange(0, D_PAD)
    x = load_channels(query, d, d < D)
    return (x.to(tl.float32) * inverse[None, None, :]).to(tl.float16)


@triton.jit
def low_places(TILE: tl.constexpr):
    """Of the low bits of wide keys, the first codes of all bytes, then the second, …: whether there is such a channel, its
    byte, its plane, and its place in the order of channels; each `[WIDE_PAD]`."""
    WIDE: tl.constexpr = TILE.WIDE
    WIDE_PAD: tl.constexpr = TILE.WIDE_PAD
    number = tl.arange(0, WIDE_PAD)
    is_wide = number < WIDE
    byte = number % (WIDE // 4)
    plane = tl.minimum(number // (WIDE // 4), 3)
    return is_wide, byte, plane, tl.where(is_wide, 4 * byte + plane, 0)


@triton.jit
def _fold_low(whole, order, TILE: tl.constexpr):
    """The query to go with the low bits, `(q∘scale/4)·low`, but for the scale: `[BATCH, WIDE_PAD, N]`."""
    N: tl.constexpr = TILE.N
    BATCH: tl.constexpr = TILE.BATCH
    WIDE_PAD: tl.constexpr = TILE.WIDE_PAD
    is_wide, byte, plane, place = low_places(TILE)
    x = _select(whole, tl.load(order + place, mask=is_wide, other=-1), TILE.D_PAD)
    unit = 0.25 / (tl.full([WIDE_PAD], 1, tl.int32) << (2 * plane)).to(tl.float32)
    x = (x * unit[None, :, None]).to(tl.float16)
    return tl.broadcast_to(x, [BATCH, WIDE_PAD, N])


@triton.jit
def fold_queries(query, order, factor, TILE: tl.constexpr):
    """Operands for keys of 2, 4 and 8 bits, channels in the `order` of the head where some are wide."""
    D_PAD: tl.constexpr = TILE.D_PAD
    N: tl.constexpr = TILE.N
    BATCH: tl.constexpr = TILE.BATCH
    K_BITS: tl.constexpr = TILE.K_BITS
    K_WIDTH: tl.constexpr = TILE.K_WIDTH
    K_SEG: tl.constexpr = TILE.K_SEG
    K_FOLD: tl.constexpr = TILE.K_FOLD
    K_USED: tl.constexpr = TILE.K_USED
    K_USED_PAD: tl.constexpr = TILE.K_USED_PAD
    K_SEGS: tl.constexpr = TILE.K_SEGS
    K_PLANES: tl.constexpr = TILE.K_PLANES
    WIDE: tl.constexpr = TILE.WIDE
    number = tl.arange(0, K_USED_PAD)
    row_scale, inverse = _row_scale(query, TILE)
    if WIDE > 0:
        whole = _whole(query, inverse, TILE)
    plain = ()
    scaled = ()
    for seg in tl.static_range(K_SEGS):
        for plane in tl.static_range(K_PLANES):
            channel = plane * K_FOLD * K_WIDTH + seg * K_SEG + number
            if WIDE > 0:
                x = _select(whole, tl.load(order + channel, mask=number < K_USED, other=-1), D_PAD)
            else:
                x = load_channels(query, channel, number < K_USED).to(tl.float32) * inverse[None, None, :]
            unit = tl.where(number < K_SEG, 1.0, 1.0 / (1 << K_BITS)) * (1.0 / (1 << (K_BITS * K_FOLD * plane)))
            scaled += (tl.broadcast_to((x * unit[None, :, None]).to(tl.float16), [BATCH, K_USED_PAD, N]),)
            plain += (tl.broadcast_to(x.to(tl.float16), [BATCH, K_USED_PAD, N]),)
    low = ()
    if WIDE > 0:
        low = _fold_low(whole, order, TILE)
    return Folded(plain, scaled, low, row_scale * factor * TWO_24)


@triton.jit
def full_precision_queries(query, factor, TILE: tl.constexpr):
    """Operands for keys at 16 bits."""
    N: tl.constexpr = TILE.N
    BATCH: tl.constexpr = TILE.BATCH
    K_SEG: tl.constexpr = TILE.K_SEG
    K_USED_PAD: tl.constexpr = TILE.K_USED_PAD
    K_SEGS: tl.constexpr = TILE.K_SEGS
    number = tl.arange(0, K_USED_PAD)
    plain = ()
    for seg in tl.static_range(K_SEGS):
        x = load_channels(query, seg * K_SEG + number, number < K_SEG)
        plain += (tl.broadcast_to(x, [BATCH, K_USED_PAD, N]),)
    return Folded(plain, (), (), tl.full([N], 1.0, tl.float32) * factor)
