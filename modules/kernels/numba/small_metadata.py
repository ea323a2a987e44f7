"""Instructions for metadata of 8 bits as groups are packed: the arithmetic of `modules.codecs.metadata`."""

from __future__ import annotations

from llvmlite import ir

from modules.codecs.metadata import LARGEST_MINIMUM, LARGEST_SCALE, SCALE_SHIFT, minimum_unit
from modules.kernels.numba.packing_spec import Packing
from modules.kernels.numba.vectors import F32, I16, I32, Emitter


def at_most(e: Emitter[Packing], codes):
    """Codes of scales, int32, none beyond the largest."""
    largest = e.int_splat(LARGEST_SCALE, codes.type.count)
    return e.b.select(e.b.icmp_signed("<", codes, largest), codes, largest)


def scale_codes(e: Emitter[Packing], scale):
    """The codes, int32, next to float32 scales of no sign."""
    lanes = scale.type.count
    half = e.b.bitcast(e.b.fptrunc(scale, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(I16, lanes))
    bits = e.b.add(e.b.zext(half, ir.VectorType(I32, lanes)), e.int_splat(1 << SCALE_SHIFT - 1, lanes))
    return at_most(e, e.b.lshr(bits, e.int_splat(SCALE_SHIFT, lanes)))


def scales_of(e: Emitter[Packing], codes):
    """The float32 scales of codes, int32."""
    lanes = codes.type.count
    half = e.b.trunc(e.b.shl(codes, e.int_splat(SCALE_SHIFT, lanes)), ir.VectorType(I16, lanes))
    return e.b.fpext(e.b.bitcast(half, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(F32, lanes))


def minimum_codes(e: Emitter[Packing], scale, minimum):
    """What the minima of values count, whole numbers as float32."""
    lanes = scale.type.count
    safe = e.b.select(e.b.fcmp_ordered(">", scale, e.float_splat(0.0, lanes)), scale, e.float_splat(1.0, lanes))
    codes = e.round(e.b.fdiv(minimum, e.b.fmul(safe, e.float_splat(minimum_unit(e.plan.bits), lanes))))
    codes = e.maximum(e.float_splat(-float(LARGEST_MINIMUM), lanes), codes)
    return e.minimum(codes, e.float_splat(float(LARGEST_MINIMUM), lanes))


def magnitude(e: Emitter[Packing], x):
    """Without its sign."""
    bits = e.b.and_(e.b.bitcast(x, ir.VectorType(I32, x.type.count)), e.int_splat(0x7FFFFFFF, x.type.count))
    return e.b.bitcast(bits, x.type)
