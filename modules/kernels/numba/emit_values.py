"""Code for the weighted sum of values: weights spread over the scales of groups, and their products with codes."""

from __future__ import annotations

from numba.core import cgutils
from numba.extending import intrinsic

from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.emit_metadata import load_value_metadata
from modules.kernels.numba.host import host, row_bytes
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import I64, Emitter


def _emit_spread(e: Emitter[Plan], weights, count, scale, minimum, spread, offsets) -> None:
    """Weights of `count` tokens times the scale of each group, `[groups, tile blocks, padded_rows, tokens]`, and
    `Σ weight·minimum`, `[groups, padded_rows, tokens]`, a row's sum in each of its lanes."""
    plan, n = e.plan, e.plan.block
    tile = plan.tile_tokens * plan.padded_rows * 4
    blocks = e.b.udiv(count, I64(plan.tokens))
    orders = [[(lane % plan.tokens) * plan.groups + group for lane in range(n)] for group in range(plan.groups)]
    sums = [e.variable(e.float_splat(0.0, n)) for _ in orders]
    with cgutils.for_range(e.b, blocks) as loop:
        block = e.load(e.address(weights, 0, loop.index, n * 4), lanes=n)
        scales, minima = load_value_metadata(e, scale, minimum, loop.index)
        for group, order in enumerate(orders):
            scaled = e.b.fmul(block, e.shuffle(scales, scales, order))
            e.store(scaled, e.address(spread, group * tile, loop.index, n * 4))
            sum_ = e.multiply_add(block, e.shuffle(minima, minima, order), e.b.load(sums[group]))
            e.b.store(sum_, sums[group])
    for group, slot in enumerate(sums):
        e.store(e.across_tokens(e.b.load(slot), e.b.fadd), e.address(offsets, group * n * 4))


def _emit_accumulate(e: Emitter[Plan], form: int | str, values, count, weights, offsets, decay, sums) -> None:
    """`sums` `[rows, head_dim]` times `decay`, plus the weighted values of `count` tokens.

    A tile adds up from zero and gets its offsets before it joins `sums`: what nearly cancels does so early.
    """
    plan = e.plan
    blocks = e.b.udiv(e.b.add(count, I64(plan.tokens - 1)), I64(plan.tokens))
    last = e.b.sub(count, I64(1))
    columns = plan.columns(form)
    for first in range(0, len(columns), columns_together(plan, form)):
        batch = columns[first : first + columns_together(plan, form)]
        slots = [[e.variable(e.float_splat(0.0)) for _ in range(plan.rows)] for _ in batch]
        with cgutils.for_range(e.b, blocks) as loop:
            parts = [[e.b.load(slot) for slot in column] for column in slots]
            block = e.address(weights, 0, loop.index, plan.block * 4)
            start = e.b.mul(loop.index, I64(plan.tokens))
            for i in range(plan.tokens):
                _emit_one_value(e, form, values, e.b.add(start, I64(i)), last, block, i, batch, parts)
            for column, vectors in zip(slots, parts):
                for slot, vector in zip(column, vectors):
                    e.b.store(vector, slot)
        for (plane, chunk), column in zip(batch, slots):
            channel = plan.channel(form, plane, chunk)
            for row, slot in enumerate(column):
                part = e.b.load(slot)
                if isinstance(form, int):
                    place = (channel // plan.v_group * plan.block + row * plan.tokens) * 4
                    offset = e.broadcast(e.load_float(e.address(offsets, place)))
                    part = e.multiply_add(part, e.float_splat(e.unit(form, plane)), offset)
                place = e.address(sums, (row * plan.head_dim + channel) * 4)
                factor = e.broadcast(e.load_float(e.address(decay, row * plan.tokens * 4)))
                e.store(e.multiply_add(e.load(place), factor, part), place)


def columns_together(plan: Plan, form: int | str) -> int:
    """Columns whose accumulators fit the registers together, whole planes where they do."""
    most = max(1, host()[1] // plan.rows)
    planes = 8 // form if isinstance(form, int) else 1
    return most // planes * planes if most >= planes else 1 << (most.bit_length() - 1)


def _emit_one_value(e: Emitter[Plan], form: int | str, values, token, last, block, lane: int, batch, parts) -> None:
    plan = e.plan
    if not isinstance(form, int):  # packed groups are whole
        token = e.b.select(e.b.icmp_signed("<", token, last), token, last)
    value = e.address(values, index=token, stride=row_bytes(form, plan.head_dim))
    tile = plan.tile_tokens * plan.padded_rows * 4
    raw, loaded, factors = None, None, {}
    for column, (plane, chunk) in enumerate(batch):
        if chunk != loaded:
            raw, loaded = e.raw(e.address(value, e.raw_offset(form, chunk)), form), chunk
        codes = e.plane(raw, form, plane)
        group = plan.channel(form, plane, chunk) // plan.v_group if isinstance(form, int) else 0
        for row in range(plan.rows):
            if (group, row) not in factors:
                place = e.address(block, group * tile + (row * plan.tokens + lane) * 4)
                factors[group, row] = e.broadcast(e.load_float(place))
            parts[column][row] = e.multiply_add(codes, factors[group, row], parts[column][row])


def _emit_accumulate_packed(e: Emitter[Plan], values, count, weights, offsets, decay, sums) -> None:
    _emit_accumulate(e, e.plan.v_format, values, count, weights, offsets, decay, sums)


def _emit_accumulate_dense(e: Emitter[Plan], values, count, weights, offsets, decay, sums) -> None:
    _emit_accumulate(e, e.plan.dense, values, count, weights, offsets, decay, sums)


@intrinsic
def spread(typingctx, plan, weights, count, scale, minimum, spread, offsets):
    """See `_emit_spread`."""
    return void_signature(plan, weights, count, scale, minimum, spread, offsets), emitting(_emit_spread)


@intrinsic
def accumulate_packed(typingctx, plan, values, count, weights, offsets, decay, sums):
    """See `_emit_accumulate`, for packed values."""
    return void_signature(plan, values, count, weights, offsets, decay, sums), emitting(_emit_accumulate_packed)


@intrinsic
def accumulate_dense(typingctx, plan, values, count, weights, offsets, decay, sums):
    """See `_emit_accumulate`, for values in the model's dtype."""
    return void_signature(plan, values, count, weights, offsets, decay, sums), emitting(_emit_accumulate_dense)
