"""Code for scores: queries folded with the metadata of keys, their products with codes, the softmax of a tile."""

from __future__ import annotations

import math

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.emit_metadata import load_key_scales
from modules.kernels.numba.host import row_bytes
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import I32, I64, Emitter


def _emit_fold_keys(e: Emitter[Plan], query, scale, minimum, folded) -> None:
    """`query∘scale` `[rows, head_dim]` of one group of tokens, then `query·minimum` `[rows, lanes]`, yet to be summed.

    The sums start from the second part, so that scores come out about zero: float32 stays exact where the parts with and
    without codes nearly cancel.
    """
    plan = e.plan
    starts = [None] * plan.rows
    for plane, chunk in plan.columns(plan.k_format):
        first = plan.channel(plan.k_format, plane, chunk)
        scales = e.b.fmul(load_key_scales(e, scale, first), e.float_splat(_key_unit(e, plan.k_format, plane, chunk)))
        minima = e.load(e.address(minimum, first * 2), "float16")
        for row in range(plan.rows):
            place = (row * plan.head_dim + first) * 4
            part = e.load(e.address(query, place))
            e.store(e.b.fmul(part, scales), e.address(folded, place))
            starts[row] = e.b.fmul(part, minima) if starts[row] is None else e.multiply_add(part, minima, starts[row])
    for row, start in enumerate(starts):
        e.store(start, e.address(folded, (plan.rows * plan.head_dim + row * plan.lanes) * 4))


def _emit_place_query(e: Emitter[Plan], query, order, placed) -> None:
    """The channels of each row of queries `[rows, head_dim]` in the `order`, int64, in which keys are stored."""
    plan = e.plan
    with cgutils.for_range(e.b, I64(plan.head_dim)) as loop:
        channel = e.load_scalar(e.address(order, 0, loop.index, 8), I64, 8)
        for row in range(plan.rows):
            one = e.load_float(e.address(query, row * plan.head_dim * 4, channel, 4))
            e.store_scalar(one, e.address(placed, row * plan.head_dim * 4, loop.index, 4), 4)


