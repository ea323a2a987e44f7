"""Code for single rows of states: from a dtype to float32 and back, and their rotation."""

from __future__ import annotations

import math

from llvmlite import ir
from numba.extending import intrinsic

from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.host import ITEM_BYTES
from modules.kernels.numba.vectors import F32, Emitter


def _emit_copy_row(e: Emitter, source, target, factor) -> None:
    """One row `[head_dim]` of a dtype, times `factor`, as float32."""
    form, lanes = e.plan.dense, e.plan.lanes
    size = ITEM_BYTES[form]
    factor = e.broadcast(factor)
    for first in range(0, e.plan.head_dim, lanes):
        row = e.load(e.address(source, first * size), form)
        e.store(e.b.fmul(row, factor), e.address(target, first * 4))


def _emit_store_row(e: Emitter, source, target) -> None:
    """The inverse of `_emit_copy_row`: one float32 row in a dtype, rounded to nearest even."""
    form, lanes = e.plan.dense, e.plan.lanes
    size = ITEM_BYTES[form]
    for first in range(0, e.plan.head_dim, lanes):
        e.store_as(e.load(e.address(source, first * 4)), e.address(target, first * size), form)


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


@intrinsic
def copy_row(typingctx, plan, source, target, factor):
    """See `_emit_copy_row`."""
    return void_signature(plan, source, target, factor), emitting(_emit_copy_row)


@intrinsic
def store_row(typingctx, plan, source, target):
    """See `_emit_store_row`."""
    return void_signature(plan, source, target), emitting(_emit_store_row)


@intrinsic
def rotate_row(typingctx, plan, row):
    """See `_emit_rotate`."""
    return void_signature(plan, row), emitting(_emit_rotate)
