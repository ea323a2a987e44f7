"""The attention kernel: what is compiled around the vector code.

One unit of work is a KV head of a sequence, a tile of its query rows and a share of its tokens. It walks over the tokens
in tiles of `tile_tokens`: scores, a step of the online softmax in base 2, weighted values. The shares are combined by
log-sum-exp. Everything accumulates in float32.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from modules.kernels.numba.compiling import COMBINE, TAKE_IN, UNITS, as_pointer
from modules.kernels.numba.emit_byte_scores import fold_in_bytes, normalize_query, score_bytes
from modules.kernels.numba.emit_byte_values import accumulate_bytes, spread_in_bytes
from modules.kernels.numba.emit_rows import (
    copy_row,
    fold_row,
    rotate_row,
    round_row,
    scale_row,
    store_key,
    store_row,
    store_value,
)
from modules.kernels.numba.emit_scores import fold_keys, place_query, score_dense, score_packed, softmax, sum_total
from modules.kernels.numba.emit_values import accumulate_dense, accumulate_packed, spread
from modules.kernels.numba.fields import ATTENTION, INVERSE, LENGTH, NEW, OFFSET, PACKED, SCALE

DENSE_TILES = 2  # what the full-precision tokens count for when tiles are shared out


@njit(inline="always")
def _dense_segment(call, lengths, b, h, bytes_, visible, segment):
    """Addresses of keys and values and number of the full-precision tokens of a kind: new ones first, as every query
    sees one of those."""
    head = b * call.kv_heads + h
    length, packed, ring = lengths[LENGTH, b], lengths[PACKED, b], call.ring
    if segment == 0:
        key = call.new_key + b * call.new_key_batch + h * call.new_key_head
        value = call.new_value + b * call.new_value_batch + h * call.new_value_head
        count = 0 if call.at_once else visible  # a token that is stored already is among the packed ones
    elif segment == 1:
        place = head * call.sinks * bytes_
        key, value, count = call.k_sinks + place, call.v_sinks + place, min(length, call.sinks)
    else:
        first = packed % ring
        count = max(0, length - call.sinks - packed)
        unwrapped = min(count, ring - first)
        place = (head * ring + first if segment == 2 else head * ring) * bytes_
        key, value = call.k_window + place, call.v_window + place
        count = unwrapped if segment == 2 else count - unwrapped
    return key, value, count


@njit(inline="always")
def _hide_later(plan, call, lengths, b, row_tile, first, count, scratch):
    """-inf where a row of the tile would see a later one of the new tokens `first…first + count`."""
    rows = lengths[NEW, b] * call.group
    for row in range(plan.rows):
        own = min(row_tile * plan.rows + row, rows - 1) // call.group
        for token in range(max(own + 1, first), first + count):
            block, lane = divmod(token - first, plan.tokens)
            scratch[plan.at_scores + block * plan.block + row * plan.tokens + lane] = -np.inf


@njit(inline="always")
def _attend_dense(plan, call, lengths, b, h, row_tile, sums, scratch, base):
    query, scores, decay = base + plan.at_query * 4, base + plan.at_scores * 4, base + plan.at_decay * 4
    last_row = min((row_tile + 1) * plan.rows, lengths[NEW, b] * call.group) - 1
    for segment in range(4):
        key, value, total = _dense_segment(call, lengths, b, h, plan.dense_bytes, last_row // call.group + 1, segment)
        for first in range(0, total, plan.tile_tokens):
            count = min(plan.tile_tokens, total - first)
            score_dense(plan, key + first * plan.dense_bytes, count, query, scores)
            if segment == 0 and call.queries > 1:
                _hide_later(plan, call, lengths, b, row_tile, first, count, scratch)
            softmax(plan, scores, count, base + plan.at_maximum * 4, base + plan.at_total * 4, decay)
            accumulate_dense(plan, value + first * plan.dense_bytes, count, scores, 0, decay, sums)


@njit(inline="always")
def _score_groups(plan, call, head, first, count, base):
    """Scores of the packed tokens `first…first + count`, whole groups."""
    query, folded, scores = base + plan.at_query * 4, base + plan.at_folded * 4, base + plan.at_scores * 4
    token = head * call.capacity + first
    if not plan.k_quantized:
        score_packed(plan, call.k_codes + token * plan.k_bytes, 0, count, query, scores)
    else:
        if plan.wide or plan.k_in_bytes:
            query = base + plan.at_placed * 4
        for done in range(0, count, plan.group_size):
            meta = (token + done) // plan.group_size * plan.head_dim
            scale, minimum = call.k_scale + meta * plan.k_scale_bytes, call.k_minimum + meta * 2
            target = scores + done * plan.padded_rows * 4
            codes = call.k_codes + (token + done) * plan.k_bytes
            extra = call.k_extra + (token + done) * plan.extra_bytes
            if plan.k_in_bytes:
                small, units = base + plan.at_bytes * 4, base + plan.at_units * 4
                fold_in_bytes(plan, query, scale, minimum, small, units)
                score_bytes(plan, codes, extra, small, units, target)
            else:
                fold_keys(plan, query, scale, minimum, folded)
                score_packed(plan, codes, extra, plan.group_size, folded, target)


@njit(inline="always")
def _attend_packed_tile(plan, call, head, first, count, sums, base):
    scores, decay = base + plan.at_scores * 4, base + plan.at_decay * 4
    scaled, offsets = base + plan.at_spread * 4, base + plan.at_offsets * 4
    _score_groups(plan, call, head, first, count, base)
    softmax(plan, scores, count, base + plan.at_maximum * 4, base + plan.at_total * 4, decay)
    token = head * call.capacity + first
    values, meta = call.v_codes + token * plan.v_bytes, token * plan.groups
    scale, minimum = call.v_scale + meta * plan.v_scale_bytes, call.v_minimum + meta * plan.v_scale_bytes
    if plan.v_in_bytes:
        small, units = base + plan.at_weights * 4, base + plan.at_weight_units * 4
        spread_in_bytes(plan, scores, count, scale, minimum, scaled, small, units, offsets)
        accumulate_bytes(plan, values, count, small, units, offsets, decay, sums)
    elif plan.v_quantized:
        spread(plan, scores, count, scale, minimum, scaled, offsets)
        accumulate_packed(plan, values, count, scaled, offsets, decay, sums)
    else:
        accumulate_packed(plan, values, count, scores, offsets, decay, sums)


@njit(inline="always")
def _static(plan, call, base, kind, h):
    """The address of a head's row of `k_static` or `v_static`, which begin at `base`."""
    return base + (kind * call.kv_heads + h) * plan.head_dim * 4


