"""Attention over the full-precision tokens of one head: sinks, window and the new tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from modules.kernels.triton.codes import dot
from modules.kernels.triton.queries import load_channels
from modules.kernels.triton.softmax import EMPTY, merge_warps, store_softmax


@triton.jit
def _load_states(
    side, new, index, channel, is_sink, in_ring, is_new, D: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr
):
    """The states of the listed tokens, from where each lies; all of one shape or broadcast to it."""
    slot = index - SINK
    x = tl.load(side.window + slot * D + channel, mask=in_ring, other=0.0)
    x = tl.load(new.states + (slot - RING) * new.stride_t + channel, mask=is_new, other=x)
    if SINK > 0:
        x = tl.load(side.sinks + index * D + channel, mask=is_sink, other=x)
    return x


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

        scores = tl.zeros([WARPS, T, N], tl.float32)
        for seg in tl.static_range(SEGS):
            x = _load_states(
                keys,
                new_keys,
                index[:, :, None],
                seg * SEG + c[None, None, :],
                is_sink[:, :, None],
                in_ring[:, :, None],
                is_new[:, :, None],
                D,
                SINK,
                RING,
            )  # [WARPS, T, SEG]
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
            y = _load_states(
                values,
                new_values,
                index[:, None, :],
                seg * SEG + c[None, :, None],
                is_sink[:, None, :],
                in_ring[:, None, :],
                is_new[:, None, :],
                D,
                SINK,
                RING,
            )  # [WARPS, SEG, T]
            new_sums += (dot(y, p, sums[seg] * decay[:, None, :], TILE.ASM),)
        sums = new_sums

    weights = store_softmax(partial, out_at, maximum, total, N)
    row = tl.arange(0, N)
    at = partial.sums + out_at.to(tl.int64) * (N * D) + row[None, :] * D
    for seg in tl.static_range(SEGS):
        tl.store(at + (seg * SEG + c)[:, None], merge_warps(sums[seg], weights))
