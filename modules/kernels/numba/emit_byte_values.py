"""Code for the weighted sum of packed values by products of bytes: weights times the scales of values become uint8 numbers."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.emit_metadata import load_value_metadata
from modules.kernels.numba.emit_values import columns_together
from modules.kernels.numba.host import byte_products
from modules.kernels.numba.integers import ByteEmitter
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import I32, I64, Emitter

_LEVELS = 255  # of a weight
_MOST = {"vnni": 127, "pairs": 64}  # what codes may reach, so that products add up


def _position(e: ByteEmitter, plane: int) -> int:
    """The bit from which on codes of a plane meet weights."""
    return e.position(e.plan.v_bits, plane, _MOST[byte_products()])


def _emit_spread_in_bytes(e: Emitter[Plan], weights, count, scale, minimum, spread, small, units, offsets) -> None:
    """Weights of `count` tokens times the scale of each group, as uint8 `[groups, tile steps, padded_rows, step]`.

    Beside them come, `[groups, padded_rows, tokens]`, a row's number in each of its lanes, `units`, what one step of these
    bytes is, and `offsets`, `Σ weight·minimum` and what rounding took off at the middle code: the sum of the weights stays
    what it was. `spread` is worked in.
    """
    if not e.plan.v_in_bytes:
        return
    e = ByteEmitter(e)
    plan, n = e.plan, e.plan.block
    middle = ((1 << plan.v_bits) - 1) / 2
    tile = plan.tile_tokens * plan.padded_rows
    tile_metadata = plan.tile_tokens * plan.groups * plan.v_scale_bytes
    for metadata in (scale, minimum):
        e.fetch(metadata, tile_metadata, tile_metadata)
    orders = [[(lane % plan.tokens) * plan.groups + group for lane in range(n)] for group in range(plan.groups)]
    sums, most = ([e.variable(e.float_splat(0.0, n)) for _ in orders] for _ in range(2))
    with cgutils.for_range(e.b, e.b.udiv(count, I64(plan.tokens))) as loop:
        block = e.load(e.address(weights, 0, loop.index, n * 4), lanes=n)
        scales, minima = load_value_metadata(e, scale, minimum, loop.index)
        minima = e.multiply_add(scales, e.float_splat(middle, scales.type.count), minima)
        for group, order in enumerate(orders):
            scaled = e.b.fmul(block, e.shuffle(scales, scales, order))
            e.store(scaled, e.address(spread, group * tile * 4, loop.index, n * 4))
            e.b.store(e.maximum(e.b.load(most[group]), scaled), most[group])
            e.b.store(e.multiply_add(block, e.shuffle(minima, minima, order), e.b.load(sums[group])), sums[group])
    blocks = plan.step // plan.tokens
    for group in range(plan.groups):
        unit, inverse = e.units(e.across_tokens(e.b.load(most[group]), e.maximum), _LEVELS)
        wholes = e.variable(e.int_splat(0, n))
        with cgutils.for_range(e.b, e.b.udiv(count, I64(plan.step))) as loop:
            parts = []
            for number in range(blocks):
                place = e.address(spread, (group * tile + number * n) * 4, loop.index, blocks * n * 4)
                whole = e.counted(e.load(place, lanes=n), inverse)
                e.b.store(e.b.add(e.b.load(wholes), whole), wholes)
                parts.append(e.low_bytes(whole))
            e.store_bytes(_side_by_side(e, parts), e.address(small, group * tile, loop.index, blocks * n))
        wholes = e.counted_sum(e.b.load(wholes), e.b.trunc(e.b.udiv(count, I64(plan.tokens)), I32))
        lost = e.b.fmul(e.b.fmul(wholes, unit), e.float_splat(middle, n))
        e.store(e.across_tokens(e.b.fsub(e.b.load(sums[group]), lost), e.b.fadd), e.address(offsets, group * n * 4))
        e.store(unit, e.address(units, group * n * 4))


def _side_by_side(e: ByteEmitter, blocks: list):
    """Blocks `[padded_rows, tokens]` of consecutive tokens as one `[padded_rows, all tokens]`."""
    if len(blocks) == 1:
        return blocks[0]
    half = len(blocks) // 2
    first, second = _side_by_side(e, blocks[:half]), _side_by_side(e, blocks[half:])
    run, size = half * e.plan.tokens, first.type.count
    order = [which * size + row * run + i for row in range(e.plan.padded_rows) for which in (0, 1) for i in range(run)]
    return e.shuffle(first, second, order)


def _emit_accumulate_bytes(e: Emitter[Plan], values, count, small, units, offsets, decay, sums) -> None:
    """`sums` `[rows, head_dim]` times `decay`, plus the weighted values of `count` tokens: see `_emit_spread_in_bytes`."""
    if not e.plan.v_in_bytes:
        return
    e = ByteEmitter(e)
    plan, form = e.plan, e.plan.v_format
    columns, together = plan.columns(form), columns_together(plan, form)
    zero = e.int_splat(0)
    for first in range(0, len(columns), together):
        batch = columns[first : first + together]
        slots = [[e.variable(zero) for _ in range(plan.rows)] for _ in batch]
        with cgutils.for_range(e.b, e.b.udiv(count, I64(plan.step))) as loop:
            parts = [[e.b.load(slot) for slot in column] for column in slots]
            weights = e.address(small, 0, loop.index, plan.padded_rows * plan.step)
            place = e.address(values, 0, loop.index, plan.step * plan.v_bytes)
            if first == 0:
                e.fetch(place, plan.tile_tokens * plan.v_bytes, plan.step * plan.v_bytes)
            for four in range(0, plan.step, 4):
                _emit_four_values(e, e.address(place, four * plan.v_bytes), e.address(weights, four), batch, parts)
            for column, vectors in zip(slots, parts):
                for slot, vector in zip(column, vectors):
                    e.b.store(vector, slot)
        for (plane, chunk), column in zip(batch, slots):
            channel = plan.channel(form, plane, chunk)
            for row, slot in enumerate(column):
                place = (channel // plan.v_group * plan.block + row * plan.tokens) * 4
                unit, offset = (e.broadcast(e.load_float(e.address(t, place))) for t in (units, offsets))
                unit = e.b.fmul(unit, e.float_splat(2.0 ** -_position(e, plane)))
                part = e.multiply_add(e.b.sitofp(e.b.load(slot), unit.type), unit, offset)
                place = e.address(sums, (row * plan.head_dim + channel) * 4)
                factor = e.broadcast(e.load_float(e.address(decay, row * plan.tokens * 4)))
                e.store(e.multiply_add(e.load(place), factor, part), place)


def _emit_four_values(e: ByteEmitter, values, weights, batch, parts) -> None:
    """Four tokens' part of some columns."""
    plan, form = e.plan, e.plan.v_bits
    tile = plan.tile_tokens * plan.padded_rows
    words, factors = {}, {}
    for column, (plane, chunk) in enumerate(batch):
        if chunk not in words:
            words[chunk] = _four_side_by_side(e, values, chunk)
        codes = e.codes(words[chunk], form, plane, _position(e, plane))
        group = plan.channel(form, plane, chunk) // plan.v_group
        for row in range(plan.rows):
            if (group, row) not in factors:
                factors[group, row] = e.splat_word(e.address(weights, group * tile + row * plan.step), plan.lanes)
            parts[column][row] = e.add_products(parts[column][row], factors[group, row], codes)