@njit(inline="always")
def _load_queries(plan, call, b, h, row_tile, rows, base):
    """The rows of a tile into scratch, scaled; the last one again where there are fewer."""
    for row in range(plan.rows):
        token, head = divmod(min(row_tile * plan.rows + row, rows - 1), call.group)
        source = (
            call.query + b * call.query_batch + (h * call.group + head) * call.query_head + token * call.query_token
        )
        target = base + (plan.at_query + row * plan.head_dim) * 4
        copy_row(plan, source, target, call.scaling)
        if call.k_static:
            fold_row(plan, target, _static(plan, call, call.k_static, SCALE, h))
    if plan.wide:
        order = call.k_order + (b * call.kv_heads + h) * plan.head_dim * 8
        place_query(plan, base + plan.at_query * 4, order, base + plan.at_placed * 4)
    if plan.k_in_bytes:
        source = base + (plan.at_placed if plan.wide else plan.at_query) * 4
        normalize_query(plan, source, base + plan.at_placed * 4, base + plan.at_units * 4)


@njit(inline="always")
def _attend_unit(plan, call, lengths, scratch, base, part, sums, unit):
    """One share of the tokens of one tile of query rows of one KV head: into `part`, at the address `sums`."""
    rest, h = divmod(unit, call.kv_heads)
    rest, b = divmod(rest, call.batch)
    split, row_tile = divmod(rest, call.row_tiles)
    part[:] = 0.0
    rows = lengths[NEW, b] * call.group
    if row_tile * plan.rows < rows:
        _load_queries(plan, call, b, h, row_tile, rows, base)
        scratch[plan.at_query + plan.rows * plan.head_dim : plan.at_placed] = 0.0
        scratch[plan.at_maximum : plan.at_maximum + plan.block] = -np.inf
        scratch[plan.at_total : plan.at_total + plan.block] = 0.0

        packed = lengths[PACKED, b]
        shares = -(-packed // plan.tile_tokens) + DENSE_TILES
        first, stop = split * shares // call.splits, (split + 1) * shares // call.splits
        if first == 0 and stop > 0:
            _attend_dense(plan, call, lengths, b, h, row_tile, sums, scratch, base)
        for tile in range(max(0, first - DENSE_TILES), stop - DENSE_TILES):
            start = tile * plan.tile_tokens
            count = min(plan.tile_tokens, packed - start)
            _attend_packed_tile(plan, call, b * call.kv_heads + h, start, count, sums, base)

        sum_total(plan, base + plan.at_total * 4)
        for row in range(plan.rows):
            part[plan.rows * plan.head_dim + row] = scratch[plan.at_maximum + row * plan.tokens]
            part[plan.rows * (plan.head_dim + 1) + row] = scratch[plan.at_total + row * plan.tokens]


@njit(inline="always")
def _combine(plan, call, lengths, partial, out):
    """The shares of every row, weighted by their part of the softmax, into `out` `[B, q, heads, head_dim]`."""
    dim, splits = plan.head_dim, call.splits
    step = call.row_tiles * call.batch * call.kv_heads  # units from one share to the next
    for b in range(call.batch):
        out[b, lengths[NEW, b] :] = 0.0
        for number in range(lengths[NEW, b] * call.group):
            token, head = divmod(number, call.group)
            row_tile, row = divmod(number, plan.rows)
            for h in range(call.kv_heads):
                first = (row_tile * call.batch + b) * call.kv_heads + h
                highest = np.float32(-np.inf)
                for split in range(splits):
                    highest = max(highest, partial[first + split * step, plan.rows * dim + row])
                total = np.float32(0.0)
                for split in range(splits):
                    part = partial[first + split * step]
                    weight = np.float32(2.0) ** (part[plan.rows * dim + row] - highest)
                    total += weight * part[plan.rows * (dim + 1) + row]
                target = out[b, token, h * call.group + head]
                for split in range(splits):
                    part = partial[first + split * step]
                    weight = np.float32(2.0) ** (part[plan.rows * dim + row] - highest) / total
                    for channel in range(dim):
                        value = weight * part[row * dim + channel]
                        target[channel] = value if split == 0 else target[channel] + value


@njit(inline="always")
def _larger(row, largest):
    """The largest magnitude of a row, or `largest`; NaN where there is one."""
    for number in row:
        if not abs(number) <= largest:
            largest = abs(number)
            if largest != largest:
                break
    return largest


@njit(inline="always")
def _check_and_rotate(plan, call, row, place):
    """Find the largest magnitudes of one new token of each sequence, and put its values, rotated, where `new_value` is.

    False, at once, where they pass the limits.
    """
    for b in range(call.batch):
        for h in range(call.kv_heads):
            copy_row(plan, call.new_key + b * call.new_key_batch + h * call.new_key_head, place, np.float32(1.0))
            call.k_largest = _larger(row, call.k_largest)
            source = call.given_value + b * call.given_value_batch + h * call.given_value_head
            copy_row(plan, source, place, np.float32(1.0))
            if call.rotates:
                rotate_row(plan, place)
            call.v_largest = _larger(row, call.v_largest)
            if not (call.k_largest <= call.k_limit and call.v_largest <= call.v_limit):
                return False
            store_row(plan, place, call.new_value + b * call.new_value_batch + h * call.new_value_head)
    return True


@njit(inline="always")
def _store_tokens(plan, call, lengths, place):
    """One new token of each sequence into its sinks, or the slot of the ring that is free for it."""
    for b in range(call.batch):
        length = lengths[LENGTH, b]
        to_sinks = length < call.sinks
        slots = call.sinks if to_sinks else call.ring
        slot = length if to_sinks else (length - call.sinks) % call.ring
        for h in range(call.kv_heads):
            target = ((b * call.kv_heads + h) * slots + slot) * plan.dense_bytes
            copy_row(plan, call.new_key + b * call.new_key_batch + h * call.new_key_head, place, np.float32(1.0))
            store_row(plan, place, (call.k_sinks if to_sinks else call.k_window) + target)
            source = call.new_value + b * call.new_value_batch + h * call.new_value_head
            copy_row(plan, source, place, np.float32(1.0))
            store_row(plan, place, (call.v_sinks if to_sinks else call.v_window) + target)


@njit(inline="always")
def _store_at_once(plan, call, lengths, place):
    """One new token of each sequence behind its packed ones, in code space where the sides are: it counts as packed then."""
    for b in range(call.batch):
        for h in range(call.kv_heads):
            token = (b * call.kv_heads + h) * call.capacity + lengths[PACKED, b]
            copy_row(plan, call.new_key + b * call.new_key_batch + h * call.new_key_head, place, np.float32(1.0))
            if call.k_static:
                inverse = _static(plan, call, call.k_static, INVERSE, h)
                round_row(plan, place, inverse, _static(plan, call, call.k_static, OFFSET, h))
            store_key(plan, place, call.k_codes + token * plan.k_bytes)
            source = call.new_value + b * call.new_value_batch + h * call.new_value_head
            copy_row(plan, source, place, np.float32(1.0))
            if call.v_static:
                inverse = _static(plan, call, call.v_static, INVERSE, h)
                round_row(plan, place, inverse, _static(plan, call, call.v_static, OFFSET, h))
            store_value(plan, place, call.v_codes + token * plan.v_bytes)
        lengths[LENGTH, b] += 1
        lengths[PACKED, b] += 1


@njit(inline="always")
def _leave_code_space(plan, call, out):
    """What was attended, weighted means of codes, as means of values."""
    heads = call.kv_heads * call.group
    for row in range(out.size // plan.head_dim):
        h = row % heads // call.group
        scale = _static(plan, call, call.v_static, SCALE, h)
        scale_row(plan, call.out + row * plan.head_dim * 4, scale, _static(plan, call, call.v_static, OFFSET, h))


def attention(plan, address, stages, first, stop, thread):
    """The kernel; its arguments are a record `ATTENTION`.

    Nothing is stored or attended where the largest magnitudes of new states that are to be stored pass their limits.
    """
    call = carray(as_pointer(address), 1, ATTENTION)[0]
    lengths = carray(as_pointer(call.lengths), (3, call.batch), np.int64)
    base = call.scratch + thread * plan.scratch_floats * 4
    scratch = carray(as_pointer(base), plan.scratch_floats, np.float32)
    partial = carray(as_pointer(call.partial), (call.units, plan.partial_floats), np.float32)
    if stages & TAKE_IN and call.stores:
        row, place = scratch[plan.at_query : plan.at_query + plan.head_dim], base + plan.at_query * 4
        if not _check_and_rotate(plan, call, row, place):
            return
        if call.at_once:
            _store_at_once(plan, call, lengths, place)
        else:
            _store_tokens(plan, call, lengths, place)
    if stages & UNITS:
        for unit in range(first, stop):
            sums = call.partial + unit * plan.partial_floats * 4
            _attend_unit(plan, call, lengths, scratch, base, partial[unit], sums, unit)
    if stages & COMBINE:
        heads = call.kv_heads * call.group
        out = carray(as_pointer(call.out), (call.batch, call.queries, heads, plan.head_dim), np.float32)
        _combine(plan, call, lengths, partial, out)
        if call.stores and call.rotates:
            for row in range(out.size // plan.head_dim):
                rotate_row(plan, call.out + row * plan.head_dim * 4)
        if call.v_static:
            _leave_code_space(plan, call, out)
