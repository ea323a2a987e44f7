"""Code for single rows of states: from a dtype to float32 and back, their rotation, and into code space and out of it."""

from __future__ import annotations

import math

from llvmlite import ir
from numba.extending import intrinsic

from modules.codecs.static import LARGEST_CODE
from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.host import ITEM_BYTES
from modules.kernels.numba.plan import Plan
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
    _emit_store_as(e, e.plan.dense, source, target)


def _emit_store_as(e: Emitter, form: str, source, target) -> None:
    for first in range(0, e.plan.head_dim, e.plan.lanes):
        e.store_as(e.load(e.address(source, first * 4)), e.address(target, first * ITEM_BYTES[form]), form)


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


def _emit_scale_row(e: Emitter, row, scale, offset) -> None:
    """`row∘scale + offset`, float32 `[head_dim]` each, in place."""
    for first in range(0, e.plan.head_dim * 4, e.plan.lanes * 4):
        place = e.address(row, first)
        e.store(e.multiply_add(e.load(place), e.load(e.address(scale, first)), e.load(e.address(offset, first))), place)


def _emit_fold_row(e: Emitter, row, scale) -> None:
    """`row∘scale`, float32 `[head_dim]` both, in place."""
    for first in range(0, e.plan.head_dim * 4, e.plan.lanes * 4):
        place = e.address(row, first)
        e.store(e.b.fmul(e.load(place), e.load(e.address(scale, first))), place)


def _emit_round_row(e: Emitter, row, inverse, offset) -> None:
    """One float32 row into code space, in place; see `modules.codecs.static.ChannelScales.enter`."""
    largest = e.float_splat(float(LARGEST_CODE))
    for first in range(0, e.plan.head_dim * 4, e.plan.lanes * 4):
        place = e.address(row, first)
        distance = e.b.fsub(e.load(place), e.load(e.address(offset, first)))
        code = e.round(e.b.fmul(distance, e.load(e.address(inverse, first))))
        e.store(e.maximum(e.float_splat(-float(LARGEST_CODE)), e.minimum(largest, code)), place)


def _emit_store_key(e: Emitter[Plan], source, target) -> None:
    """A float32 row as a packed key that is a row of numbers; nothing where keys are packed in groups."""
    if isinstance(e.plan.k_format, str):
        _emit_store_as(e, e.plan.k_format, source, target)


def _emit_store_value(e: Emitter[Plan], source, target) -> None:
    """The same for a value."""
    if isinstance(e.plan.v_format, str):
        _emit_store_as(e, e.plan.v_format, source, target)


@intrinsic
def scale_row(typingctx, plan, row, scale, offset):
    """See `_emit_scale_row`."""
    return void_signature(plan, row, scale, offset), emitting(_emit_scale_row)


@intrinsic
def fold_row(typingctx, plan, row, scale):
    """See `_emit_fold_row`."""
    return void_signature(plan, row, scale), emitting(_emit_fold_row)


@intrinsic
def round_row(typingctx, plan, row, inverse, offset):
    """See `_emit_round_row`."""
    return void_signature(plan, row, inverse, offset), emitting(_emit_round_row)


@intrinsic
def store_key(typingctx, plan, source, target):
    """See `_emit_store_key`."""
    return void_signature(plan, source, target), emitting(_emit_store_key)


@intrinsic
def store_value(typingctx, plan, source, target):
    """See `_emit_store_value`."""
    return void_signature(plan, source, target), emitting(_emit_store_value)


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
