"""Code for scores of packed keys by products of bytes: queries folded with the scales of a group become int8 numbers."""

from __future__ import annotations

import dataclasses

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.host import byte_products, host
from modules.kernels.numba.integers import ByteEmitter
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import F32, I32, I64, Emitter

_LEVELS = 127  # of an int8 query on either side of zero
_MOST = {"vnni": 255, "pairs": 64}  # what codes may reach, so that products add up


def _position(e: ByteEmitter, plane: int) -> int:
    """The bit from which on codes of a plane meet queries; in a plane with wide channels the low two are theirs."""
    if e.plan.wide > plane * e.plan.k_bytes:
        return 2
    return e.position(e.plan.k_bits, plane, _MOST[byte_products()])


def _middle(e: ByteEmitter, plane: int, first: int):
    """The middle of the codes of a chunk, as they meet queries."""
    plan, position = e.plan, _position(e, plane)
    narrow, wide = ((1 << plan.k_bits) - 1) / 2 * 2**position, 7.5
    numbers = [wide if channel < plan.wide else narrow for channel in range(first, first + plan.lanes)]
    return ir.Constant(ir.VectorType(F32, plan.lanes), [ir.Constant(F32, number) for number in numbers])


@dataclasses.dataclass(frozen=True)
class _Units:
    """Where the float32 numbers lie that belong to queries in bytes: `[rows, planes]` what one step of a plane's numbers is,
    its inverse, and `[rows]` what scores start from. Each stands where its sum over lanes came out."""

    plan: Plan

    def step(self, row: int, plane: int) -> int:
        count = self.plan.rows * self.plan.k_planes
        return 4 * ByteEmitter.place_of_merged(row * self.plan.k_planes + plane, count, self.plan.lanes)

    def inverse(self, row: int, plane: int) -> int:
        return self.step(row, plane) + 4 * self.plan.merged_steps

    def start(self, row: int) -> int:
        return 8 * self.plan.merged_steps + 4 * ByteEmitter.place_of_merged(row, self.plan.rows, self.plan.lanes)


def _emit_fold_in_bytes(e: Emitter[Plan], query, scale, minimum, folded, units) -> None:
    """`query∘scale` of one group of tokens as int8 `[rows, head_dim]`, and `units`, see `_Units`.

    Rounding moves a score by `Σ error·code`. The part of it that all tokens share, `Σ error·middle`, is known, and taken off
    where scores start.
    """
    if not e.plan.k_in_bytes:
        return
    e = ByteEmitter(e)
    plan, place = e.plan, _Units(e.plan)
    ahead = plan.tile_tokens // plan.group_size * plan.head_dim * 2
    for metadata in (scale, minimum):
        e.fetch(metadata, ahead, plan.head_dim * 2)
    steps = [e.float_splat(2.0 ** -_position(e, plane)) for plane in range(plan.k_planes)]
    scales = {
        column: e.b.fmul(
            e.load(e.address(scale, plan.channel(plan.k_format, *column) * 2), "float16"), steps[column[0]]
        )
        for column in plan.columns(plan.k_format)
    }
    starts = _emit_largest(e, query, minimum, scales, units)
    for row in range(plan.rows):
        for plane in range(plan.k_planes):
            inverse = e.broadcast(e.load_float(e.address(units, place.inverse(row, plane))))
            middles = None
            for column in scales:
                if column[0] == plane:
                    first = plan.channel(plan.k_format, *column)
                    part = e.b.fmul(e.load(e.address(query, (row * plan.head_dim + first) * 4)), scales[column])
                    small, whole = e.as_bytes(part, inverse)
                    e.store_bytes(small, e.address(folded, row * plan.head_dim + first))
                    whole = e.b.fmul(whole, _middle(e, plane, first))
                    middles = whole if middles is None else e.b.fadd(middles, whole)
            step = e.broadcast(e.load_float(e.address(units, place.step(row, plane))))
            starts[row] = e.b.fsub(starts[row], e.b.fmul(middles, step))
    for number, vector in enumerate(e.merged(starts, e.b.fadd)):
        e.store(vector, e.address(units, place.start(0) + 4 * plan.lanes * number))


def _emit_largest(e: ByteEmitter, query, minimum, scales: dict, units) -> list:
    """Steps and their inverses into `units`; `query·(minimum + middle·scale)` of each row, yet to be summed."""
    plan, place = e.plan, _Units(e.plan)
    starts: list = [e.float_splat(0.0)] * plan.rows
    largest: dict[tuple[int, int], ir.Value] = {}
    for column, scaled in scales.items():
        first = plan.channel(plan.k_format, *column)
        least = e.load(e.address(minimum, first * 2), "float16")
        least = e.multiply_add(scaled, _middle(e, column[0], first), least)
        for row in range(plan.rows):
            part = e.load(e.address(query, (row * plan.head_dim + first) * 4))
            starts[row] = e.multiply_add(part, least, starts[row])
            size = e.magnitude(e.b.fmul(part, scaled))
            known = largest.get((row, column[0]))
            largest[row, column[0]] = size if known is None else e.maximum(known, size)
    ordered = [largest[row, plane] for row in range(plan.rows) for plane in range(plan.k_planes)]
    for number, most in enumerate(e.merged(ordered, e.maximum)):
        step, inverse = e.units(most, _LEVELS)
        e.store(step, e.address(units, place.step(0, 0) + 4 * plan.lanes * number))
        e.store(inverse, e.address(units, place.inverse(0, 0) + 4 * plan.lanes * number))
    return starts


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
        rows = [e.broadcast(e.load_float(e.address(units, place.start(row))), lanes) for row in range(plan.rows)]
        for plane in range(plan.k_planes):
            for row, products in enumerate(_emit_plane_products(e, columns, lows, plane, folded, lanes)):
                step = e.broadcast(e.load_float(e.address(units, place.step(row, plane))), lanes)
                rows[row] = e.multiply_add(e.b.sitofp(products, step.type), step, rows[row])
        rows += [e.float_splat(0.0, lanes)] * (plan.padded_rows - plan.rows)
        for _ in range(plan.padded_rows.bit_length() - 1):
            rows = e.unzipped(rows, plan.tokens)
        for number, block in enumerate(rows):
            e.store(block, e.address(scores, number * plan.block * 4, loop.index, plan.padded_rows * lanes * 4))


def _emit_plane_products(e: ByteEmitter, columns: list, lows: list, plane: int, folded, lanes: int) -> list:
    """Each row's products with a plane of `lanes` tokens, int32."""
    plan = e.plan
    sums = [e.int_splat(0, lanes)] * plan.rows
    for column, words in enumerate(columns):
        number = plane * len(columns) + column  # of four channels
        if 4 * number < plan.wide:
            codes = e.wide_codes(words, plane, lows[number // 4], number % 4)
        else:
            codes = e.codes(words, plan.k_bits, plane, _position(e, plane))
        for row in range(plan.rows):
            query = e.splat_word(e.address(folded, row * plan.head_dim + 4 * number), lanes)
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
def fold_in_bytes(typingctx, plan, query, scale, minimum, folded, units):
    """See `_emit_fold_in_bytes`."""
    return void_signature(plan, query, scale, minimum, folded, units), emitting(_emit_fold_in_bytes)


@intrinsic
def score_bytes(typingctx, plan, keys, extra, folded, units, scores):
    """See `_emit_score_bytes`."""
    return void_signature(plan, keys, extra, folded, units, scores), emitting(_emit_score_bytes)
