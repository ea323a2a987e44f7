"""The packing kernel: from states where they lie to codes and metadata where they are kept.

Codes that lie halfway between two levels may round otherwise than torch's, as the division is a multiplication here.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from modules.kernels.numba.compiling import UNITS, as_pointer
from modules.kernels.numba.emit_codes import pack_fine, pack_unit, widen_scales
from modules.kernels.numba.emit_rows import copy_row
from modules.kernels.numba.fields import PACKING, ROW, SOURCE, TARGET


@njit(inline="always")
def _load_unit(spec, source, stride, order, scratch, base):
    """The rows of a unit into scratch as float32 `[tokens, head_dim]`, keys with wide channels in their `order`."""
    for token in range(spec.tokens):
        place = base + token * spec.head_dim * 4
        copy_row(spec, source + token * stride, base + spec.at_row * 4 if spec.wide else place, np.float32(1.0))
        if spec.wide:
            for channel in range(spec.head_dim):
                scratch[token * spec.head_dim + channel] = scratch[spec.at_row + order[channel]]


@njit(inline="always")
def _place_fine_codes(spec, fine, codes, extra):
    """Whole codes `fine` `[tokens, fine_width]` of the first `W` channels: the high bits into `codes` `[tokens, width]`, in place of
    those channels' codes, the low two into `extra` `[tokens, W/4]`, four neighbours a byte."""
    width, fine_width, fine_bits = spec.width, spec.fine_width, spec.fine_bits
    for token in range(spec.tokens):
        for number in range(spec.wide):
            code = fine[token, number % fine_width] >> fine_bits * (number // fine_width) & (4 * spec.levels + 3)
            shift = spec.bits * (number // width)
            codes[token, number % width] = codes[token, number % width] & ~(spec.levels << shift) | code >> 2 << shift
            low = (code & 3) << 2 * (number % 4)
            extra[token, number // 4] = low if number % 4 == 0 else extra[token, number // 4] | low


def packing(spec, address, stages, first, stop, thread):
    """The kernel; its arguments are a record `PACKING`."""
    if not stages & UNITS:
        return
    call = carray(as_pointer(address), 1, PACKING)[0]
    jobs = carray(as_pointer(call.jobs), (call.job_count, 3), np.int64)
    base = call.scratch + thread * spec.scratch_floats * 4
    scratch = carray(as_pointer(base), spec.scratch_floats, np.float32)
    for unit in range(first, stop):
        rest, group = divmod(unit, call.groups)
        job, head = divmod(rest, call.heads)
        row_head = jobs[job, ROW] * call.heads + head
        source = call.source + jobs[job, ROW] * call.source_row + head * call.source_head
        source += (jobs[job, SOURCE] + group * spec.tokens) * call.source_token
        order = carray(as_pointer(call.order + row_head * spec.head_dim * 8), spec.head_dim, np.int64)
        _load_unit(spec, source, call.source_token, order, scratch, base)
        token = row_head * call.capacity + jobs[job, TARGET] + group * spec.tokens
        codes, meta = call.codes + token * spec.width, token // spec.tokens * spec.metadata
        scale, minimum = call.scale + meta * spec.scale_bytes, call.minimum + meta * spec.minimum_bytes
        largest = call.largest + unit * 4
        pack_unit(spec, base, codes, scale, minimum, largest)
        if spec.wide:
            fine = base + spec.at_fine * 4
            pack_fine(spec, base, fine, scale, minimum, base + spec.at_row * 4)
            widen_scales(spec, scale)
            _place_fine_codes(
                spec,
                carray(as_pointer(fine), (spec.tokens, spec.fine_width), np.uint8),
                carray(as_pointer(codes), (spec.tokens, spec.width), np.uint8),
                carray(as_pointer(call.extra + token * spec.extra_bytes), (spec.tokens, spec.extra_bytes), np.uint8),
            )