def _emit_key_codes(e: Emitter[Plan], form: int | str, raw: list, extra: list, plane: int, chunk: int) -> list:
    """One column of keys as floats, for every token: its chunk `raw` and the place of its low bits `extra`."""
    if not isinstance(form, int) or not (wide := e.plan.wide_lanes(plane, chunk)):
        return [e.plane(r, form, plane) for r in raw]
    first = e.plan.channel(form, plane, chunk) // 4
    lows = [e.word(e.address(place, first), wide // 4) for place in extra]  # no low bits: no wide channel
    return [e.wide_plane(r, form, plane, low) for r, low in zip(raw, lows)]


def _key_unit(e: Emitter[Plan], form: int | str, plane: int, chunk: int) -> float:
    """What codes of a column are to be multiplied with, beside the scale that is stored."""
    return 0.25 if e.plan.wide_lanes(plane, chunk) else e.unit(form, plane)


def _emit_scores(e: Emitter[Plan], form: int | str, keys, extra, count, folded, scores) -> None:
    """Scores of `count` tokens, `[blocks, padded_rows, tokens]`; those of tokens past the last repeat it."""
    plan = e.plan
    columns, together = plan.columns(form), min(4, plan.tokens)
    last = e.b.sub(count, I64(1))
    blocks = e.b.udiv(e.b.add(count, I64(plan.tokens - 1)), I64(plan.tokens))
    with cgutils.for_range(e.b, blocks) as loop:
        sums = [e.float_splat(0.0)] * plan.block
        first = e.b.mul(loop.index, I64(plan.tokens))
        for base in range(0, plan.tokens, together):
            tokens = [e.b.add(first, I64(base + i)) for i in range(together)]
            if not isinstance(form, int):  # packed groups are whole
                tokens = [e.b.select(e.b.icmp_signed("<", token, last), token, last) for token in tokens]
            places = [e.address(keys, index=token, stride=row_bytes(form, plan.head_dim)) for token in tokens]
            low_bits = [e.address(extra, index=token, stride=plan.extra_bytes) for token in tokens] if extra else []
            starts = [
                e.load(e.address(folded, (plan.rows * plan.head_dim + r * plan.lanes) * 4)) for r in range(plan.rows)
            ]
            parts = [list(starts) for _ in tokens]
            raw: list = []
            loaded = None
            for plane, chunk in columns:
                if chunk != loaded:
                    raw, loaded = [e.raw(e.address(p, e.raw_offset(form, chunk)), form) for p in places], chunk
                codes = _emit_key_codes(e, form, raw, low_bits, plane, chunk)
                channel = plan.channel(form, plane, chunk)
                for row in range(plan.rows):
                    query = e.load(e.address(folded, (row * plan.head_dim + channel) * 4))
                    for i, code in enumerate(codes):
                        parts[i][row] = e.multiply_add(code, query, parts[i][row])
            for i in range(together):
                for row in range(plan.rows):
                    sums[row * plan.tokens + base + i] = parts[i][row]
        for number, vector in enumerate(e.row_sums(sums)):
            e.store(vector, e.address(scores, number * plan.lanes * 4, loop.index, plan.block * 4))


def _emit_score_packed(e: Emitter[Plan], keys, extra, count, folded, scores) -> None:
    _emit_scores(e, e.plan.k_format, keys, extra, count, folded, scores)


def _emit_score_dense(e: Emitter[Plan], keys, count, folded, scores) -> None:
    _emit_scores(e, e.plan.dense, keys, None, count, folded, scores)


def _emit_softmax(e: Emitter[Plan], scores, count, maximum, total, decay) -> None:
    """Scores of a tile into weights `2**(score - maximum)`, in place; zero past `count`.

    `maximum` and `total` `[padded_rows, tokens]` go on from the tiles before; what those summed is to be multiplied with
    `decay`.
    """
    plan, n = e.plan, e.plan.block
    blocks = e.b.udiv(e.b.add(count, I64(plan.tokens - 1)), I64(plan.tokens))
    lane_token = ir.Constant(ir.VectorType(I32, n), [I32(lane % plan.tokens) for lane in range(n)])
    old = e.load(maximum, lanes=n)
    highest = e.variable(old)
    with cgutils.for_range(e.b, blocks) as loop:
        place = e.address(scores, 0, loop.index, n * 4)
        left = e.b.sub(count, e.b.mul(loop.index, I64(plan.tokens)))
        left = e.broadcast(e.b.trunc(left, I32), n)
        real = e.b.icmp_signed("<", lane_token, left)
        block = e.b.select(real, e.load(place, lanes=n), e.float_splat(-math.inf, n))
        e.store(block, place)
        e.b.store(e.maximum(e.b.load(highest), block), highest)
    new = e.across_tokens(e.b.load(highest), e.maximum)
    factor = e.exp2(e.b.fsub(old, new))
    sums = e.variable(e.b.fmul(e.load(total, lanes=n), factor))
    with cgutils.for_range(e.b, blocks) as loop:
        place = e.address(scores, 0, loop.index, n * 4)
        weights = e.exp2(e.b.fsub(e.load(place, lanes=n), new))
        e.store(weights, place)
        e.b.store(e.b.fadd(e.b.load(sums), weights), sums)
    e.store(new, maximum)
    e.store(e.b.load(sums), total)
    e.store(factor, decay)


def _emit_sum_total(e: Emitter[Plan], total) -> None:
    """The totals of each row's tokens, added up."""
    e.store(e.across_tokens(e.load(total, lanes=e.plan.block), e.b.fadd), total)


@intrinsic
def fold_keys(typingctx, plan, query, scale, minimum, folded):
    """See `_emit_fold_keys`."""
    return void_signature(plan, query, scale, minimum, folded), emitting(_emit_fold_keys)


@intrinsic
def place_query(typingctx, plan, query, order, placed):
    """See `_emit_place_query`."""
    return void_signature(plan, query, order, placed), emitting(_emit_place_query)


@intrinsic
def score_packed(typingctx, plan, keys, extra, count, folded, scores):
    """See `_emit_scores`, for packed keys."""
    return void_signature(plan, keys, extra, count, folded, scores), emitting(_emit_score_packed)


@intrinsic
def score_dense(typingctx, plan, keys, count, folded, scores):
    """See `_emit_scores`, for keys in the model's dtype."""
    return void_signature(plan, keys, count, folded, scores), emitting(_emit_score_dense)


@intrinsic
def softmax(typingctx, plan, scores, count, maximum, total, decay):
    """See `_emit_softmax`."""
    return void_signature(plan, scores, count, maximum, total, decay), emitting(_emit_softmax)


@intrinsic
def sum_total(typingctx, plan, total):
    """See `_emit_sum_total`."""
    return void_signature(plan, total), emitting(_emit_sum_total)