def _four_side_by_side(e: ByteEmitter, values, chunk: int):
    """A chunk of bytes of four tokens, those of one place in a lane."""
    lanes, size = e.plan.lanes, e.plan.v_bytes
    first = chunk * lanes
    if 4 * size <= 128:
        flat = e.load_bytes(values, 4 * size)
        whole = e.shuffle(flat, flat, [token * size + first + lane for lane in range(lanes) for token in range(4)])
    else:
        tokens = [e.load_bytes(e.address(values, token * size + first), lanes) for token in range(4)]
        pairs = [e.shuffle(tokens[i], tokens[i + 1], list(range(2 * lanes))) for i in (0, 2)]
        whole = e.shuffle(pairs[0], pairs[1], [token * lanes + lane for lane in range(lanes) for token in range(4)])
    return e.b.bitcast(whole, ir.VectorType(I32, lanes))


@intrinsic
def spread_in_bytes(typingctx, plan, weights, count, scale, minimum, spread, small, units, offsets):
    """See `_emit_spread_in_bytes`."""
    signature = void_signature(plan, weights, count, scale, minimum, spread, small, units, offsets)
    return signature, emitting(_emit_spread_in_bytes)


@intrinsic
def accumulate_bytes(typingctx, plan, values, count, small, units, offsets, decay, sums):
    """See `_emit_accumulate_bytes`."""
    return void_signature(plan, values, count, small, units, offsets, decay, sums), emitting(_emit_accumulate_bytes)
