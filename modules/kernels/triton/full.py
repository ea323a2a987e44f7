"""Attention over the full-precision tokens of one head: sinks, window and the new tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from modules.kernels.triton.codes import dot
from modules.kernels.triton.queries import load_channels
from modules.kernels.triton.softmax import EMPTY, merge_warps, store_softmax


class Listed(NamedTuple):
    """Full-precision tokens of a list, each `[WARPS, T]`: their number in it, their slot of the ring, which of the new ones
    they are, and which of the three they are at all."""

    index: Any
    slot: Any
    fresh: Any
    is_sink: Any
    in_ring: Any
    is_new: Any


@triton.jit
def _load_states(side, new, token, channel, TILE: tl.constexpr):
    """The states of the listed tokens, from where each lies; places and channels broadcast to each other."""
    D: tl.constexpr = TILE.D
    x = tl.load(side.window + token.slot * D + channel, mask=token.in_ring, other=0.0)
    x = tl.load(new.states + token.fresh * new.stride_t + channel, mask=token.is_new, other=x)
    if TILE.SINK > 0:
        x = tl.load(side.sinks + token.index * D + channel, mask=token.is_sink, other=x)
    return x


@triton.jit
def _along(listed, AXIS: tl.constexpr):
    """The list with another dimension of 1 at `AXIS`."""
    return Listed(
        tl.expand_dims(listed.index, AXIS),
        tl.expand_dims(listed.slot, AXIS),
        tl.expand_dims(listed.fresh, AXIS),
        tl.expand_dims(listed.is_sink, AXIS),
        tl.expand_dims(listed.in_ring, AXIS),
        tl.expand_dims(listed.is_new, AXIS),
    )


@triton.jit
def attend_full(
    query,
    keys,
    values,
    new_keys,
    new_values,
    partial,
    out_at,
    length,
    packed,
    new_tokens,
    factor,
    TILE: tl.constexpr,
):
    """Sinks, then the slots of the ring in any order, then the new tokens up to the last row's own, as one list."""
    D: tl.constexpr = TILE.D
    N: tl.constexpr = TILE.N
    T: tl.constexpr = TILE.FULL_T
    SEG: tl.constexpr = TILE.FULL_SEG
    SEGS: tl.constexpr = D // SEG
    WARPS: tl.constexpr = TILE.WARPS
    SINK: tl.constexpr = TILE.SINK
    RING: tl.constexpr = TILE.RING
    c = tl.arange(0, SEG)
    queries = ()
    for seg in tl.static_range(SEGS):
        rows = load_channels(query, seg * SEG + c)
        queries += (tl.broadcast_to(rows, [WARPS, SEG, N]),)
    maximum = tl.full([WARPS, N], EMPTY, tl.float32)
    total = tl.zeros([WARPS, T, N], tl.float32)
    sums = ()
    for _ in tl.static_range(SEGS):
        sums += (tl.zeros([WARPS, SEG, N], tl.float32),)
    after_sinks = tl.maximum(length - SINK, packed)
    lane_token = tl.arange(0, WARPS)[:, None] * T + tl.arange(0, T)[None, :]
    visible = tl.minimum(new_tokens, tl.max(query.token, 0) + 1)

    for start in tl.range(0, SINK + RING + visible, WARPS * T, num_stages=1):
        index = start + lane_token  # [WARPS, T]
        slot = index - SINK
        fresh = slot - RING
        is_sink = index < tl.minimum(length, SINK)
        behind = slot - packed % RING
        behind = tl.where(behind < 0, behind + RING, behind)  # tokens after the oldest one of the ring
        in_ring = (slot >= 0) & (slot < RING) & (packed + behind < after_sinks)
        is_new = (fresh >= 0) & (fresh < visible)
        listed = Listed(index, slot, fresh, is_sink, in_ring, is_new)

        scores = tl.zeros([WARPS, T, N], tl.float32)
        for seg in tl.static_range(SEGS):
            channel = seg * SEG + c[None, None, :]
            x = _load_states(keys, new_keys, _along(listed, 2), channel, TILE)  # [WARPS, T, SEG]
            scores = dot(x, queries[seg], scores, TILE.ASM)
        seen = (is_sink | in_ring)[:, :, None] | (
            is_new[:, :, None] & (fresh[:, :, None] <= query.token[None, None, :])
        )
        scores = tl.where(seen, scores * factor, float("-inf"))

        new = tl.maximum(maximum, tl.max(scores, 1))
        decay = tl.exp2(maximum - new)
        maximum = new
        p = tl.exp2(scores - new[:, None, :])
        total = total * decay[:, None, :] + p
        p = p.to(keys.window.dtype.element_ty)

        new_sums = ()
        for seg in tl.static_range(SEGS):
            channel = seg * SEG + c[None, :, None]
            y = _load_states(values, new_values, _along(listed, 1), channel, TILE)  # [WARPS, SEG, T]
            new_sums += (dot(y, p, sums[seg] * decay[:, None, :], TILE.ASM),)
        sums = new_sums

    weights = store_softmax(partial, out_at, maximum, total, N)
    row = tl.arange(0, N)
    at = partial.sums + out_at.to(tl.int64) * (N * D) + row[None, :] * D
    for seg in tl.static_range(SEGS):
        tl.store(at + (seg * SEG + c)[:, None], merge_warps(sums[seg], weights))
