"""Attention over a packed layer on the CPU, compiled by Numba: `attend`, the counterpart of the torch backend.

One unit of work is a KV head of a sequence, a tile of its query rows and a share of its tokens. It walks over the tokens
in tiles of `tile_tokens`: scores, a step of the online softmax in base 2, weighted values. The shares are combined by
log-sum-exp. Everything accumulates in float32.

The shapes of the inner loops are constants of a `Plan`, the type of the kernel's first argument, so that one plan is one
compilation. A model needs one plan for decoding and one more for several new tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import get_thread_id, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modules.kernels.numba.vectors import (
    F32,
    FLOAT_NAMES,
    I32,
    I64,
    ITEM_BYTES,
    ConstantsType,
    Emitter,
    allowed_threads,
    buffer,
    emitting,
    host,
    host_is_supported,
    numba_threads,
    row_bytes,
    void_signature,
)
from modules.kernels.reference.attention import attend as attend_in_torch
from modules.options import FULL_PRECISION_BITS
from modules.store.layer import PackedLayer
from modules.store.step import Step

_MAX_ROWS = 8
_MIN_TILE = 128  # tokens of a tile: its scores and weights stay in the first-level cache
_DENSE_TILES = 2  # what the full-precision tokens count for when tiles are shared out
_MANY_ROWS = 1 << 12  # query rows a KV head above which torch attends: the shares would take too much memory
_LOG2_E = math.log2(math.e)
_SERIAL_WORK = 1 << 21  # multiply-adds below which starting threads costs more than it saves


@dataclasses.dataclass(frozen=True)
class Plan:
    """The constants of one compilation.

    Attributes:
        k_format, v_format: bits of the packed codes, 2, 4 or 8, or the dtype where that side is in full precision.
        dense: dtype of sinks, window and new tokens: "float32", "bfloat16" or "float16".
        rows: query rows that share each load, 1 to 8.
        head_dim: channels.
        group_size, v_group: tokens that share the scale of a key channel; channels that share one of a value.
        wide: wide channels of 2-bit keys, a multiple of 4.
        lanes: float32 lanes of a vector.
        block: scores of one register block, `padded_rows * tokens`.
    """

    k_format: int | str
    v_format: int | str
    dense: str
    rows: int
    head_dim: int
    group_size: int
    v_group: int
    wide: int
    lanes: int
    block: int

    @property
    def padded_rows(self) -> int:
        """`rows` rounded up to a power of two."""
        return 1 << (self.rows - 1).bit_length()

    @property
    def tokens(self) -> int:
        """Tokens of one register block; scores lie as `[blocks, padded_rows, tokens]`."""
        return self.block // self.padded_rows

    @property
    def groups(self) -> int:
        """Groups of channels of a value."""
        return self.head_dim // self.v_group

    @functools.cached_property
    def tile_tokens(self) -> int:
        """Tokens between two steps of the softmax; whole groups."""
        return -(-_MIN_TILE // self.group_size) * self.group_size

    @property
    def k_quantized(self) -> bool:
        return isinstance(self.k_format, int)

    @property
    def v_quantized(self) -> bool:
        return isinstance(self.v_format, int)

    @property
    def k_bytes(self) -> int:
        """Bytes of one packed key."""
        return row_bytes(self.k_format, self.head_dim)

    @property
    def v_bytes(self) -> int:
        return row_bytes(self.v_format, self.head_dim)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the low bits of one key's wide channels."""
        return self.wide // 4

    @property
    def dense_bytes(self) -> int:
        return row_bytes(self.dense, self.head_dim)

    def columns(self, form: int | str) -> list[tuple[int, int]]:
        """`(plane, chunk)` of the vectors that make up a head, planes of one chunk side by side."""
        planes = 8 // form if isinstance(form, int) else 1
        return [(p, c) for c in range(self.head_dim // planes // self.lanes) for p in range(planes)]

    def channel(self, form: int | str, plane: int, chunk: int) -> int:
        """First channel of a column."""
        planes = 8 // form if isinstance(form, int) else 1
        return plane * (self.head_dim // planes) + chunk * self.lanes

    def wide_lanes(self, plane: int, chunk: int) -> int:
        """Lanes of a column of 2-bit keys that are wide channels, which come first."""
        return max(0, min(self.lanes, self.wide - self.channel(2, plane, chunk)))

    # Sections of a thread's scratch, float32, in multiples of a cache line.

    def _sections(self) -> dict[str, int]:
        head = self.rows * self.head_dim
        start = self.rows * self.lanes
        scores = self.tile_tokens * self.padded_rows
        return {
            "query": head + start,
            "placed": head if self.wide else 0,
            "folded": head + start,
            "scores": scores,
            "spread": scores * self.groups,
            "offsets": self.groups * self.block,
            "maximum": self.block,
            "total": self.block,
            "decay": self.block,
        }

    def at(self, section: str) -> int:
        """Where a section of the scratch starts, in floats; "end" gives the size of it all."""
        position = 0
        for name, size in self._sections().items():
            if name == section:
                break
            position += -(-size // 16) * 16
        return position

    def value_of(self, name: str) -> int | bool:
        """What compiled code gets for an attribute; `at_scores` is `at("scores")`."""
        return self.at(name[3:]) if name.startswith("at_") else getattr(self, name)

    @functools.cached_property
    def scratch_floats(self) -> int:
        """Floats a thread works in."""
        return self.at("end")

    @functools.cached_property
    def partial_floats(self) -> int:
        """Floats a unit hands to the combination: sums `[rows, head_dim]`, maxima and totals `[rows]`."""
        return -(-(self.rows * (self.head_dim + 2)) // 16) * 16


# --- emitting vector code ---------------------------------------------------------------------------------------------


def _emit_copy_row(e: Emitter, form: str, source, target, factor) -> None:
    """One row `[head_dim]` of a dtype, times `factor`, as float32."""
    lanes, size = e.plan.lanes, ITEM_BYTES[form]
    factor = e.broadcast(factor)
    for first in range(0, e.plan.head_dim, lanes):
        row = e.load(e.address(source, first * size), form)
        e.store(e.b.fmul(row, factor), e.address(target, first * 4))


def _emit_store_row(e: Emitter, form: str, source, target) -> None:
    """The inverse of `_emit_copy_row`: one float32 row in a dtype, rounded to nearest even."""
    lanes, size = e.plan.lanes, ITEM_BYTES[form]
    for first in range(0, e.plan.head_dim, lanes):
        e.store_as(e.load(e.address(source, first * 4)), e.address(target, first * size), form)


def _emit_fold_keys(e: Emitter, query, scale, minimum, folded) -> None:
    """`query∘scale` `[rows, head_dim]` of one group of tokens, then `query·minimum` `[rows, lanes]`, yet to be summed.

    The sums start from the second part, so that scores come out about zero: float32 stays exact where the parts with and
    without codes nearly cancel.
    """
    plan = e.plan
    starts = [None] * plan.rows
    for plane, chunk in plan.columns(plan.k_format):
        first = plan.channel(plan.k_format, plane, chunk)
        scales = e.load(e.address(scale, first * 2), "float16")
        scales = e.b.fmul(scales, e.float_splat(_key_unit(e, plan.k_format, plane, chunk)))
        minima = e.load(e.address(minimum, first * 2), "float16")
        for row in range(plan.rows):
            place = (row * plan.head_dim + first) * 4
            part = e.load(e.address(query, place))
            e.store(e.b.fmul(part, scales), e.address(folded, place))
            starts[row] = e.b.fmul(part, minima) if starts[row] is None else e.multiply_add(part, minima, starts[row])
    for row, start in enumerate(starts):
        e.store(start, e.address(folded, (plan.rows * plan.head_dim + row * plan.lanes) * 4))


def _emit_place_query(e: Emitter, query, order, placed) -> None:
    """The channels of each row of queries `[rows, head_dim]` in the `order`, int64, in which keys are stored."""
    plan = e.plan
    with cgutils.for_range(e.b, I64(plan.head_dim)) as loop:
        channel = e.load_scalar(e.address(order, 0, loop.index, 8), I64, 8)
        for row in range(plan.rows):
            one = e.load_float(e.address(query, row * plan.head_dim * 4, channel, 4))
            e.store_scalar(one, e.address(placed, row * plan.head_dim * 4, loop.index, 4), 4)


def _emit_key_codes(e: Emitter, form: int | str, raw: list, extra: list, plane: int, chunk: int) -> list:
    """One column of keys as floats, for every token: its chunk `raw` and the place of its low bits `extra`."""
    wide = e.plan.wide_lanes(plane, chunk) if isinstance(form, int) else 0
    if not wide:
        return [e.plane(r, form, plane) for r in raw]
    first = e.plan.channel(form, plane, chunk) // 4
    lows = [e.word(e.address(place, first), wide // 4) for place in extra]  # no low bits: no wide channel
    return [e.wide_plane(r, plane, low) for r, low in zip(raw, lows)]


def _key_unit(e: Emitter, form: int, plane: int, chunk: int) -> float:
    """What codes of a column are to be multiplied with, beside the scale that is stored."""
    return 0.25 if e.plan.wide_lanes(plane, chunk) else e.unit(form, plane)


def _emit_scores(e: Emitter, form: int | str, keys, extra, count, folded, scores) -> None:
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
            raw, loaded = None, None
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


def _emit_softmax(e: Emitter, scores, count, maximum, total, decay) -> None:
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


def _emit_sum_total(e: Emitter, total) -> None:
    """The totals of each row's tokens, added up."""
    e.store(e.across_tokens(e.load(total, lanes=e.plan.block), e.b.fadd), total)


def _emit_spread(e: Emitter, weights, count, scale, minimum, spread, offsets) -> None:
    """Weights of `count` tokens times the scale of each group, `[groups, tile blocks, padded_rows, tokens]`, and
    `Σ weight·minimum`, `[groups, padded_rows, tokens]`, a row's sum in each of its lanes."""
    plan, n = e.plan, e.plan.block
    tile = plan.tile_tokens * plan.padded_rows * 4
    blocks = e.b.udiv(count, I64(plan.tokens))
    stride = plan.tokens * plan.groups
    orders = [[(lane % plan.tokens) * plan.groups + group for lane in range(n)] for group in range(plan.groups)]
    sums = [e.variable(e.float_splat(0.0, n)) for _ in orders]
    with cgutils.for_range(e.b, blocks) as loop:
        block = e.load(e.address(weights, 0, loop.index, n * 4), lanes=n)
        scales, minima = (e.load(e.address(m, 0, loop.index, stride * 2), "float16", stride) for m in (scale, minimum))
        for group, order in enumerate(orders):
            scaled = e.b.fmul(block, e.shuffle(scales, scales, order))
            e.store(scaled, e.address(spread, group * tile, loop.index, n * 4))
            sum_ = e.multiply_add(block, e.shuffle(minima, minima, order), e.b.load(sums[group]))
            e.b.store(sum_, sums[group])
    for group, slot in enumerate(sums):
        e.store(e.across_tokens(e.b.load(slot), e.b.fadd), e.address(offsets, group * n * 4))


def _emit_accumulate(e: Emitter, form: int | str, values, count, weights, offsets, decay, sums) -> None:
    """`sums` `[rows, head_dim]` times `decay`, plus the weighted values of `count` tokens.

    A tile adds up from zero and gets its offsets before it joins `sums`: what nearly cancels does so early.
    """
    plan = e.plan
    blocks = e.b.udiv(e.b.add(count, I64(plan.tokens - 1)), I64(plan.tokens))
    last = e.b.sub(count, I64(1))
    columns = plan.columns(form)
    for first in range(0, len(columns), _columns_together(plan, form)):
        batch = columns[first : first + _columns_together(plan, form)]
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


def _columns_together(plan: Plan, form: int | str) -> int:
    """Columns whose accumulators fit the registers together, whole planes where they do."""
    most = max(1, host()[1] // plan.rows)
    planes = 8 // form if isinstance(form, int) else 1
    return most // planes * planes if most >= planes else 1 << (most.bit_length() - 1)


def _emit_one_value(e: Emitter, form: int | str, values, token, last, block, lane: int, batch, parts) -> None:
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


def _emit_rotate(e: Emitter, row) -> None:
    """`head_dim` floats times `modules.codecs.rotation.hadamard`, in place: butterflies within vectors, then between them."""
    lanes, head_dim = e.plan.lanes, e.plan.head_dim
    size = head_dim & -head_dim  # the largest power of two that divides it
    places = [e.address(row, 4 * lanes * number) for number in range(head_dim // lanes)]
    parts = [e.load(place) for place in places]
    step = 1
    while step < size:
        if step < lanes:
            signs = ir.Constant(
                parts[0].type, [ir.Constant(F32, -1.0 if lane & step else 1.0) for lane in range(lanes)]
            )
            order = [lane ^ step for lane in range(lanes)]
            parts = [e.multiply_add(part, signs, e.shuffle(part, part, order)) for part in parts]
        else:
            for first in range(len(parts)):
                other = first ^ (step // lanes)
                if first < other:
                    low, high = parts[first], parts[other]
                    parts[first], parts[other] = e.b.fadd(low, high), e.b.fsub(low, high)
        step *= 2
    for place, part in zip(places, parts):
        e.store(e.b.fmul(part, e.float_splat(1 / math.sqrt(size))), place)


# --- the emitted code as functions of compiled code -------------------------------------------------------------------


@intrinsic
def _copy_row(typingctx, plan, source, target, factor):
    return void_signature(plan, source, target, factor), emitting(lambda e, *a: _emit_copy_row(e, e.plan.dense, *a))


@intrinsic
def _store_row(typingctx, plan, source, target):
    return void_signature(plan, source, target), emitting(lambda e, *a: _emit_store_row(e, e.plan.dense, *a))


@intrinsic
def _rotate(typingctx, plan, row):
    return void_signature(plan, row), emitting(_emit_rotate)


@intrinsic
def _fold_keys(typingctx, plan, query, scale, minimum, folded):
    return void_signature(plan, query, scale, minimum, folded), emitting(_emit_fold_keys)


@intrinsic
def _place_query(typingctx, plan, query, order, placed):
    return void_signature(plan, query, order, placed), emitting(_emit_place_query)


@intrinsic
def _score_packed(typingctx, plan, keys, extra, count, folded, scores):
    emit = emitting(lambda e, *a: _emit_scores(e, e.plan.k_format, *a))
    return void_signature(plan, keys, extra, count, folded, scores), emit


@intrinsic
def _score_dense(typingctx, plan, keys, count, folded, scores):
    emit = emitting(lambda e, keys, *a: _emit_scores(e, e.plan.dense, keys, None, *a))
    return void_signature(plan, keys, count, folded, scores), emit


@intrinsic
def _softmax(typingctx, plan, scores, count, maximum, total, decay):
    return void_signature(plan, scores, count, maximum, total, decay), emitting(_emit_softmax)


@intrinsic
def _sum_total(typingctx, plan, total):
    return void_signature(plan, total), emitting(_emit_sum_total)


@intrinsic
def _spread(typingctx, plan, weights, count, scale, minimum, spread, offsets):
    return void_signature(plan, weights, count, scale, minimum, spread, offsets), emitting(_emit_spread)


@intrinsic
def _accumulate_packed(typingctx, plan, values, count, weights, offsets, decay, sums):
    emit = emitting(lambda e, *a: _emit_accumulate(e, e.plan.v_format, *a))
    return void_signature(plan, values, count, weights, offsets, decay, sums), emit


@intrinsic
def _accumulate_dense(typingctx, plan, values, count, weights, offsets, decay, sums):
    emit = emitting(lambda e, *a: _emit_accumulate(e, e.plan.dense, *a))
    return void_signature(plan, values, count, weights, offsets, decay, sums), emit


# --- compiled control -------------------------------------------------------------------------------------------------

# Fields of `call`, int64: addresses and sizes of one call.
_FIELDS = (  # noqa: SIM905 - reads better
    "BATCH KV_HEADS GROUP QUERIES "
    "QUERY QUERY_BATCH QUERY_HEAD QUERY_TOKEN "  # address, strides in bytes
    "NEW_KEY NEW_KEY_BATCH NEW_KEY_HEAD NEW_VALUE NEW_VALUE_BATCH NEW_VALUE_HEAD "
    "K_CODES K_SCALE K_MINIMUM K_EXTRA K_ORDER K_SINKS K_WINDOW V_CODES V_SCALE V_MINIMUM V_SINKS V_WINDOW "
    "CAPACITY SINKS RING ROW_TILES SPLITS THREADS "
    "GIVEN_VALUE GIVEN_VALUE_BATCH GIVEN_VALUE_HEAD STORES ROTATES"  # for decoding: values as given, …
).split()
(
    BATCH, KV_HEADS, GROUP, QUERIES,
    QUERY, QUERY_BATCH, QUERY_HEAD, QUERY_TOKEN,
    NEW_KEY, NEW_KEY_BATCH, NEW_KEY_HEAD, NEW_VALUE, NEW_VALUE_BATCH, NEW_VALUE_HEAD,
    K_CODES, K_SCALE, K_MINIMUM, K_EXTRA, K_ORDER, K_SINKS, K_WINDOW, V_CODES, V_SCALE, V_MINIMUM, V_SINKS, V_WINDOW,
    CAPACITY, SINKS, RING, ROW_TILES, SPLITS, THREADS,
    GIVEN_VALUE, GIVEN_VALUE_BATCH, GIVEN_VALUE_HEAD, STORES, ROTATES,
) = range(len(_FIELDS))  # fmt: skip
_LENGTH, _PACKED, _NEW = range(3)  # columns of `lengths`


@njit
def _dense_segment(call, lengths, b, h, bytes_, visible, segment):
    """Addresses of keys and values and number of the full-precision tokens of a kind: new ones first, as every query
    sees one of those."""
    head = b * call[KV_HEADS] + h
    if segment == 0:
        key = call[NEW_KEY] + b * call[NEW_KEY_BATCH] + h * call[NEW_KEY_HEAD]
        value = call[NEW_VALUE] + b * call[NEW_VALUE_BATCH] + h * call[NEW_VALUE_HEAD]
        return key, value, visible
    length = lengths[b, _LENGTH]
    if segment == 1:
        place = head * call[SINKS] * bytes_
        return call[K_SINKS] + place, call[V_SINKS] + place, min(length, call[SINKS])
    ring = call[RING]
    first = lengths[b, _PACKED] % ring
    count = max(0, length - call[SINKS] - lengths[b, _PACKED])
    unwrapped = min(count, ring - first)
    place = (head * ring + first if segment == 2 else head * ring) * bytes_
    return call[K_WINDOW] + place, call[V_WINDOW] + place, unwrapped if segment == 2 else count - unwrapped


@njit
def _hide_later(plan, call, lengths, b, row_tile, first, count, scratch, thread):
    """-inf where a row of the tile would see a later one of the new tokens `first…first + count`."""
    rows = lengths[b, _NEW] * call[GROUP]
    for row in range(plan.rows):
        own = min(row_tile * plan.rows + row, rows - 1) // call[GROUP]
        for token in range(max(own + 1, first), first + count):
            block, lane = divmod(token - first, plan.tokens)
            scratch[thread, plan.at_scores + block * plan.block + row * plan.tokens + lane] = -np.inf


@njit
def _attend_dense(plan, call, lengths, b, h, row_tile, sums, scratch, thread):
    base = scratch.ctypes.data + thread * scratch.shape[1] * 4
    query, scores, decay = base + plan.at_query * 4, base + plan.at_scores * 4, base + plan.at_decay * 4
    last_row = min((row_tile + 1) * plan.rows, lengths[b, _NEW] * call[GROUP]) - 1
    for segment in range(4):
        key, value, total = _dense_segment(call, lengths, b, h, plan.dense_bytes, last_row // call[GROUP] + 1, segment)
        for first in range(0, total, plan.tile_tokens):
            count = min(plan.tile_tokens, total - first)
            _score_dense(plan, key + first * plan.dense_bytes, count, query, scores)
            if segment == 0 and call[QUERIES] > 1:
                _hide_later(plan, call, lengths, b, row_tile, first, count, scratch, thread)
            _softmax(plan, scores, count, base + plan.at_maximum * 4, base + plan.at_total * 4, decay)
            _accumulate_dense(plan, value + first * plan.dense_bytes, count, scores, 0, decay, sums)


@njit
def _score_groups(plan, call, head, first, count, base):
    """Scores of the packed tokens `first…first + count`, whole groups."""
    query, folded, scores = base + plan.at_query * 4, base + plan.at_folded * 4, base + plan.at_scores * 4
    token = head * call[CAPACITY] + first
    if not plan.k_quantized:
        _score_packed(plan, call[K_CODES] + token * plan.k_bytes, 0, count, query, scores)
        return
    if plan.wide:
        query = base + plan.at_placed * 4
    for done in range(0, count, plan.group_size):
        meta = (token + done) // plan.group_size * plan.head_dim * 2
        _fold_keys(plan, query, call[K_SCALE] + meta, call[K_MINIMUM] + meta, folded)
        target = scores + done * plan.padded_rows * 4
        codes, extra = call[K_CODES] + (token + done) * plan.k_bytes, call[K_EXTRA] + (token + done) * plan.extra_bytes
        _score_packed(plan, codes, extra, plan.group_size, folded, target)


@njit
def _attend_packed_tile(plan, call, head, first, count, sums, base):
    scores, decay = base + plan.at_scores * 4, base + plan.at_decay * 4
    spread, offsets = base + plan.at_spread * 4, base + plan.at_offsets * 4
    _score_groups(plan, call, head, first, count, base)
    _softmax(plan, scores, count, base + plan.at_maximum * 4, base + plan.at_total * 4, decay)
    token = head * call[CAPACITY] + first
    weights = scores
    if plan.v_quantized:
        meta = token * plan.groups * 2
        _spread(plan, scores, count, call[V_SCALE] + meta, call[V_MINIMUM] + meta, spread, offsets)
        weights = spread
    _accumulate_packed(plan, call[V_CODES] + token * plan.v_bytes, count, weights, offsets, decay, sums)


@njit
def _attend_unit(plan, call, scaling, lengths, scratch, partial, unit, thread):
    """One share of the tokens of one tile of query rows of one KV head: into `partial[unit]`."""
    rest, h = divmod(unit, call[KV_HEADS])
    rest, b = divmod(rest, call[BATCH])
    split, row_tile = divmod(rest, call[ROW_TILES])
    base = scratch.ctypes.data + thread * scratch.shape[1] * 4
    sums = partial.ctypes.data + unit * partial.shape[1] * 4
    partial[unit, :] = 0.0
    rows = lengths[b, _NEW] * call[GROUP]
    if row_tile * plan.rows >= rows:
        return
    for row in range(plan.rows):
        token, head = divmod(min(row_tile * plan.rows + row, rows - 1), call[GROUP])
        source = (
            call[QUERY]
            + b * call[QUERY_BATCH]
            + (h * call[GROUP] + head) * call[QUERY_HEAD]
            + token * call[QUERY_TOKEN]
        )
        _copy_row(plan, source, base + (plan.at_query + row * plan.head_dim) * 4, scaling)
    if plan.wide:
        order = call[K_ORDER] + (b * call[KV_HEADS] + h) * plan.head_dim * 8
        _place_query(plan, base + plan.at_query * 4, order, base + plan.at_placed * 4)
    scratch[thread, plan.at_query + plan.rows * plan.head_dim : plan.at_placed] = 0.0
    scratch[thread, plan.at_maximum : plan.at_maximum + plan.block] = -np.inf
    scratch[thread, plan.at_total : plan.at_total + plan.block] = 0.0

    packed = lengths[b, _PACKED]
    shares = -(-packed // plan.tile_tokens) + _DENSE_TILES
    first, stop = split * shares // call[SPLITS], (split + 1) * shares // call[SPLITS]
    if first == 0 and stop > 0:
        _attend_dense(plan, call, lengths, b, h, row_tile, sums, scratch, thread)
    for tile in range(max(0, first - _DENSE_TILES), stop - _DENSE_TILES):
        start = tile * plan.tile_tokens
        count = min(plan.tile_tokens, packed - start)
        _attend_packed_tile(plan, call, b * call[KV_HEADS] + h, start, count, sums, base)

    _sum_total(plan, base + plan.at_total * 4)
    for row in range(plan.rows):
        partial[unit, plan.rows * plan.head_dim + row] = scratch[thread, plan.at_maximum + row * plan.tokens]
        partial[unit, plan.rows * (plan.head_dim + 1) + row] = scratch[thread, plan.at_total + row * plan.tokens]


@njit
def _combine(plan, call, lengths, partial, out):
    """The shares of every row, weighted by their part of the softmax, into `out` `[B, q, heads, head_dim]`."""
    dim, splits = plan.head_dim, call[SPLITS]
    step = call[ROW_TILES] * call[BATCH] * call[KV_HEADS]  # units from one share to the next
    for b in range(call[BATCH]):
        out[b, lengths[b, _NEW] :] = 0.0
        for number in range(lengths[b, _NEW] * call[GROUP]):
            token, head = divmod(number, call[GROUP])
            row_tile, row = divmod(number, plan.rows)
            for h in range(call[KV_HEADS]):
                first = (row_tile * call[BATCH] + b) * call[KV_HEADS] + h
                highest = np.float32(-np.inf)
                for split in range(splits):
                    highest = max(highest, partial[first + split * step, plan.rows * dim + row])
                total = np.float32(0.0)
                for split in range(splits):
                    part = partial[first + split * step]
                    weight = np.float32(2.0) ** (part[plan.rows * dim + row] - highest)
                    total += weight * part[plan.rows * (dim + 1) + row]
                target = out[b, token, h * call[GROUP] + head]
                for split in range(splits):
                    part = partial[first + split * step]
                    weight = np.float32(2.0) ** (part[plan.rows * dim + row] - highest) / total
                    for channel in range(dim):
                        value = weight * part[row * dim + channel]
                        target[channel] = value if split == 0 else target[channel] + value


@njit
def _largest(row):
    """The largest magnitude; NaN where there is one."""
    largest = np.float32(0.0)
    for number in row:
        if not abs(number) <= largest:
            largest = abs(number)
            if largest != largest:
                break
    return largest


@njit
def _take_in(plan, call, lengths, scratch, limits, largest):
    """One new token of each sequence: its values rotated, in `call[NEW_VALUE]`, and both states into the window.

    Nothing is stored, and the result is False, where `largest`, the magnitudes of keys and values, passes `limits`.
    """
    row, place = scratch[0, plan.at_query : plan.at_query + plan.head_dim], scratch.ctypes.data + plan.at_query * 4
    for b in range(call[BATCH]):
        for h in range(call[KV_HEADS]):
            _copy_row(plan, call[NEW_KEY] + b * call[NEW_KEY_BATCH] + h * call[NEW_KEY_HEAD], place, np.float32(1.0))
            found = _largest(row)
            largest[0] = found if not found <= largest[0] else largest[0]
            source = call[GIVEN_VALUE] + b * call[GIVEN_VALUE_BATCH] + h * call[GIVEN_VALUE_HEAD]
            _copy_row(plan, source, place, np.float32(1.0))
            if call[ROTATES]:
                _rotate(plan, place)
            found = _largest(row)
            largest[1] = found if not found <= largest[1] else largest[1]
            if not (largest[0] <= limits[0] and largest[1] <= limits[1]):
                return False
            _store_row(plan, place, call[NEW_VALUE] + b * call[NEW_VALUE_BATCH] + h * call[NEW_VALUE_HEAD])
    for b in range(call[BATCH]):
        slot = (lengths[b, _LENGTH] - call[SINKS]) % call[RING]
        for h in range(call[KV_HEADS]):
            target = ((b * call[KV_HEADS] + h) * call[RING] + slot) * plan.dense_bytes
            _copy_row(plan, call[NEW_KEY] + b * call[NEW_KEY_BATCH] + h * call[NEW_KEY_HEAD], place, np.float32(1.0))
            _store_row(plan, place, call[K_WINDOW] + target)
            source = call[NEW_VALUE] + b * call[NEW_VALUE_BATCH] + h * call[NEW_VALUE_HEAD]
            _copy_row(plan, source, place, np.float32(1.0))
            _store_row(plan, place, call[V_WINDOW] + target)
    return True


@njit(cache=True, parallel=True, nogil=True)
def _attend(plan, call, scaling, lengths, scratch, partial, limits, largest, out):
    if call[STORES] and not _take_in(plan, call, lengths, scratch, limits, largest):
        return
    if call[THREADS] == 1:
        for unit in range(partial.shape[0]):
            _attend_unit(plan, call, scaling, lengths, scratch, partial, unit, 0)
    else:
        for unit in prange(partial.shape[0]):
            _attend_unit(plan, call, scaling, lengths, scratch, partial, np.int64(unit), np.int64(get_thread_id()))
    _combine(plan, call, lengths, partial, out)
    if call[STORES] and call[ROTATES]:
        for row in range(out.size // plan.head_dim):
            _rotate(plan, out.ctypes.data + row * plan.head_dim * 4)


_KERNEL_ARGUMENTS = (
    types.int64[::1],
    types.float32,
    types.int64[:, ::1],
    types.float32[:, ::1],
    types.float32[:, ::1],
    types.float32[::1],
    types.float32[::1],
    types.float32[:, :, :, ::1],
)


@functools.cache
def _compiled(plan: Plan):
    """The compiled kernel of a plan, from Numba's on-disk cache where it is there.

    Calling it directly skips Numba's resolution of argument types, which would take longer than a short attention.
    """
    signature = (ConstantsType(plan), *_KERNEL_ARGUMENTS)
    _attend.compile(signature)
    return _attend.overloads[signature].entry_point


# --- the backend ------------------------------------------------------------------------------------------------------


@functools.cache
def _plan(
    bits: tuple[int, int], dtype: torch.dtype, rows: int, head_dim: int, groups: tuple[int, int], wide: int
) -> Plan | None:
    """The plan for a layer, or None where the layout fits no vector or the dtype is not one of the three.

    `groups` are tokens (keys) and channels (values); a side in full precision has none.
    """
    if dtype not in FLOAT_NAMES or not host_is_supported():
        return None
    dense = FLOAT_NAMES[dtype]
    formats = [dense if b == FULL_PRECISION_BITS else b for b in bits]
    group_size = head_dim if all(b == FULL_PRECISION_BITS for b in bits) else groups[0]
    v_group = head_dim if bits[1] == FULL_PRECISION_BITS else groups[1]
    most, block = host()
    planes = [8 // b for b in bits if b != FULL_PRECISION_BITS]
    lanes = math.gcd(most, head_dim, v_group, *(head_dim // p for p in planes))
    plan = Plan(formats[0], formats[1], dense, rows, head_dim, group_size, v_group, wide, lanes, max(block, lanes))
    return plan if lanes >= 4 and group_size % plan.tokens == 0 else None


def why_not(layer: PackedLayer) -> str | None:
    """What keeps the kernels from attending over `layer`; None where nothing does."""
    if not host_is_supported():
        return "this CPU does not convert float16"
    window = layer.key.window
    if window.dtype not in FLOAT_NAMES:
        return f"its kernels know float32, bfloat16 and float16, and the model has {window.dtype}"
    bits, groups = (layer.key.bits, layer.value.bits), (layer.group_size, layer.value.group_size)
    rows = 1  # asks for the longest vectors
    if _plan(bits, window.dtype, rows, window.shape[-1], groups, layer.key.wide) is None:
        return (
            f"its kernels take no head_dim={window.shape[-1]} in groups of {groups[0]} tokens and {groups[1]} channels"
        )
    return None


def _splits(units: int, shares: int, threads: int) -> int:
    """Shares of the tokens each unit is cut into, so that all threads have equally much to do."""
    if threads == 1 or units >= 4 * threads and units % threads == 0:
        return 1
    step = threads // math.gcd(threads, units)
    return max(1, min(-(-2 * threads // (units * step)) * step, shares))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PackedLayer,
    scaling: float,
    step: Step,
) -> torch.Tensor:
    """Attention of new tokens over a layer on the CPU.

    Args and result are those of `modules.kernels.backend.Backend.attend`; states are float32, bfloat16 or float16.
    """
    plan = _plan_of(query, key, value, layer)
    if plan is None or query.shape[1] // key.shape[1] * query.shape[2] > _MANY_ROWS:
        return attend_in_torch(query, key, value, layer, scaling, step)
    query = query if query.stride(3) == 1 else query.contiguous()
    key, value = (t if _tokens_lie_side_by_side(t) else t.contiguous() for t in (key, value))
    stored = [t if t is None else t.contiguous() for t in _stored(layer)]
    call = _Call(plan, query, key, value, layer, stored)
    return call.run(query, scaling, layer, step.lengths)


def decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer, scaling: float
) -> torch.Tensor | None:
    """One new token of every sequence, all of them real: checked, attended and put into the window by one call.

    Args as for `attend`, with `q = 1`; values as the model gives them, not rotated.

    Returns:
        `[B, 1, num_attention_heads, D]`, not rotated either; None where the step needs more than that (sinks to fill, a
        group to pack, a layout the kernel does not know), and then nothing has been done.

    Raises:
        ValueError: for NaN, infinite or too large states; nothing is stored then.
    """
    if min(layer.lengths) < layer.sink_length or any(layer.ledger.packs(row, 1) for row in range(layer.batch_size)):
        return None
    memory = _memory(query, key, value, layer)
    before, call = _decoding.get(layer, (None, None))
    if before != memory:
        plan, stored = _plan_of(query, key, value, layer), _stored(layer)
        in_order = all(t.stride(3) == 1 for t in (query, key, value)) and all(
            t is None or t.is_contiguous() for t in stored
        )
        if plan is None or not in_order:
            return None
        call = _Call(plan, query, key, value, layer, stored, stores=True)
        _decoding[layer] = memory, call
    call.fields[QUERY], call.fields[NEW_KEY], call.fields[GIVEN_VALUE] = (t.data_ptr() for t in (query, key, value))
    new_lengths = [1] * layer.batch_size
    out = call.run(query, scaling, layer, new_lengths)
    for side, magnitude in zip(layer.sides, call.largest.tolist()):
        side.check_magnitude(magnitude)
    return out


_decoding: weakref.WeakKeyDictionary[PackedLayer, tuple[tuple, _Call]] = weakref.WeakKeyDictionary()


def _memory(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer) -> tuple:
    """What the call of a decode step depends on and rarely changes: layouts, and where the layer lies."""
    layouts = query.shape, query.stride(), key.stride(), value.stride(), query.dtype, key.dtype, value.dtype
    return *layouts, layer.key.capacity, *(t is not None and t.data_ptr() for t in _stored(layer))


class _Call:
    """The kernel's arguments for tokens of one layout over a layer.

    Decoding keeps them from token to token: over a short context the kernel takes less time than putting them together.

    Attributes:
        fields: int64, see `_FIELDS`.
        largest: magnitudes of keys and values, found where the call stores them.
    """

    def __init__(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: PackedLayer,
        stored: Sequence[torch.Tensor | None],
        stores: bool = False,
    ) -> None:
        batch, heads, length, head_dim = query.shape
        kv_heads, token = key.shape[1], head_dim * value.element_size()
        group = heads // kv_heads
        row_tiles = -(-length * group // plan.rows)
        self.plan, self.kernel = plan, _compiled(plan)
        self.units, self.work = batch * kv_heads * row_tiles, batch * heads * length * head_dim
        given = attended = _address(value, 2)
        if stores:
            self.rotated = np.empty(batch * kv_heads * token, np.uint8)
            attended = [self.rotated.ctypes.data, kv_heads * token, token]
        fields = [batch, kv_heads, group, length, *_address(query, 3), *_address(key, 2), *attended]
        fields += [0 if t is None else t.data_ptr() for t in stored]
        fields += [layer.key.capacity, layer.sink_length, layer.ring, row_tiles, 0, 0, *given, stores, layer.rotates]
        self.fields, self.lengths = np.array(fields), np.empty((batch, 3), np.int64)
        self.limits = np.array([side.codec.limit for side in layer.sides], np.float32)
        self.largest = np.zeros(2, np.float32)

    def run(self, query: torch.Tensor, scaling: float, layer: PackedLayer, new_lengths: list[int]) -> torch.Tensor:
        """What the new tokens attended, `[B, q, num_attention_heads, D]`, in the dtype of `query`."""
        plan, work = self.plan, self.work * (max(layer.lengths) + query.shape[2])
        threads = allowed_threads() if work > _SERIAL_WORK else 1
        splits = _splits(self.units, -(-max(layer.packed) // plan.tile_tokens) + _DENSE_TILES, threads)
        self.fields[SPLITS], self.fields[THREADS] = splits, threads
        self.lengths[:, _LENGTH], self.lengths[:, _PACKED], self.lengths[:, _NEW] = (
            layer.lengths,
            layer.packed,
            new_lengths,
        )
        self.largest[:] = 0.0
        scratch = buffer("scratch", threads, plan.scratch_floats)
        partial = buffer("partial", self.units * splits, plan.partial_floats)
        batch, heads, length, head_dim = query.shape
        out = torch.empty(batch, length, heads, head_dim, dtype=torch.float32)
        arguments = self.lengths, scratch, partial, self.limits, self.largest, out.numpy()
        with contextlib.nullcontext() if threads == 1 else numba_threads(threads):
            self.kernel(plan, self.fields, scaling * _LOG2_E, *arguments)
        return out if query.dtype == torch.float32 else out.to(query.dtype)


def _plan_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer) -> Plan | None:
    """The plan for a step, None where there is none."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    if not query.dtype == key.dtype == value.dtype == layer.key.window.dtype == layer.value.window.dtype:
        return None
    rows = group if length == 1 and group <= _MAX_ROWS else _MAX_ROWS
    bits, groups = (layer.key.bits, layer.value.bits), (layer.group_size, layer.value.group_size)
    return _plan(bits, query.dtype, rows, query.shape[3], groups, layer.key.wide)


def _address(t: torch.Tensor, strides: int) -> list[int]:
    """Where a tensor lies and its first strides, in bytes."""
    size = t.element_size()
    return [t.data_ptr(), *(stride * size for stride in t.stride()[:strides])]


def _tokens_lie_side_by_side(states: torch.Tensor) -> bool:
    return states.stride(3) == 1 and (states.shape[2] == 1 or states.stride(2) == states.shape[3])


def _stored(layer: PackedLayer) -> tuple:
    key, value = layer.sides
    of_key = (key.codes, key.scale, key.minimum, key.extra, key.order, key.sinks, key.window)
    return *of_key, value.codes, value.scale, value.minimum, value.sinks, value.window
