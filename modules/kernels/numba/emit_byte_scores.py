"""Code for scores of packed keys by products of bytes: queries folded with the scales of a group become int8 numbers."""

from __future__ import annotations

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


def _planes(plan: Plan) -> int:
    return 8 // plan.k_format


def _position(e: ByteEmitter, plane: int) -> int:
    """The bit from which on codes of a plane meet queries; in a plane with wide channels the low two are theirs."""
    if e.plan.wide > plane * e.plan.k_bytes:
        return 2
    return e.position(e.plan.k_format, plane, _MOST[byte_products()])


def _middle(e: ByteEmitter, plane: int, first: int):
    """The middle of the codes of a chunk, as they meet queries."""
    plan, position = e.plan, _position(e, plane)
    narrow, wide = ((1 << plan.k_format) - 1) / 2 * 2**position, 7.5
    numbers = [wide if channel < plan.wide else narrow for channel in range(first, first + plan.lanes)]
    return ir.Constant(ir.VectorType(F32, plan.lanes), [ir.Constant(F32, number) for number in numbers])


def _emit_fold_in_bytes(e: Emitter[Plan], query, scale, minimum, folded, units) -> None:
    """`query∘scale` of one group of tokens as int8 `[rows, head_dim]`, and float32 `[rows, planes + 1]`: what one step of a
    plane's numbers is, and what scores start from.

    Rounding moves a score by `Σ error·code`. The part of it that all tokens share, `Σ error·middle`, is known, and taken off
    where scores start.
    """
    if not e.plan.k_in_bytes:
        return
    e = ByteEmitter(e)
    plan, planes = e.plan, _planes(e.plan)
    starts = [e.float_splat(0.0)] * plan.rows
    for plane in range(planes):
        unit = e.float_splat(2.0 ** -_position(e, plane))
        channels = [plan.channel(plan.k_format, p, c) for p, c in plan.columns(plan.k_format) if p == plane]
        parts: list[list] = [[] for _ in range(plan.rows)]
        for first in channels:
            scales = e.b.fmul(e.load(e.address(scale, first * 2), "float16"), unit)
            least = e.multiply_add(scales, _middle(e, plane, first), e.load(e.address(minimum, first * 2), "float16"))
            for row in range(plan.rows):
                part = e.load(e.address(query, (row * plan.head_dim + first) * 4))
                starts[row] = e.multiply_add(part, least, starts[row])
                parts[row].append(e.b.fmul(part, scales))
        largest = []
        for row in parts:
            most = e.magnitude(row[0])
            for part in row[1:]:
                most = e.maximum(most, e.magnitude(part))
            largest.append(most)
        steps, inverses = zip(*(e.units(most, _LEVELS) for most in e.merged(largest, e.maximum)))
        for row in range(plan.rows):
            step, inverse = e.row_of(steps, row), e.row_of(inverses, row)
            place = e.address(units, (row * (planes + 1) + plane) * 4)
            e.store_scalar(e.b.extract_element(step, I32(0)), place, 4)
            middles = e.float_splat(0.0)
            for first, part in zip(channels, parts[row]):
                small, whole = e.as_bytes(part, inverse)
                e.store_bytes(small, e.address(folded, row * plan.head_dim + first))
                middles = e.multiply_add(whole, _middle(e, plane, first), middles)
            starts[row] = e.b.fsub(starts[row], e.b.fmul(middles, step))
    starts = e.merged(starts, e.b.fadd)
    for row in range(plan.rows):
        start = e.row_of(starts, row)
        place = e.address(units, (row * (planes + 1) + planes) * 4)
        e.store_scalar(e.b.extract_element(start, I32(0)), place, 4)


def _emit_score_bytes(e: Emitter[Plan], keys, extra, folded, units, scores) -> None:
    """Scores of a group of tokens, `[blocks, padded_rows, tokens]`, from what `_emit_fold_in_bytes` made of queries."""
    if not e.plan.k_in_bytes:
        return
    e = ByteEmitter(e)
    plan, planes, lanes = e.plan, _planes(e.plan), host()[0]
    words = ir.VectorType(I32, lanes)
    zero, width = ir.Constant(words, [I32(0)] * lanes), plan.k_bytes // 4
    with cgutils.for_range(e.b, I64(plan.group_size // lanes)) as loop:
        place = e.address(keys, 0, loop.index, lanes * plan.k_bytes)
        raw = [e._load(e.address(place, 4 * lanes * number), words, 1) for number in range(width)]
        columns = e.columns_of(raw, width)
        lows = _low_bits(e, e.address(extra, 0, loop.index, lanes * plan.extra_bytes), lanes) if plan.wide else []
        rows = [
            e.broadcast(e.load_float(e.address(units, (row * (planes + 1) + planes) * 4)), lanes) for row in range(plan.rows)
        ]
        for plane in range(planes):
            sums = [zero] * plan.rows
            for column, word in enumerate(columns):
                number = plane * width + column  # of four channels
                if 4 * number < plan.wide:
                    codes = e.wide_codes(word, plane, lows[number // 4], number % 4)
                else:
                    codes = e.codes(word, plan.k_format, plane, _position(e, plane))
                for row in range(plan.rows):
                    query = e.splat_word(e.address(folded, row * plan.head_dim + 4 * number), lanes)
                    sums[row] = e.add_products(sums[row], codes, query)
            for row in range(plan.rows):
                step = e.broadcast(e.load_float(e.address(units, (row * (planes + 1) + plane) * 4)), lanes)
                rows[row] = e.multiply_add(e.b.sitofp(sums[row], step.type), step, rows[row])
        rows += [e.float_splat(0.0, lanes)] * (plan.padded_rows - plan.rows)
        for _ in range(plan.padded_rows.bit_length() - 1):
            rows = e.unzipped(rows, plan.tokens)
        for number, block in enumerate(rows):
            target = e.address(scores, number * plan.block * 4, loop.index, plan.padded_rows * lanes * 4)
            e.store(block, target)


def _low_bits(e: ByteEmitter, place, lanes: int) -> list:
    """The low bits of `lanes` tokens: a lane of vector `n` has the bytes `4n…4n + 3` of its token."""
    size = e.plan.extra_bytes
    if size % 4 == 0:
        words = ir.VectorType(I32, lanes)
        raw = [e._load(e.address(place, 4 * lanes * number), words, 1) for number in range(size // 4)]
        return e.columns_of(raw, size // 4)
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
