"""Code for scores of packed keys by products of bytes: queries folded with the scales of a group become int8 numbers."""

from __future__ import annotations

import dataclasses

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.emit_metadata import load_key_scales
from modules.kernels.numba.host import host
from modules.kernels.numba.integers import ByteEmitter
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import F32, I32, I64, Emitter

_LEVELS = 127  # of an int8 query on either side of zero


def _position(plan: Plan) -> int:
    """The bit from which on codes meet queries: below codes of 2 bits, and where there are wide channels, is room for the low two of
    those."""
    return 2 if plan.k_bits == 2 or plan.wide else 0


def _most(plan: Plan, channel: int) -> int:
    """The largest code of a channel, as it meets queries."""
    most = (1 << plan.k_bits) - 1 << _position(plan)
    return most | 3 if channel < plan.wide else most


def _middles(e: ByteEmitter, first: int):
    """The middle of the codes of a vector's channels, float32, in the unit of scales."""
    plan = e.plan
    numbers = [_most(plan, channel) / 2 ** (1 + _position(plan)) for channel in range(first, first + plan.lanes)]
    return ir.Constant(ir.VectorType(F32, plan.lanes), [ir.Constant(F32, number) for number in numbers])


def _most_as_bytes(e: ByteEmitter, first: int):
    """The largest codes of four vectors' channels, bytes as `ByteEmitter.packed` has them, as int32."""
    plan = e.plan
    words = [0] * plan.lanes
    for word in range(plan.lanes):
        codes = [_most(plan, first + 4 * word + byte) for byte in range(4)]
        words[e.place_of_packed(word, plan.lanes)] = int.from_bytes(codes, "little")
    return ir.Constant(ir.VectorType(I32, plan.lanes), [I32(word) for word in words])


@dataclasses.dataclass(frozen=True)
class _Units:
    """Where the float32 numbers lie that belong to queries in bytes, each `[rows]`: the largest magnitude of a row, what one
    step of its bytes is, and what scores start from. Each stands where its sum over lanes came out."""

    plan: Plan

    def size(self, row: int) -> int:
        return 4 * ByteEmitter.place_of_merged(row, self.plan.rows, self.plan.lanes)

    def step(self, row: int) -> int:
        return self.size(row) + 4 * self.plan.merged_rows

    def start(self, row: int) -> int:
        return self.size(row) + 8 * self.plan.merged_rows


def _emit_normalize_query(e: Emitter[Plan], query, placed, units) -> None:
    """Queries `[rows, head_dim]`, each row divided by its largest magnitude, and behind them the largest magnitude of each
    channel then, `[head_dim]`: one bound for all rows, which every group of tokens uses."""
    if not e.plan.k_in_bytes:
        return
    e = ByteEmitter(e)
    plan, place = e.plan, _Units(e.plan)
    zero, sizes = e.float_splat(0.0), []
    channels = range(0, plan.head_dim, plan.lanes)
    for row in range(plan.rows):
        size = zero
        for first in channels:
            size = e.maximum(size, e.magnitude(e.load(e.address(query, (row * plan.head_dim + first) * 4))))
        sizes.append(size)
    for number, vector in enumerate(e.merged(sizes, e.maximum)):
        size, inverse = e.units(vector, 1)
        e.store(size, e.address(units, place.size(0) + 4 * plan.lanes * number))
        e.store(inverse, e.address(units, place.step(0) + 4 * plan.lanes * number))
    inverses = [e.broadcast(e.load_float(e.address(units, place.step(row)))) for row in range(plan.rows)]
    for first in channels:
        most = zero
        for row, inverse in enumerate(inverses):
            at = (row * plan.head_dim + first) * 4
            part = e.b.fmul(e.load(e.address(query, at)), inverse)
            e.store(part, e.address(placed, at))
            most = e.maximum(most, e.magnitude(part))
        e.store(most, e.address(placed, (plan.rows * plan.head_dim + first) * 4))


def _emit_fold_in_bytes(e: Emitter[Plan], placed, scale, minimum, folded, units) -> None:
    """What `_emit_normalize_query` made of queries, times the scales of one group of tokens, as int8 `[rows, folded_bytes]`,
    and `units`, see `_Units`.

    Rounding moves a score by `Σ error·code`. The part of it that all tokens share, `Σ error·middle`, is known, and taken off
    where scores start.
    """
    if not e.plan.k_in_bytes:
        return
    e = ByteEmitter(e)
    plan, place = e.plan, _Units(e.plan)
    ahead = plan.tile_tokens // plan.group_size * plan.head_dim
    for metadata, size in ((scale, plan.k_scale_bytes), (minimum, 2)):
        e.fetch(metadata, ahead * size, plan.head_dim * size)
    scales, most = {}, e.float_splat(0.0)
    for first in range(0, plan.head_dim, plan.lanes):
        scales[first] = load_key_scales(e, scale, first)
        largest = e.load(e.address(placed, (plan.rows * plan.head_dim + first) * 4))
        most = e.maximum(most, e.b.fmul(largest, scales[first]))
    unit, inverse = e.units(e.merged([most], e.maximum)[0], _LEVELS)
    starts, middles = [e.float_splat(0.0)] * plan.rows, [e.int_splat(0)] * plan.rows
    for four in range(0, plan.head_dim, 4 * plan.lanes):
        firsts = range(four, min(four + 4 * plan.lanes, plan.head_dim), plan.lanes)
        factors = [e.b.fmul(scales[first], inverse) for first in firsts]
        least = [
            e.multiply_add(scales[first], _middles(e, first), e.load(e.address(minimum, first * 2), "float16"))
            for first in firsts
        ]
        for row in range(plan.rows):
            parts = [e.load(e.address(placed, (row * plan.head_dim + first) * 4)) for first in firsts]
            for part, numbers in zip(parts, least):
                starts[row] = e.multiply_add(part, numbers, starts[row])
            small = e.packed([e.counted(part, factor) for part, factor in zip(parts, factors)])
            e.store(small, e.address(folded, row * plan.folded_bytes + four))
            middles[row] = e.add_products(middles[row], _most_as_bytes(e, four), small)
    unit = e.b.fmul(unit, e.float_splat(2.0 ** -_position(plan)))
    half = e.b.fmul(unit, e.float_splat(0.5))
    for row, middle in enumerate(middles):
        starts[row] = e.b.fsub(starts[row], e.b.fmul(e.b.sitofp(middle, half.type), half))
    for number, vector in enumerate(e.merged(starts, e.b.fadd)):
        size = e.load(e.address(units, place.size(0) + 4 * plan.lanes * number))
        e.store(e.b.fmul(unit, size), e.address(units, place.step(0) + 4 * plan.lanes * number))
        e.store(e.b.fmul(vector, size), e.address(units, place.start(0) + 4 * plan.lanes * number))


