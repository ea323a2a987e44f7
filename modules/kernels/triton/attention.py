"""Attention of new tokens over one packed layer on a GPU, in Triton: one launch over splits of the tokens, one to combine.

Nothing is ever dequantized. With the metadata folded into the small operands,

- scores of a group of tokens: `q·k = (q∘scale)·code + q·minimum`,
- output: `Σ p v = Σ (p·scale) code + Σ p·minimum`,

and a code enters the tensor cores as it lies in memory: masked out of its byte and read as the bits of a float16, `c` is
the subnormal number `c·2⁻²⁴` (times `4ⁿ` for plane `n` of 2 bits), exact in the product with a float16 and in the float32
sum. So one `and` makes two operands; there is no conversion and no constant to take off. The powers of two go into the
query and the result.

Every warp keeps its own running softmax over its own groups (the batch dimension of the dots), which is what lets a
scale per group sit in the operand; the warps of a program, and then the splits, are merged by their log-sum-exp.
Tokens are rows and grouped queries columns of every product, so 8 query rows fill a tile.

Lengths are read from device tensors: nothing here waits for the device or branches on a length on the host.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from modules.kernels.triton.packing import LAUNCH_OPTIONS
from modules.options import FULL_PRECISION_BITS
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step

LOG2_E = 1.4426950408889634
HEAD_DIMS = (64, 96, 128, 256)
GROUP_SIZES = (16, 32, 64, 128)
MAX_WIDE = 64
FORCE_PLAIN = False  # for tests: no inline assembly on a GPU either
_STEPS = (
    (3, 64),
    (2, 64),
    (2, 32),
    (1, 32),
)  # stages of the pipeline, tokens a warp handles at a time; the first that fits
_SHARED_H100 = 233472  # bytes of shared memory of a multiprocessor, where no device says otherwise
_MAX_SPLITS = 128
_PROGRAMS_PER_SM = 2  # what registers and shared memory allow
_MIN_SPLIT_STEPS = 2  # a split of fewer steps costs more to merge than it saves
_EMPTY = tl.constexpr(-1.0e30)  # maximum of no scores; finite, so that differences are never NaN
_TWO_24 = tl.constexpr(16777216.0)  # 2**24: a code read as float16 bits is 2**-24 of its value


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


@triton.jit
def _codes_of_bytes(x, MASK: tl.constexpr, ASM: tl.constexpr):
    """Bytes, uint8, to float16 whose bits are the masked byte: `code * 2**-24` times the plane's power of two."""
    if ASM:
        return tl.inline_asm_elementwise(_spread_asm(MASK), "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return (x & MASK).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _codes_of_pairs(x, MASK: tl.constexpr, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """The same for byte `SHIFT / 8` of int16 pairs of bytes."""
    if ASM:
        return tl.inline_asm_elementwise(_mask_asm(MASK, SHIFT), "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return ((x >> SHIFT) & MASK).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _spread_two_asm():
    """`_spread_asm` with the mask in a register of four bytes; a mask that is constant a register costs nothing."""
    return (
        "{ .reg .b32 x, m; prmt.b32 x, $2, 0, 0x4140; prmt.b32 m, $3, 0, 0x4140; and.b32 $0, x, m; "
        "prmt.b32 x, $2, 0, 0x4342; prmt.b32 m, $3, 0, 0x4342; and.b32 $1, x, m; }"
    )


@triton.constexpr_function
def _mask_two_asm(shift):
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, $2; }}"


@triton.jit
def _masked_bytes(x, mask, ASM: tl.constexpr):
    """`_codes_of_bytes` with a mask for every column, where several planes of the same bytes lie side by side."""
    masks = tl.broadcast_to(mask.to(tl.uint8), x.shape)
    if ASM:
        return tl.inline_asm_elementwise(
            _spread_two_asm(), "=r,=r,r,r", [x, masks], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        return (x & masks).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _two_planes_of_pairs(x, second, MASK: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """`_codes_of_pairs` where rows marked `second` hold the next plane of the same bytes."""
    mask = tl.broadcast_to(tl.where(second, MASK << BITS, MASK).to(tl.int16), x.shape)
    if ASM:
        return tl.inline_asm_elementwise(
            _mask_two_asm(SHIFT), "=r,r,r", [x, mask], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return ((x >> SHIFT) & mask).to(tl.float16, bitcast=True)


@triton.jit
def _meta(words, GROUP: tl.constexpr, PER_WORD: tl.constexpr):
    """Entry `GROUP` of a row of float16, read as integers of `PER_WORD` entries."""
    shifted = words[GROUP // PER_WORD] >> (16 * (GROUP % PER_WORD))
    return shifted.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _dot(a, b, acc, ASM: tl.constexpr):
    """`acc + a b` in float32 of full-precision states; float32 ones are not rounded to tf32."""
    if not ASM:  # the interpreter has no bfloat16 arithmetic
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _merge_warps(x, weights):
    """Weighted sum over the warps: `[WARPS, M, N]` and `[WARPS, N]` to `[M, N]`."""
    return tl.sum(x * weights[:, None, :], 0)


@triton.jit
def _query_offsets(row_block, q_stride_h, q_stride_t, GROUP: tl.constexpr, N: tl.constexpr):
    """Rows are new token major: row `t * GROUP + g` is new token `t` of the `g`-th query head."""
    row = row_block * N + tl.arange(0, N)
    return row, (row % GROUP) * q_stride_h + (row // GROUP) * q_stride_t


@triton.jit
def _select(q, channel, D_PAD: tl.constexpr):
    """Channels of `q`, float16 `[1, D_PAD, N]`, as float32 `[1, M, N]`; zeros for -1.

    A product with ones and zeros, exact: what it gives lies in the registers as the products that follow want it, which
    loads of scattered channels do not (a sixth more instructions in the loop).
    """
    one_hot = tl.where(channel[None, :, None] == tl.arange(0, D_PAD)[None, None, :], 1.0, 0.0).to(tl.float16)
    return tl.dot(one_hot, q)


@triton.jit
def _row_scale(q, offsets, real, D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr):
    """Powers of two `(r, 1/r)` a row with `|q| < r`, so that `q / r` times any float16 scale stays in float16."""
    d = tl.arange(0, D_PAD)
    x = tl.load(q + offsets[None, :] + d[:, None], mask=real[None, :] & (d[:, None] < D), other=0.0)
    exponent = tl.max(tl.abs(x.to(tl.float32)), 0).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(exponent, 252 << 23)
    return (exponent + (1 << 23)).to(tl.float32, bitcast=True), ((253 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _weigh_codes(
    acc, pairs, p, words, column, FIRST: tl.constexpr, SEG: tl.constexpr, FOLD: tl.constexpr, PLANE: tl.constexpr,
    HALF: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, META_PER_WORD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`acc + Σ (p·scale) code` for every other channel from `FIRST` on: `SEG` bytes of one plane, or `FOLD` planes."""
    if FOLD == 2:
        second = (column >= SEG // 2)[None, :, None]
        codes = _two_planes_of_pairs(pairs, second, ((1 << BITS) - 1) << (BITS * PLANE), BITS, 8 * HALF, ASM)
    else:
        codes = _codes_of_pairs(pairs, ((1 << BITS) - 1) << (BITS * PLANE), 8 * HALF, ASM)
    if FIRST // G == (FIRST + SEG * FOLD - 1) // G:
        acc = tl.dot(codes, p * _meta(words, FIRST // G, META_PER_WORD)[:, :, None], acc)
    else:
        group_of_column = (FIRST + 2 * column + HALF) // G
        for group in tl.static_range(FIRST // G, (FIRST + SEG * FOLD - 1) // G + 1):
            mine = tl.where((group_of_column == group)[None, :, None], codes, 0.0)
            acc = tl.dot(mine, p * _meta(words, group, META_PER_WORD)[:, :, None], acc)
    return acc


@triton.jit
def _attend_codes(
    q, q_offsets, q_real, k_codes, k_scale, k_minimum, k_extra, k_order, v_codes, v_scale, v_minimum, part, ml, out_at, packed, first, last, factor,
    D: tl.constexpr, D_PAD: tl.constexpr, G: tl.constexpr, VALUE_G: tl.constexpr, WIDE: tl.constexpr,
    WIDE_PAD: tl.constexpr, N: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_SEG: tl.constexpr, K_SEG_PAD: tl.constexpr, K_FOLD: tl.constexpr, V_SEG: tl.constexpr, V_COLS: tl.constexpr,
    V_FOLD: tl.constexpr, META_PER_WORD: tl.constexpr,
    T: tl.constexpr, U: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Steps `first…last` over the packed tokens of one head; each warp handles `U` blocks of `T` tokens a step."""
    K_WIDTH: tl.constexpr = D * K_BITS // 8 if K_BITS < 16 else D  # channels of a plane: bytes a token, or elements
    V_WIDTH: tl.constexpr = D * V_BITS // 8 if V_BITS < 16 else D
    K_PLANES: tl.constexpr = D // K_WIDTH // K_FOLD  # a product takes K_FOLD planes at once
    V_PLANES: tl.constexpr = D // V_WIDTH // V_FOLD
    V_PARTS: tl.constexpr = 2 if V_BITS < 16 else 1  # bytes of an int16
    GROUPS: tl.constexpr = D // VALUE_G
    BATCH: tl.constexpr = U * WARPS

    j = tl.arange(0, K_SEG_PAD)
    at_byte = j % K_SEG if K_FOLD == 2 else j
    K_USED: tl.constexpr = K_SEG * K_FOLD
    queries = ()
    scaled_queries = ()
    if K_BITS < 16:
        row_scale, inverse = _row_scale(q, q_offsets, q_real, D, D_PAD, N)
        to_score = row_scale * factor * _TWO_24
    else:
        to_score = tl.full([N], 1.0, tl.float32) * factor
    if WIDE > 0:
        d = tl.arange(0, D_PAD)
        q_all = tl.load(
            q + q_offsets[None, None, :] + d[None, :, None],
            mask=q_real[None, None, :] & (d < D)[None, :, None],
            other=0.0,
        )
        q_all = (q_all.to(tl.float32) * inverse[None, None, :]).to(tl.float16)
    for seg in tl.static_range(K_WIDTH // K_SEG):
        for plane in tl.static_range(K_PLANES):
            q_channel = plane * K_FOLD * K_WIDTH + seg * K_SEG + j
            if WIDE > 0:
                x = _select(q_all, tl.load(k_order + q_channel, mask=j < K_USED, other=-1), D_PAD)
            else:
                x = tl.load(
                    q + q_offsets[None, None, :] + q_channel[None, :, None],
                    mask=q_real[None, None, :] & (j < K_USED)[None, :, None],
                    other=0.0,
                )
                if K_BITS < 16:
                    x = x.to(tl.float32) * inverse[None, None, :]
            if K_BITS < 16:
                unit = tl.where(j < K_SEG, 1.0, 1.0 / (1 << K_BITS)) * (1.0 / (1 << (K_BITS * K_FOLD * plane)))
                scaled = (x * unit[None, :, None]).to(tl.float16)
                scaled_queries += (tl.broadcast_to(scaled, [BATCH, K_SEG_PAD, N]),)
                x = x.to(tl.float16)
            queries += (tl.broadcast_to(x, [BATCH, K_SEG_PAD, N]),)

    if WIDE > 0:
        # The low bits of the wide keys, the first codes of all bytes, then the second, …: (q∘scale/4)·low.
        number = tl.arange(0, WIDE_PAD)
        is_wide = number < WIDE
        low_byte, low_plane = number % (WIDE // 4), number // (WIDE // 4)
        low_plane = tl.minimum(low_plane, 3)
        low_mask = tl.full([WIDE_PAD], 3, tl.int32) << (2 * low_plane)
        wide_place = tl.where(is_wide, 4 * low_byte + low_plane, 0)
        y = _select(q_all, tl.load(k_order + wide_place, mask=is_wide, other=-1), D_PAD)
        low_unit = 0.25 / (tl.full([WIDE_PAD], 1, tl.int32) << (2 * low_plane)).to(tl.float32)
        y = (y * low_unit[None, :, None]).to(tl.float16)
        wide_query = tl.broadcast_to(y, [BATCH, WIDE_PAD, N])

    warp = tl.arange(0, WARPS)
    batch = tl.arange(0, BATCH)
    block_of_batch = (batch % WARPS) * U + batch // WARPS
    token = tl.arange(0, T)
    warp_token = tl.arange(0, U * T)
    column = tl.arange(0, V_COLS)
    at_pair = column % (V_SEG // 2) if V_FOLD == 2 else column
    next_plane = column // (V_SEG // 2) if V_FOLD == 2 else column * 0
    group16 = tl.arange(0, 16)
    maximum = tl.full([WARPS, N], _EMPTY, tl.float32)
    total = tl.zeros([WARPS, 8, N], tl.float32)
    sums = ()
    for _ in tl.static_range(V_WIDTH // V_SEG * V_PLANES * V_PARTS):
        sums += (tl.zeros([WARPS, V_COLS, N], tl.float32),)
    offsets = tl.zeros([WARPS, 16, N], tl.float32)

    for step in tl.range(first, last, num_stages=STAGES):
        # Scores of U*WARPS blocks of T tokens: [BATCH, T, N].
        block = step * BATCH + block_of_batch
        inside = block < packed // T
        block = tl.minimum(block, packed // T - 1)
        at = block[:, None, None] * (T * K_WIDTH) + token[None, :, None] * K_WIDTH + at_byte[None, None, :]
        scores = tl.zeros([BATCH, T, N], tl.float32)
        if K_BITS < 16:
            meta_at = (block * T // G)[:, None] * D + j[None, :]
            for i in tl.static_range(K_WIDTH // K_SEG * K_PLANES):
                channel = (i % K_PLANES) * K_FOLD * K_WIDTH + (i // K_PLANES) * K_SEG
                if K_USED == K_SEG_PAD:
                    low = tl.load(k_minimum + meta_at + channel)
                else:
                    low = tl.load(k_minimum + meta_at + channel, mask=j[None, :] < K_SEG, other=0.0)
                scores = tl.dot(tl.broadcast_to(low[:, None, :], [BATCH, T, K_SEG_PAD]), queries[i], scores)
            scores = scores * (1.0 / _TWO_24)
            for seg in tl.static_range(K_WIDTH // K_SEG):
                if K_USED == K_SEG_PAD:
                    codes = tl.load(k_codes + at + seg * K_SEG)
                else:
                    codes = tl.load(k_codes + at + seg * K_SEG, mask=j[None, None, :] < K_SEG, other=0)
                for plane in tl.static_range(K_PLANES):
                    channel = plane * K_FOLD * K_WIDTH + seg * K_SEG
                    if K_USED == K_SEG_PAD:
                        scale = tl.load(k_scale + meta_at + channel)
                    else:
                        scale = tl.load(k_scale + meta_at + channel, mask=j[None, :] < K_SEG, other=0.0)
                    folded = scaled_queries[seg * K_PLANES + plane] * scale[:, :, None]
                    if K_FOLD == 2:
                        first_mask = ((1 << K_BITS) - 1) << (2 * K_BITS * plane)
                        operand = _masked_bytes(
                            codes, tl.where(j < K_SEG, first_mask, first_mask << K_BITS)[None, None, :], ASM
                        )
                    else:
                        operand = _codes_of_bytes(codes, ((1 << K_BITS) - 1) << (K_BITS * plane), ASM)
                    scores = tl.dot(operand, folded, scores)
            if WIDE > 0:
                low_at = (
                    block[:, None, None] * (T * (WIDE // 4))
                    + token[None, :, None] * (WIDE // 4)
                    + low_byte[None, None, :]
                )
                low_codes = tl.load(k_extra + low_at, mask=is_wide[None, None, :], other=0)
                low_scale = tl.load(k_scale + (block * T // G)[:, None] * D + wide_place[None, :])
                low_operand = _masked_bytes(low_codes, low_mask[None, None, :], ASM)
                scores = tl.dot(low_operand, wide_query * low_scale[:, :, None], scores)
        else:
            for seg in tl.static_range(K_WIDTH // K_SEG):
                scores = _dot(tl.load(k_codes + at + seg * K_SEG), queries[seg], scores, ASM)
        scores = tl.where(inside[:, None, None], scores, float("-inf"))

        # Online softmax, a maximum for every warp and row.
        highest = tl.max(tl.reshape(tl.max(scores, 1), [U, WARPS, N]), 0) * to_score[None, :]
        new = tl.maximum(maximum, highest)
        decay = tl.exp2(maximum - new)
        maximum = new
        new_of_batch = tl.reshape(tl.broadcast_to(new[None, :, :], [U, WARPS, N]), [BATCH, N])
        p = tl.exp2(
            tl.fma(
                scores,
                tl.broadcast_to(to_score[None, None, :], [BATCH, T, N]),
                tl.broadcast_to(-new_of_batch[:, None, :], [BATCH, T, N]),
            )
        )
        # Sums within a thread, which holds every eighth token.
        weight = tl.sum(tl.sum(tl.reshape(p, [U, WARPS, T // 8, 8, N]), 2), 0)
        total = tl.fma(total, tl.broadcast_to(decay[:, None, :], [WARPS, 8, N]), weight)

        # Values, tokens of a warp side by side: p is [WARPS, U*T, N].
        p = p.to(tl.float16 if V_BITS < 16 else v_codes.dtype.element_ty)
        p = tl.reshape(tl.permute(tl.reshape(p, [U, WARPS, T, N]), (1, 0, 2, 3)), [WARPS, U * T, N])
        at_token = ((step * WARPS + warp) * (U * T))[:, None] + warp_token[None, :]
        at_token = tl.minimum(at_token, packed - 1)
        new_sums = ()
        if V_BITS < 16:
            words = ()
            for word in tl.static_range(GROUPS // META_PER_WORD):
                words += (tl.load(v_scale + at_token * (GROUPS // META_PER_WORD) + word),)
            for seg in tl.static_range(V_WIDTH // V_SEG):
                pairs_at = at_token[:, None, :] * (V_WIDTH // 2) + seg * (V_SEG // 2) + at_pair[None, :, None]
                if V_COLS * 2 == V_SEG * V_FOLD:
                    pairs = tl.load(v_codes + pairs_at)
                else:
                    pairs = tl.load(v_codes + pairs_at, mask=column[None, :, None] < V_SEG // 2, other=0)
                for plane in tl.static_range(V_PLANES):
                    for half in tl.static_range(2):
                        new_sums += (
                            _weigh_codes(
                                sums[(seg * V_PLANES + plane) * 2 + half] * decay[:, None, :], pairs, p, words, column,
                                plane * V_FOLD * V_WIDTH + seg * V_SEG, V_SEG, V_FOLD, plane * V_FOLD, half, V_BITS, VALUE_G, META_PER_WORD, ASM,
                            ),
                        )  # fmt: skip
            low = tl.load(
                v_minimum + at_token[:, None, :] * GROUPS + group16[None, :, None],
                mask=group16[None, :, None] < GROUPS,
                other=0.0,
            )
            offsets = tl.dot(low, p, offsets * decay[:, None, :])
        else:
            for seg in tl.static_range(V_WIDTH // V_SEG):
                values = tl.load(v_codes + at_token[:, None, :] * D + seg * V_SEG + column[None, :, None])
                new_sums += (_dot(values, p, sums[seg] * decay[:, None, :], ASM),)
        sums = new_sums

    top = tl.max(maximum, 0)
    weights = tl.exp2(maximum - top[None, :])
    _store_softmax(ml, out_at, top, tl.sum(tl.sum(total, 1) * weights, 0), N)
    row = tl.arange(0, N)
    part += out_at.to(tl.int64) * (N * D)  # not before: the loop needs the registers
    if first < last:  # the combine step skips splits without tokens
        merged_offsets = _merge_warps(offsets, weights)
        for i in tl.static_range(V_WIDTH // V_SEG * V_PLANES * V_PARTS):
            result = _merge_warps(sums[i], weights)
            if V_BITS < 16:
                channel = (i // 2 % V_PLANES) * V_FOLD * V_WIDTH + (i // 2 // V_PLANES) * V_SEG + 2 * column + i % 2
                mine = (channel // VALUE_G)[:, None, None] == group16[None, :, None]
                offset = tl.sum(tl.where(mine, merged_offsets[None, :, :], 0.0), 1)
                to_value = tl.where(next_plane > 0, _TWO_24 / (1 << V_BITS), _TWO_24)
                to_value = to_value * (1.0 / (1 << (V_BITS * V_FOLD * (i // 2 % V_PLANES))))
                result = result * to_value[:, None] + offset
            else:
                channel = i * V_SEG + column
            tl.store(
                part + row[None, :] * D + channel[:, None], result, mask=(column * V_PARTS < V_SEG * V_FOLD)[:, None]
            )


@triton.jit
def _store_softmax(ml, out_at, maximum, total, N: tl.constexpr):
    ml += out_at.to(tl.int64) * (2 * N)
    row = tl.arange(0, N)
    tl.store(ml + 2 * row, maximum)
    tl.store(ml + 2 * row + 1, total)


@triton.jit
def _attend_full(
    q, q_offsets, q_real, q_token, k_sinks, k_window, k_new, v_sinks, v_window, v_new, part, ml, out_at,
    length, packed, new_tokens, k_stride_t, v_stride_t, factor,
    D: tl.constexpr, N: tl.constexpr, SEG: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    T: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sinks, then the slots of the ring in any order, then the new tokens up to the last row's own, as one list."""
    SEGS: tl.constexpr = D // SEG
    kind = k_window.dtype.element_ty
    c = tl.arange(0, SEG)
    queries = ()
    for seg in tl.static_range(SEGS):
        rows = tl.load(
            q + q_offsets[None, None, :] + (seg * SEG + c)[None, :, None], mask=q_real[None, None, :], other=0.0
        )
        queries += (tl.broadcast_to(rows, [WARPS, SEG, N]),)
    maximum = tl.full([WARPS, N], _EMPTY, tl.float32)
    total = tl.zeros([WARPS, T, N], tl.float32)
    sums = ()
    for _ in tl.static_range(SEGS):
        sums += (tl.zeros([WARPS, SEG, N], tl.float32),)
    after_sinks = tl.maximum(length - SINK, packed)
    lane_token = tl.arange(0, WARPS)[:, None] * T + tl.arange(0, T)[None, :]
    visible = tl.minimum(new_tokens, tl.max(q_token, 0) + 1)

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
            k_channel = seg * SEG + c[None, None, :]
            x = tl.load(k_window + slot[:, :, None] * D + k_channel, mask=in_ring[:, :, None], other=0.0)
            x = tl.load(k_new + fresh[:, :, None] * k_stride_t + k_channel, mask=is_new[:, :, None], other=x)
            if SINK > 0:
                x = tl.load(k_sinks + index[:, :, None] * D + k_channel, mask=is_sink[:, :, None], other=x)
            scores = _dot(x, queries[seg], scores, ASM)
        seen = (is_sink | in_ring)[:, :, None] | (is_new[:, :, None] & (fresh[:, :, None] <= q_token[None, None, :]))
        scores = tl.where(seen, scores * factor, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, 1))
        decay = tl.exp2(maximum - new)
        maximum = new
        p = tl.exp2(scores - new[:, None, :])
        total = total * decay[:, None, :] + p
        p = p.to(kind)
        new_sums = ()
        for seg in tl.static_range(SEGS):
            v_channel = seg * SEG + c[None, :, None]
            y = tl.load(v_window + slot[:, None, :] * D + v_channel, mask=in_ring[:, None, :], other=0.0)
            y = tl.load(v_new + fresh[:, None, :] * v_stride_t + v_channel, mask=is_new[:, None, :], other=y)
            if SINK > 0:
                y = tl.load(v_sinks + index[:, None, :] * D + v_channel, mask=is_sink[:, None, :], other=y)
            new_sums += (_dot(y, p, sums[seg] * decay[:, None, :], ASM),)
        sums = new_sums

    top = tl.max(maximum, 0)
    weights = tl.exp2(maximum - top[None, :])
    _store_softmax(ml, out_at, top, tl.sum(tl.sum(total, 1) * weights, 0), N)
    row = tl.arange(0, N)
    part += out_at.to(tl.int64) * (N * D)
    for seg in tl.static_range(SEGS):
        tl.store(part + row[None, :] * D + (seg * SEG + c)[:, None], _merge_warps(sums[seg], weights))


# Numbers that change as a cache grows: one compilation serves all, so that no later step waits for another.
@triton.jit(do_not_specialize=["splits", "row_blocks"])
def attend_splits(
    q, k_new, v_new, k_codes, k_scale, k_minimum, k_sinks, k_window, k_extra, k_order, v_codes, v_scale, v_minimum, v_sinks, v_window,
    counts, new_lengths, part, ml, factor, sequences, capacity, new_tokens, splits, row_blocks,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    D: tl.constexpr, D_PAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, VALUE_G: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PAD: tl.constexpr, N: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_SEG: tl.constexpr, K_SEG_PAD: tl.constexpr, K_FOLD: tl.constexpr,
    V_SEG: tl.constexpr, V_COLS: tl.constexpr, V_FOLD: tl.constexpr, META_PER_WORD: tl.constexpr, FULL_SEG: tl.constexpr, FULL_T: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    T: tl.constexpr, U: tl.constexpr, WARPS: tl.constexpr, ALL_NEW: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of the tokens of one KV head and one block of query rows; split 0 has the full-precision tokens.

    Grid: (splits + 1, sequences * KV_HEADS, row blocks). Writes `part`, float32 `[B * Hkv, row blocks, splits + 1, N, D]`,
    weighted by the split's own maximum, and `ml`, float32 `[B * Hkv, row blocks, splits + 1, N, 2]`: maximum (in powers of
    two) and sum of weights.
    """
    split, head, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = head // KV_HEADS
    kv_head = head % KV_HEADS
    length = tl.load(counts + sequence)
    packed = tl.load(counts + sequences + sequence)
    if ALL_NEW:  # noqa: SIM108 - decided at compilation
        mine = new_tokens
    else:
        mine = tl.load(new_lengths + sequence)
    row, q_offsets = _query_offsets(row_block, q_stride_h, q_stride_t, GROUP, N)
    q_token = row // GROUP
    q_real = q_token < new_tokens
    q += sequence.to(tl.int64) * q_stride_b + kv_head * GROUP * q_stride_h
    out_at = (head * row_blocks + row_block) * (splits + 1) + split
    head64 = head.to(tl.int64)
    if split == 0:
        k_new += sequence.to(tl.int64) * k_stride_b + kv_head * k_stride_h
        v_new += sequence.to(tl.int64) * v_stride_b + kv_head * v_stride_h
        _attend_full(
            q, q_offsets, q_real, q_token,
            k_sinks + head64 * (SINK * D), k_window + head64 * (RING * D), k_new,
            v_sinks + head64 * (SINK * D), v_window + head64 * (RING * D), v_new, part, ml, out_at,
            length, packed, mine, k_stride_t, v_stride_t, factor, D, N, FULL_SEG, SINK, RING, FULL_T, WARPS, ASM,
        )  # fmt: skip
    else:
        steps = tl.cdiv(packed, WARPS * U * T)
        share = tl.cdiv(steps, splits)
        first = (split - 1) * share
        token0 = head64 * capacity
        k_bytes = D * K_BITS // 8 if K_BITS < 16 else D
        v_units = D * V_BITS // 16 if V_BITS < 16 else D
        _attend_codes(
            q, q_offsets, q_real,
            k_codes + token0 * k_bytes, k_scale + token0 // G * D, k_minimum + token0 // G * D,
            k_extra + token0 * (WIDE // 4), k_order + head64 * D,
            v_codes + token0 * v_units, v_scale + token0 * (D // VALUE_G // META_PER_WORD), v_minimum + token0 * (D // VALUE_G),
            part, ml, out_at, packed, first, tl.minimum(first + share, steps), factor,
            D, D_PAD, G, VALUE_G, WIDE, WIDE_PAD, N, K_BITS, V_BITS, K_SEG, K_SEG_PAD, K_FOLD, V_SEG, V_COLS, V_FOLD, META_PER_WORD, T, U, WARPS, ASM, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "row_blocks"])
def combine_splits(
    part, ml, new_lengths, out, parts, row_blocks, new_tokens, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ALL_NEW: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query row by their log-sum-exp. Grid: (rows, sequences * KV_HEADS).

    `out` is `[B, q, Hkv * GROUP, D]`.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    sequence = head // KV_HEADS
    token = row // GROUP
    first = (head.to(tl.int64) * row_blocks + row // N) * parts * N + row % N
    split = tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    maximum = tl.full([BLOCK], _EMPTY, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, D_PAD], tl.float32)
    for start in range(0, parts, BLOCK):
        inside = start + split < parts
        at = first + (start + split) * N
        m = tl.load(ml + at * 2, mask=inside, other=_EMPTY)
        weight = tl.load(ml + at * 2 + 1, mask=inside, other=0.0)
        x = tl.load(part + at[:, None] * D + d[None, :], mask=(weight > 0.0)[:, None] & (d < D)[None, :], other=0.0)
        new = tl.maximum(maximum, m)
        decay = tl.exp2(maximum - new)
        fresh = tl.exp2(m - new)
        total = total * decay + weight * fresh
        result = result * decay[:, None] + x * fresh[:, None]
        maximum = new
    top = tl.max(maximum, 0)
    weight = tl.exp2(maximum - top)
    total = tl.sum(total * weight, 0)
    real = total > 0.0
    if not ALL_NEW:
        real &= token < tl.load(new_lengths + sequence)
    answer = tl.where(real, tl.sum(result * weight[:, None], 0) / tl.where(real, total, 1.0), 0.0)
    out_row = (sequence.to(tl.int64) * new_tokens + token) * (KV_HEADS * GROUP) + head % KV_HEADS * GROUP + row % GROUP
    tl.store(out + out_row * D + d, answer.to(out.dtype.element_ty), mask=d < D)


class Shape(NamedTuple):
    """What decides how a kernel is compiled: everything but the numbers of sequences and tokens."""

    head_dim: int
    group_size: int
    k_bits: int
    v_bits: int
    kv_heads: int
    group: int  # query heads a KV head
    sink_length: int
    ring: int
    value_group_size: int
    wide: int = 0  # key channels with 4 bits

    @classmethod
    def of(cls, layer: PackedLayer, heads: int) -> Shape:
        """The shape of attention with `heads` query heads over `layer`."""
        kv_heads, head_dim = layer.key.window.shape[1], layer.key.window.shape[3]
        return cls(
            head_dim=head_dim,
            group_size=layer.group_size,
            k_bits=layer.key.bits,
            v_bits=layer.value.bits,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            sink_length=layer.sink_length,
            ring=layer.ring,
            value_group_size=layer.value.group_size,
            wide=layer.key.wide,
        )


def _pick_step(shape: Shape, n: int, warps: int, item: int, shared: int) -> tuple[int, int, int]:
    """Stages of the pipeline, tokens of a block and blocks a warp handles at a time.

    The first of `_STEPS` of which two programs fit `shared` bytes: all buffers but one are filled ahead. A token takes its
    codes, its share of the key metadata, and of the value metadata 2 bytes a group and a row of 16 minima; operands on
    their way take 20 bytes a channel and query row. Heads padded to a power of two, 16 query rows and wide channels leave
    fewer registers, the widest heads only for one block at a time (from compiled kernels, which would spill).
    """
    d, g, k_bits, v_bits = shape[:4]
    stored_bits = sum(8 * item if bits == FULL_PRECISION_BITS else bits for bits in (k_bits, v_bits))
    token = d * stored_bits // 8 + 4 * d // g + 2 * d // shape.value_group_size + 32 + shape.wide
    for stages, tokens in _STEPS:
        if warps * tokens * token * max(0, stages - 1) + 20 * d * n <= shared // 2 - 1024:
            break
    if n == 16:
        stages, tokens = (3, 32) if shape.wide else (min(stages, 2), tokens)
    padded = d != triton.next_power_of_2(d)
    if padded or (d == 256 and (k_bits, v_bits) != (2, 2)):
        stages, tokens = 2, 32
    if padded and 4 in (k_bits, v_bits):
        return stages, min(g, 16), 1
    block = min(g, 32)
    return stages, block, tokens // block


def _full_segment(head_dim: int, k_bits: int, item: int) -> int:
    """Channels of a full-precision tile: a power of two, the whole head where that does not spill (from compiled kernels)."""
    crowded = head_dim == 256 and (item == 4 or k_bits == 4)
    return 32 if crowded or head_dim == 96 or (head_dim == 64 and item == 2) else head_dim


def launch_options(tile: dict[str, int]) -> dict[str, int | bool | None]:
    """What the compiler is told of `attend_splits` beside `tile`.

    Without a limit on the registers it spills some to fit a third program on a multiprocessor, which the shared memory has
    no room for; at 16 query rows it is the limit that spills some.
    """
    return LAUNCH_OPTIONS | {"num_warps": tile["WARPS"], "maxnreg": 255 if tile["N"] == 8 else None}


def tile_constants(shape: Shape, rows: int, item: int = 2, shared: int = _SHARED_H100) -> dict[str, int]:
    """The tile sizes of `attend_splits`, by name.

    Args:
        shape: what the kernel is compiled for.
        rows: query rows a KV head, new tokens times `shape.group`.
        item: bytes of a number of the states.
        shared: bytes of shared memory of a multiprocessor.
    """
    d, g, k_bits, v_bits = shape[:4]
    v_g = shape.value_group_size
    k_width, v_width = d * min(k_bits, 8) // 8, d * min(v_bits, 8) // 8
    k_seg = next((seg for seg in (32, 48, 16) if k_width % seg == 0), k_width)
    # Planes of 16 bytes (2 bits, 64 channels) fill half a tile: two go into one product.
    k_fold = 2 if k_width == 16 else 1
    v_fold = 2 if v_width == 16 else 1
    if v_bits == FULL_PRECISION_BITS:
        v_seg = v_columns = 32
    else:
        v_seg = v_g if v_width % v_g == 0 and v_fold == 1 else v_width
        v_columns = max(16, triton.next_power_of_2(v_seg // 2))
    groups = d // v_g
    n = 16 if rows > 8 and d in (64, 128) and item == 2 else 8
    stages, block_tokens, blocks = _pick_step(shape, n, 4, item, shared)
    return {
        "D": d,
        "D_PAD": triton.next_power_of_2(d),
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "G": g,
        "VALUE_G": v_g,
        "WIDE": shape.wide,
        "WIDE_PAD": max(16, triton.next_power_of_2(shape.wide)),
        "N": n,
        "K_BITS": k_bits,
        "V_BITS": v_bits,
        "K_SEG": k_seg,
        "K_SEG_PAD": triton.next_power_of_2(k_seg * k_fold),
        "K_FOLD": k_fold,
        "V_SEG": v_seg,
        "V_COLS": v_columns,
        "V_FOLD": v_fold,
        "META_PER_WORD": next(size for size in (4, 2, 1) if groups % size == 0),
        "FULL_SEG": _full_segment(d, k_bits, item),
        "FULL_T": 16,  # the least a product takes
        "SINK": shape.sink_length,
        "RING": shape.ring,
        "T": block_tokens,
        "U": blocks,
        "WARPS": 4,
        "STAGES": stages,
    }


def why_not(layer: PackedLayer) -> str | None:
    """What of the shapes of `layer` the kernels are not written for; None where they are."""
    window = layer.key.window
    head_dim, dtype = window.shape[3], window.dtype
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is not one of {HEAD_DIMS}"
    if layer.group_size not in GROUP_SIZES:
        return f"group_size={layer.group_size} is not one of {GROUP_SIZES}"
    if head_dim % layer.group_size:
        return f"group_size={layer.group_size} does not divide head_dim={head_dim}"
    if layer.value.group_size not in GROUP_SIZES or head_dim % layer.value.group_size:
        return f"v_group_size={layer.value.group_size} is not one of {GROUP_SIZES} that divides head_dim={head_dim}"
    if layer.key.wide > MAX_WIDE:
        return f"{layer.key.wide} wide key channels are more than {MAX_WIDE}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype} is not a type the kernels take"
    return None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor."""
    if device.type != "cuda":
        return _SHARED_H100
    least = 102400  # of the consumer chips; PyTorch before 2.6 does not tell
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", least)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _number_of_splits(device: torch.device, programs: int, capacity: int, step_tokens: int) -> int:
    """Splits that fill the device once, whatever the lengths: from the capacity, which the host knows."""
    most = min(_MAX_SPLITS, -(-capacity // (step_tokens * _MIN_SPLIT_STEPS)))
    return max(min(1, most), min(most, _processors(device) * _PROGRAMS_PER_SM // programs))


def _words(scale: torch.Tensor, per_word: int) -> torch.Tensor:
    """float16 metadata read as integers of `per_word` entries."""
    return scale.view({1: torch.int16, 2: torch.int32, 4: torch.int64}[per_word])


def _side_tensors(side: PackedSide, per_word: int) -> tuple[torch.Tensor, ...]:
    """Codes, scale, minimum, sinks and window as the kernel reads them."""
    if side.bits == FULL_PRECISION_BITS:
        return side.codes, side.codes, side.codes, side.sinks, side.window
    if side.what == "keys":
        return side.codes, side.scale, side.minimum, side.sinks, side.window
    return side.codes.view(torch.int16), _words(side.scale, per_word), side.minimum, side.sinks, side.window


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PackedLayer,
    scaling: float,
    step: Step,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention of new tokens over a layer on a GPU; its lengths are read on the device.

    Args and result are those of `modules.kernels.backend.Backend.attend`, and

        splits: parts the packed tokens are attended in, side by side; None chooses by device and capacity.
    """
    batch, heads, new_tokens, head_dim = query.shape
    shape = Shape.of(layer, heads)
    tile = tile_constants(shape, new_tokens * shape.group, query.element_size(), _shared_memory(query.device))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    rows = new_tokens * shape.group
    row_blocks = -(-rows // tile["N"])
    programs = batch * shape.kv_heads * row_blocks
    if splits is None:
        step_tokens = tile["WARPS"] * tile["U"] * tile["T"]
        splits = _number_of_splits(query.device, programs, layer.key.capacity, step_tokens)
    all_new = step.all_real
    counts = layer.ledger.counts(query.device)
    fresh = counts if all_new else step.lengths_on(query.device)
    # Two numbers a row beside the sums, in one buffer.
    size = programs * (splits + 1) * tile["N"]
    scratch = torch.empty(size * (head_dim + 2), dtype=torch.float32, device=query.device)
    part, ml = scratch[: size * head_dim], scratch[size * head_dim :]
    out = torch.empty(batch, new_tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    per_word = tile["META_PER_WORD"]
    wide = (layer.key.extra, layer.key.order) if layer.key.wide else (counts, counts)
    with torch.cuda.device_of(query):
        attend_splits[(splits + 1, batch * shape.kv_heads, row_blocks)](
            query, key, value, *_side_tensors(layer.key, per_word), *wide, *_side_tensors(layer.value, per_word),
            counts, fresh, part, ml,
            scaling * LOG2_E, batch, layer.key.capacity, new_tokens, splits, row_blocks,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            **tile, ALL_NEW=all_new, ASM=query.is_cuda and not FORCE_PLAIN, **launch_options(tile),
        )  # fmt: skip
        combine_splits[(rows, batch * shape.kv_heads)](
            part, ml, fresh, out, splits + 1, row_blocks, new_tokens, shape.kv_heads, shape.group, head_dim, tile["D_PAD"],
            tile["N"], 16, all_new, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out
