"""Attention over the packed tokens of one head: scores, softmax and weighted values of a step, and the loop over steps.

Tokens are rows and grouped queries columns of every product, so 8 query rows fill a tile. A step has `BATCH = U * WARPS`
blocks of `T` tokens. Every warp keeps its own running softmax over its own groups (the batch dimension of the products),
which is what lets a scale per group sit in the operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modules.kernels.triton.codes import (
    TWO_24,
    codes_of_bytes,
    codes_of_pairs,
    dot,
    masked_bytes,
    numbers,
    plane_mask,
    two_planes_of_pairs,
)
from modules.kernels.triton.metadata import SMALL_MINIMUM, minimum_of_words, scale_of_words, scales_of_words
from modules.kernels.triton.queries import fold_queries, full_precision_queries, low_places
from modules.kernels.triton.softmax import EMPTY, merge_warps, store_softmax


@triton.jit
def _key_metadata(pointer, group, first_channel, TILE: tl.constexpr):
    """Scales or minima of the groups `[BATCH]` for one product, as they lie: `[BATCH, K_USED_PAD]`."""
    D: tl.constexpr = TILE.D
    K_USED: tl.constexpr = TILE.K_USED
    K_USED_PAD: tl.constexpr = TILE.K_USED_PAD
    number = tl.arange(0, K_USED_PAD)
    at = group[:, None] * D + number[None, :]
    if K_USED == K_USED_PAD:
        return tl.load(pointer + at + first_channel)
    else:
        return tl.load(pointer + at + first_channel, mask=number[None, :] < K_USED, other=0)


@triton.jit
def _small_key_scales(pointer, group, first_channel, TILE: tl.constexpr):
    """Scales of 8 bits, read as words of four, for one product: float16 `[BATCH, K_USED_PAD]`."""
    D: tl.constexpr = TILE.D
    BATCH: tl.constexpr = TILE.BATCH
    K_USED: tl.constexpr = TILE.K_USED
    K_USED_PAD: tl.constexpr = TILE.K_USED_PAD
    number = tl.arange(0, K_USED_PAD // 4)
    at = pointer + group[:, None] * (D // 4) + number[None, :] + first_channel // 4
    if K_USED == K_USED_PAD:  # noqa: SIM108 - a load takes no mask of None beside what is there instead
        words = tl.load(at)
    else:
        words = tl.load(at, mask=number[None, :] < K_USED // 4, other=0)
    words = tl.broadcast_to(words[:, :, None], [BATCH, K_USED_PAD // 4, 4])
    byte = tl.broadcast_to(tl.arange(0, 4)[None, None, :], words.shape)
    words, byte = tl.reshape(words, [BATCH, K_USED_PAD]), tl.reshape(byte, [BATCH, K_USED_PAD])
    return scales_of_words(words, byte, TILE.ASM)


@triton.jit
def _key_codes(codes, block, seg, TILE: tl.constexpr):
    """One segment of the bytes of the tokens of blocks `[BATCH]`: `[BATCH, T, K_USED_PAD]`."""
    T: tl.constexpr = TILE.T
    K_WIDTH: tl.constexpr = TILE.K_WIDTH
    K_SEG: tl.constexpr = TILE.K_SEG
    K_USED: tl.constexpr = TILE.K_USED
    K_USED_PAD: tl.constexpr = TILE.K_USED_PAD
    number = tl.arange(0, K_USED_PAD)
    byte = number % K_SEG if TILE.K_FOLD == 2 else number
    token = tl.arange(0, T)
    at = block[:, None, None] * (T * K_WIDTH) + token[None, :, None] * K_WIDTH + byte[None, None, :]
    if K_USED == K_USED_PAD:
        return tl.load(codes + at + seg * K_SEG)
    else:
        return tl.load(codes + at + seg * K_SEG, mask=number[None, None, :] < K_USED, other=0)


@triton.jit
def _key_states(codes, block, seg, packed, TILE: tl.constexpr):
    """One segment of the channels of keys that are rows of numbers, likewise."""
    T: tl.constexpr = TILE.T
    K_WIDTH: tl.constexpr = TILE.K_WIDTH
    K_SEG: tl.constexpr = TILE.K_SEG
    K_USED: tl.constexpr = TILE.K_USED
    K_USED_PAD: tl.constexpr = TILE.K_USED_PAD
    number = tl.arange(0, K_USED_PAD)
    token = block[:, None] * T + tl.arange(0, T)[None, :]
    if TILE.AT_ONCE:
        token = tl.minimum(token, packed - 1)
    at = token[:, :, None] * K_WIDTH + number[None, None, :]
    if K_USED == K_USED_PAD:
        return tl.load(codes + at + seg * K_SEG)
    else:
        return tl.load(codes + at + seg * K_SEG, mask=number[None, None, :] < K_USED, other=0)


@triton.jit
def _key_operand(codes, PLANE: tl.constexpr, TILE: tl.constexpr):
    """The codes of the `PLANE`-th product as float16 `[BATCH, T, K_USED_PAD]`."""
    K_BITS: tl.constexpr = TILE.K_BITS
    ASM: tl.constexpr = TILE.ASM
    if TILE.K_FOLD == 2:
        FIRST: tl.constexpr = plane_mask(K_BITS, 2 * PLANE)
        SECOND: tl.constexpr = plane_mask(K_BITS, 2 * PLANE + 1)
        mask = tl.where(tl.arange(0, TILE.K_USED_PAD) < TILE.K_SEG, FIRST, SECOND)
        return masked_bytes(codes, mask[None, None, :], ASM)
    else:
        MASK: tl.constexpr = plane_mask(K_BITS, PLANE)
        return codes_of_bytes(codes, MASK, ASM)


@triton.jit
def _add_low_scores(scores, folded, keys, block, group, TILE: tl.constexpr):
    """`scores + (q∘scale/4)·low` for the low bits of wide channels."""
    D: tl.constexpr = TILE.D
    T: tl.constexpr = TILE.T
    WIDE_PAD: tl.constexpr = TILE.WIDE_PAD
    BYTES: tl.constexpr = TILE.WIDE // 4  # a token
    is_wide, byte, plane, place = low_places(TILE)
    mask = tl.full([WIDE_PAD], 3, tl.int32) << (2 * plane)
    token = tl.arange(0, T)
    at = block[:, None, None] * (T * BYTES) + token[None, :, None] * BYTES + byte[None, None, :]
    codes = tl.load(keys.extra + at, mask=is_wide[None, None, :], other=0)  # [BATCH, T, WIDE_PAD]
    if TILE.K_SMALL_METADATA:
        words = tl.load(keys.scale + group[:, None] * (D // 4) + (place // 4)[None, :])
        scale = scales_of_words(words, (place % 4)[None, :], TILE.ASM)
    else:
        scale = tl.load(keys.scale + group[:, None] * D + place[None, :])  # [BATCH, WIDE_PAD]
    return tl.dot(masked_bytes(codes, mask[None, None, :], TILE.ASM), folded.low * scale[:, :, None], scores)


@triton.jit
def _scores_of_codes(folded, keys, block, TILE: tl.constexpr):
    """`q·minimum + (q∘scale)·code` of the blocks `[BATCH]`, float32 `[BATCH, T, N]`, in units of 2**-24."""
    T: tl.constexpr = TILE.T
    N: tl.constexpr = TILE.N
    BATCH: tl.constexpr = TILE.BATCH
    SEGS: tl.constexpr = TILE.K_SEGS
    PLANES: tl.constexpr = TILE.K_PLANES
    K_SEG: tl.constexpr = TILE.K_SEG
    K_USED_PAD: tl.constexpr = TILE.K_USED_PAD
    PRODUCT: tl.constexpr = TILE.K_FOLD * TILE.K_WIDTH  # channels between two products of a segment
    group = block * T // TILE.G
    scores = tl.zeros([BATCH, T, N], tl.float32)
    for i in tl.static_range(SEGS * PLANES):
        low = _key_metadata(keys.minimum, group, (i % PLANES) * PRODUCT + (i // PLANES) * K_SEG, TILE)
        scores = tl.dot(tl.broadcast_to(low[:, None, :], [BATCH, T, K_USED_PAD]), folded.plain[i], scores)
    scores = scores * (1.0 / TWO_24)
    for seg in tl.static_range(SEGS):
        codes = _key_codes(keys.codes, block, seg, TILE)
        for plane in tl.static_range(PLANES):
            if TILE.K_SMALL_METADATA:
                scale = _small_key_scales(keys.scale, group, plane * PRODUCT + seg * K_SEG, TILE)
            else:
                scale = _key_metadata(keys.scale, group, plane * PRODUCT + seg * K_SEG, TILE)
            query = folded.scaled[seg * PLANES + plane] * scale[:, :, None]  # [BATCH, K_USED_PAD, N]
            scores = tl.dot(_key_operand(codes, plane, TILE), query, scores)
    if TILE.WIDE > 0:
        scores = _add_low_scores(scores, folded, keys, block, group, TILE)
    return scores


@triton.jit
def _scores_of_states(folded, keys, block, packed, TILE: tl.constexpr):
    """`q·k` of keys that are rows of numbers, float32 `[BATCH, T, N]`."""
    T: tl.constexpr = TILE.T
    N: tl.constexpr = TILE.N
    BATCH: tl.constexpr = TILE.BATCH
    SEGS: tl.constexpr = TILE.K_SEGS
    scores = tl.zeros([BATCH, T, N], tl.float32)
    for seg in tl.static_range(SEGS):
        x = _key_states(keys.codes, block, seg, packed, TILE)
        scores = dot(numbers(x, folded.plain[seg].dtype, TILE.ASM), folded.plain[seg], scores, TILE.ASM)
    return scores


@triton.jit
def _softmax_step(scores, to_score, maximum, total, TILE: tl.constexpr):
    """Weights `[BATCH, T, N]` of `scores`, what older sums decay by `[WARPS, N]`, and the new maximum and total."""
    T: tl.constexpr = TILE.T
    U: tl.constexpr = TILE.U
    WARPS: tl.constexpr = TILE.WARPS
    N: tl.constexpr = TILE.N
    BATCH: tl.constexpr = TILE.BATCH
    highest = tl.max(tl.reshape(tl.max(scores, 1), [U, WARPS, N]), 0) * to_score[None, :]
    new = tl.maximum(maximum, highest)
    decay = tl.exp2(maximum - new)
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
    return p, decay, new, total


@triton.jit
def _weigh_plane(
    acc,
    pairs,
    p,
    words,
    column,
    SEG: tl.constexpr,
    PLANE: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    """`acc + Σ (p·scale) code` for every other channel of a segment: byte `HALF` of the `pairs` `[WARPS, V_COLS, U * T]`,
    their plane `PLANE`, or two where one product takes two."""
    G: tl.constexpr = TILE.VALUE_G
    BITS: tl.constexpr = TILE.V_BITS
    PER_WORD: tl.constexpr = TILE.META_PER_WORD
    SMALL: tl.constexpr = TILE.V_SMALL_METADATA
    ASM: tl.constexpr = TILE.ASM
    MASK: tl.constexpr = plane_mask(BITS, PLANE * TILE.V_FOLD)
    FIRST: tl.constexpr = PLANE * TILE.V_FOLD * TILE.V_WIDTH + SEG * TILE.V_SEG  # channel
    LAST: tl.constexpr = FIRST + TILE.V_SEG * TILE.V_FOLD - 1
    if TILE.V_FOLD == 2:
        second = (column >= TILE.V_SEG // 2)[None, :, None]
        codes = two_planes_of_pairs(pairs, second, MASK, BITS, 8 * HALF, ASM)
    else:
        codes = codes_of_pairs(pairs, MASK, 8 * HALF, ASM)
    if FIRST // G == LAST // G:
        acc = tl.dot(codes, p * scale_of_words(words, FIRST // G, PER_WORD, SMALL)[:, :, None], acc)
    else:
        group_of_column = (FIRST + 2 * column + HALF) // G
        for group in tl.static_range(FIRST // G, LAST // G + 1):
            mine = tl.where((group_of_column == group)[None, :, None], codes, 0.0)
            acc = tl.dot(mine, p * scale_of_words(words, group, PER_WORD, SMALL)[:, :, None], acc)
    return acc


@triton.jit
def _value_words(pointer, token, TILE: tl.constexpr):
    """Metadata of the tokens `[WARPS, U * T]` as words, a tuple of as many as a token has."""
    WORDS: tl.constexpr = TILE.V_GROUPS // TILE.META_PER_WORD
    words = ()
    for word in tl.static_range(WORDS):
        words += (tl.load(pointer + token * WORDS + word),)
    return words


@triton.jit
def _minima(values, scale_words, token, TILE: tl.constexpr):
    """Minima of the tokens `[WARPS, U * T]`, a group a row: `[WARPS, 16, U * T]`; over `SMALL_MINIMUM` at 8 bits."""
    GROUPS: tl.constexpr = TILE.V_GROUPS
    PER_WORD: tl.constexpr = TILE.META_PER_WORD
    row = tl.arange(0, 16)[None, :, None]
    if TILE.V_SMALL_METADATA:
        words = _value_words(values.minimum, token, TILE)
        for group in tl.static_range(GROUPS):
            scale = scale_of_words(scale_words, group, PER_WORD, True)
            minimum = minimum_of_words(words, scale, group, PER_WORD, TILE.V_BITS)[:, None, :]
            if group == 0:  # its copies in rows of no group are not read
                minima = tl.broadcast_to(minimum, [TILE.WARPS, 16, TILE.U * TILE.T])
            else:
                minima = tl.where(row == group, minimum, minima)
        return minima
    else:
        return tl.load(values.minimum + token[:, None, :] * GROUPS + row, mask=row < GROUPS, other=0.0)


@triton.jit
def _weigh_codes(sums, offsets, p, decay, values, token, TILE: tl.constexpr):
    """The decayed `sums` plus `Σ (p·scale) code`, and `offsets` plus `Σ p·minimum`, of the tokens `[WARPS, U * T]`."""
    V_SEG: tl.constexpr = TILE.V_SEG
    V_FOLD: tl.constexpr = TILE.V_FOLD
    V_WIDTH: tl.constexpr = TILE.V_WIDTH
    V_COLS: tl.constexpr = TILE.V_COLS
    SEGS: tl.constexpr = TILE.V_SEGS
    PLANES: tl.constexpr = TILE.V_PLANES
    column = tl.arange(0, V_COLS)
    pair = column % (V_SEG // 2) if V_FOLD == 2 else column
    words = _value_words(values.scale, token, TILE)
    if TILE.EARLY_MINIMA:
        low = _minima(values, words, token, TILE)
    new_sums = ()
    for seg in tl.static_range(SEGS):
        at = token[:, None, :] * (V_WIDTH // 2) + seg * (V_SEG // 2) + pair[None, :, None]
        if V_COLS * 2 == V_SEG * V_FOLD:
            pairs = tl.load(values.codes + at)  # [WARPS, V_COLS, U * T]
        else:
            pairs = tl.load(values.codes + at, mask=column[None, :, None] < V_SEG // 2, other=0)
        for plane in tl.static_range(PLANES):
            for half in tl.static_range(2):
                old = sums[(seg * PLANES + plane) * 2 + half] * decay[:, None, :]
                new_sums += (_weigh_plane(old, pairs, p, words, column, seg, plane, half, TILE),)
    if not TILE.EARLY_MINIMA:
        low = _minima(values, words, token, TILE)
    return new_sums, tl.dot(low, p, offsets * decay[:, None, :])


@triton.jit
def _weigh_states(sums, p, decay, values, token, TILE: tl.constexpr):
    """The decayed `sums` plus `Σ p v` of values that are rows of numbers."""
    SEGS: tl.constexpr = TILE.V_SEGS
    column = tl.arange(0, TILE.V_COLS)
    new_sums = ()
    for seg in tl.static_range(SEGS):
        at = token[:, None, :] * TILE.D + seg * TILE.V_SEG + column[None, :, None]
        y = numbers(tl.load(values.codes + at), p.dtype, TILE.ASM)
        new_sums += (dot(y, p, sums[seg] * decay[:, None, :], TILE.ASM),)
    return new_sums


@triton.jit
def _finish_product(product, offsets, column, NUMBER: tl.constexpr, TILE: tl.constexpr):
    """Channels `[V_COLS]` and values `[V_COLS, N]` of the `NUMBER`-th sum of products: powers of two taken off, offsets on."""
    BITS: tl.constexpr = TILE.V_BITS
    V_SEG: tl.constexpr = TILE.V_SEG
    V_FOLD: tl.constexpr = TILE.V_FOLD
    if BITS == 16:
        return NUMBER * V_SEG + column, product
    else:
        HALF: tl.constexpr = NUMBER % 2
        PLANE: tl.constexpr = NUMBER // 2 % TILE.V_PLANES * V_FOLD
        SEG: tl.constexpr = NUMBER // 2 // TILE.V_PLANES
        UNIT: tl.constexpr = 1.0 / (1 << (BITS * PLANE))
        channel = PLANE * TILE.V_WIDTH + SEG * V_SEG + 2 * column + HALF
        mine = (channel // TILE.VALUE_G)[:, None, None] == tl.arange(0, 16)[None, :, None]
        offset = tl.sum(tl.where(mine, offsets[None, :, :], 0.0), 1)
        second = column // (V_SEG // 2) if V_FOLD == 2 else column * 0  # whether a column is of the next plane
        to_value = tl.where(second > 0, TWO_24 / (1 << BITS), TWO_24) * UNIT
        return channel, product * to_value[:, None] + offset


@triton.jit
def _store_sums(partial, out_at, sums, offsets, weights, TILE: tl.constexpr):
    """Merge the warps' sums into values and store them, `[N, D]`."""
    D: tl.constexpr = TILE.D
    N: tl.constexpr = TILE.N
    PRODUCTS: tl.constexpr = TILE.V_PRODUCTS
    row = tl.arange(0, N)
    column = tl.arange(0, TILE.V_COLS)
    start = partial.sums + out_at.to(tl.int64) * (N * D)
    merged_offsets = merge_warps(offsets, weights)  # [16, N]
    if TILE.V_SMALL_METADATA:
        merged_offsets *= SMALL_MINIMUM
    for i in tl.static_range(PRODUCTS):
        channel, result = _finish_product(merge_warps(sums[i], weights), merged_offsets, column, i, TILE)
        inside = (column * TILE.V_PARTS < TILE.V_SEG * TILE.V_FOLD)[:, None]
        tl.store(start + row[None, :] * D + channel[:, None], result, mask=inside)


