"""Merging the splits of attention."""

from __future__ import annotations

import triton
import triton.language as tl

from modules.kernels.triton.softmax import EMPTY


# Numbers that change as a cache grows: one compilation serves all, so that no later step waits for another.
@triton.jit(do_not_specialize=["parts", "row_blocks"])
def combine_splits(
    partial,
    new_lengths,
    out,
    parts,
    row_blocks,
    new_tokens,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ALL_NEW: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge the splits of one query row, `PARTS` at a time, by their log-sum-exp into `out`, `[B, q, Hkv * GROUP, D]`.

    Grid: the new tokens * GROUP rows of the KV heads of every sequence.
    """
    rows = new_tokens * GROUP
    row, head = tl.program_id(0) % rows, tl.program_id(0) // rows
    sequence = head // KV_HEADS
    token = row // GROUP
    first = (head.to(tl.int64) * row_blocks + row // N) * parts * N + row % N
    split = tl.arange(0, PARTS)
    d = tl.arange(0, D_PAD)
    maximum = tl.full([PARTS], EMPTY, tl.float32)
    total = tl.zeros([PARTS], tl.float32)
    result = tl.zeros([PARTS, D_PAD], tl.float32)
    for start in range(0, parts, PARTS):
        at = first + (start + split) * N
        inside = start + split < parts
        m = tl.load(partial.softmax + at * 2, mask=inside, other=EMPTY)
        weight = tl.load(partial.softmax + at * 2 + 1, mask=inside, other=0.0)
        x = tl.load(
            partial.sums + at[:, None] * D + d[None, :],
            mask=(weight > 0.0)[:, None] & (d < D)[None, :],
            other=0.0,
        )  # [PARTS, D_PAD]
        new = tl.maximum(maximum, m)
        decay = tl.exp2(maximum - new)
        fresh = tl.exp2(m - new)
        total = total * decay + weight * fresh
        result = result * decay[:, None] + x * fresh[:, None]
        maximum = new
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    total = tl.sum(total * weight, 0)
    real = total > 0.0
    if not ALL_NEW:
        real &= token < tl.load(new_lengths + sequence)
    answer = tl.where(real, tl.sum(result * weight[:, None], 0) / tl.where(real, total, 1.0), 0.0)
    out_row = (sequence.to(tl.int64) * new_tokens + token) * (KV_HEADS * GROUP) + head % KV_HEADS * GROUP + row % GROUP
    tl.store(out + out_row * D + d, answer.to(out.dtype.element_ty), mask=d < D)