def _emit_score_bytes(e: Emitter[Plan], keys, extra, folded, units, scores) -> None:
    """Scores of a group of tokens, `[blocks, padded_rows, tokens]`, from what `_emit_fold_in_bytes` made of queries."""
    if not e.plan.k_in_bytes:
        return
    e = ByteEmitter(e)
    plan, lanes, place = e.plan, host()[0], _Units(e.plan)
    with cgutils.for_range(e.b, I64(plan.group_size // lanes)) as loop:
        codes = e.address(keys, 0, loop.index, lanes * plan.k_bytes)
        e.fetch(codes, plan.tile_tokens * plan.k_bytes, lanes * plan.k_bytes)
        columns, lows = _columns(e, codes, plan.k_bytes, lanes), []
        if plan.wide:
            low_bits = e.address(extra, 0, loop.index, lanes * plan.extra_bytes)
            e.fetch(low_bits, plan.tile_tokens * plan.extra_bytes, lanes * plan.extra_bytes)
            lows = _columns(e, low_bits, plan.extra_bytes, lanes)
        rows = []
        for row, products in enumerate(_emit_products(e, columns, lows, folded, lanes)):
            step, start = (
                e.broadcast(e.load_float(e.address(units, at)), lanes) for at in (place.step(row), place.start(row))
            )
            rows.append(e.multiply_add(e.b.sitofp(products, step.type), step, start))
        rows += [e.float_splat(0.0, lanes)] * (plan.padded_rows - plan.rows)
        for _ in range(plan.padded_rows.bit_length() - 1):
            rows = e.unzipped(rows, plan.tokens)
        for number, block in enumerate(rows):
            e.store(block, e.address(scores, number * plan.block * 4, loop.index, plan.padded_rows * lanes * 4))


def _emit_products(e: ByteEmitter, columns: list, lows: list, folded, lanes: int) -> list:
    """Each row's products with `lanes` tokens, int32."""
    plan = e.plan
    sums = [e.int_splat(0, lanes)] * plan.rows
    for column, words in enumerate(columns):
        for plane in range(plan.k_planes):
            number = plane * len(columns) + column  # of four channels
            if 4 * number < plan.wide:
                codes = e.wide_codes(words, plane, lows[number // 4], number % 4)
            else:
                codes = e.codes(words, plan.k_bits, plane, _position(plan))
            for row in range(plan.rows):
                place = row * plan.folded_bytes + 4 * e.place_of_packed(number, plan.lanes)
                query = e.splat_word(e.address(folded, place), lanes)
                sums[row] = e.add_products(sums[row], codes, query)
    return sums


def _columns(e: ByteEmitter, place, size: int, lanes: int) -> list:
    """Bytes of `lanes` tokens, `size` of each: a lane of vector `n` has the bytes `4n…4n + 3` of its token."""
    if size % 4 == 0:
        words = ir.VectorType(I32, lanes)
        return e.columns_of(
            [e.load_scalar(e.address(place, first), words, 1) for first in range(0, lanes * size, 4 * lanes)], size // 4
        )
    flat = e.load_bytes(place, lanes * size)
    found = []
    for first in range(0, size, 4):
        order = [token * size + min(first + byte, size - 1) for token in range(lanes) for byte in range(4)]
        found.append(e.b.bitcast(e.shuffle(flat, flat, order), ir.VectorType(I32, lanes)))
    return found


@intrinsic
def normalize_query(typingctx, plan, query, placed, units):
    """See `_emit_normalize_query`."""
    return void_signature(plan, query, placed, units), emitting(_emit_normalize_query)


@intrinsic
def fold_in_bytes(typingctx, plan, placed, scale, minimum, folded, units):
    """See `_emit_fold_in_bytes`."""
    return void_signature(plan, placed, scale, minimum, folded, units), emitting(_emit_fold_in_bytes)


@intrinsic
def score_bytes(typingctx, plan, keys, extra, folded, units, scores):
    """See `_emit_score_bytes`."""
    return void_signature(plan, keys, extra, folded, units, scores), emitting(_emit_score_bytes)