@triton.jit
def attend_packed(query, keys, values, partial, out_at, packed, first, last, factor, TILE: tl.constexpr):
    """Steps `first…last` over the `packed` tokens of one head; each warp handles `U` blocks of `T` tokens a step."""
    T: tl.constexpr = TILE.T
    U: tl.constexpr = TILE.U
    WARPS: tl.constexpr = TILE.WARPS
    N: tl.constexpr = TILE.N
    BATCH: tl.constexpr = TILE.BATCH
    V_COLS: tl.constexpr = TILE.V_COLS
    V_PRODUCTS: tl.constexpr = TILE.V_PRODUCTS
    if TILE.K_BITS < 16:
        folded = fold_queries(query, keys.order, factor, TILE)
    else:
        folded = full_precision_queries(query, factor, TILE)
    warp = tl.arange(0, WARPS)
    batch = tl.arange(0, BATCH)
    block_of_batch = (batch % WARPS) * U + batch // WARPS
    warp_token = tl.arange(0, U * T)
    maximum = tl.full([WARPS, N], EMPTY, tl.float32)
    total = tl.zeros([WARPS, 8, N], tl.float32)
    sums = ()
    for _ in tl.static_range(V_PRODUCTS):
        sums += (tl.zeros([WARPS, V_COLS, N], tl.float32),)
    offsets = tl.zeros([WARPS, 16, N], tl.float32)

    for step in tl.range(first, last, num_stages=TILE.STAGES):
        block = step * BATCH + block_of_batch
        if TILE.AT_ONCE:
            inside = (block[:, None] * T + tl.arange(0, T)[None, :] < packed)[:, :, None]
            block = tl.minimum(block, tl.cdiv(packed, T) - 1)
        else:  # whole blocks
            inside = (block < packed // T)[:, None, None]
            block = tl.minimum(block, packed // T - 1)
        if TILE.K_BITS < 16:
            scores = _scores_of_codes(folded, keys, block, TILE)
        else:
            scores = _scores_of_states(folded, keys, block, packed, TILE)
        scores = tl.where(inside, scores, float("-inf"))
        p, decay, maximum, total = _softmax_step(scores, folded.to_score, maximum, total, TILE)

        # The tokens of a warp side by side: [WARPS, U * T, N].
        p = p.to(tl.float16 if TILE.V_BITS < 16 else values.window.dtype.element_ty)
        p = tl.reshape(tl.permute(tl.reshape(p, [U, WARPS, T, N]), (1, 0, 2, 3)), [WARPS, U * T, N])
        token = ((step * WARPS + warp) * (U * T))[:, None] + warp_token[None, :]
        token = tl.minimum(token, packed - 1)
        if TILE.V_BITS < 16:
            sums, offsets = _weigh_codes(sums, offsets, p, decay, values, token, TILE)
        else:
            sums = _weigh_states(sums, p, decay, values, token, TILE)

    weights = store_softmax(partial, out_at, maximum, total, N)
    if first < last:  # the combine step skips splits without tokens
        _store_sums(partial, out_at, sums, offsets, weights, TILE)
