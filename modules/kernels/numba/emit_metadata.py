"""Code that turns metadata of 8 bits into the float16 numbers that the other kernels read; see `modules.codecs.metadata`.

Both come out exactly: a scale is the upper bits of a float16, and a scale times a minimum's code has no more bits than one.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from modules.codecs.metadata import SCALE_SHIFT, minimum_unit
from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import F32, I8, I16, I64, Emitter


def _load_scales(e: Emitter[Plan], place, lanes: int):
    """`lanes` scales as float16."""
    bits = e.b.zext(e.load_scalar(place, ir.VectorType(I8, lanes), 1), ir.VectorType(I16, lanes))
    shifted = e.b.shl(bits, ir.Constant(bits.type, [I16(SCALE_SHIFT)] * lanes))
    return e.b.bitcast(shifted, ir.VectorType(ir.HalfType(), lanes))


def load_scales(e: Emitter[Plan], place, small: bool):
    """A vector of scales as float32; `small` ones have 8 bits."""
    lanes = e.plan.lanes
    return e.b.fpext(_load_scales(e, place, lanes), ir.VectorType(F32, lanes)) if small else e.load(place, "float16")


def _emit_unpack_scales(e: Emitter[Plan], source, target) -> None:
    """The scales of one group of keys, `[head_dim]`, from bytes to float16."""
    for first in range(0, e.plan.head_dim, e.plan.lanes):
        scales = _load_scales(e, e.address(source, first), e.plan.lanes)
        e.store_scalar(scales, e.address(target, first * 2), 2)


def _emit_unpack_values(e: Emitter[Plan], scale, minimum, count, scales, minima) -> None:
    """Scales and minima of `count` tokens of values, `[count, groups]`, from bytes to float16."""
    plan = e.plan
    if not isinstance(plan.v_format, int):
        return
    lanes = plan.tokens * plan.groups  # tokens come in whole blocks
    wide, unit = ir.VectorType(F32, lanes), e.float_splat(minimum_unit(plan.v_format), lanes)
    with cgutils.for_range(e.b, e.b.udiv(count, I64(plan.tokens))) as loop:
        halves = _load_scales(e, e.address(scale, 0, loop.index, lanes), lanes)
        codes = e.load(e.address(minimum, 0, loop.index, lanes), "int8", lanes)
        numbers = e.b.fmul(e.b.fmul(codes, unit), e.b.fpext(halves, wide))
        e.store_scalar(halves, e.address(scales, 0, loop.index, lanes * 2), 2)
        e.store_as(numbers, e.address(minima, 0, loop.index, lanes * 2), "float16")


@intrinsic
def unpack_scales(typingctx, plan, source, target):
    """See `_emit_unpack_scales`."""
    return void_signature(plan, source, target), emitting(_emit_unpack_scales)


@intrinsic
def unpack_values(typingctx, plan, scale, minimum, count, scales, minima):
    """See `_emit_unpack_values`."""
    return void_signature(plan, scale, minimum, count, scales, minima), emitting(_emit_unpack_values)
