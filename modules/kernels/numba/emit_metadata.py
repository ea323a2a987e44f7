"""Code that reads scales and minima, of 8 bits or 16, as float32; see `modules.codecs.metadata`."""

from __future__ import annotations

from llvmlite import ir

from modules.codecs.metadata import SCALE_SHIFT, minimum_unit
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import F32, I8, I16, Emitter


def _load_scales(e: Emitter[Plan], place, small: bool, lanes: int):
    """`lanes` scales; those of 8 bits are the upper bits of a float16."""
    if not small:
        return e.load(place, "float16", lanes)
    bits = e.b.zext(e.load_scalar(place, ir.VectorType(I8, lanes), 1), ir.VectorType(I16, lanes))
    shifted = e.b.shl(bits, ir.Constant(bits.type, [I16(SCALE_SHIFT)] * lanes))
    return e.b.fpext(e.b.bitcast(shifted, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(F32, lanes))


def load_key_scales(e: Emitter[Plan], scale, first: int):
    """The scales of a vector of channels of a group of keys, from channel `first` on."""
    return _load_scales(e, e.address(scale, first * e.plan.k_scale_bytes), e.plan.k_small_metadata, e.plan.lanes)


def load_value_metadata(e: Emitter[Plan], scale, minimum, index) -> tuple:
    """Scales and minima of block `index` of tokens of values, `[tokens, groups]` each."""
    plan, small = e.plan, e.plan.v_small_metadata
    lanes = plan.tokens * plan.groups
    places = [e.address(metadata, 0, index, lanes * plan.v_scale_bytes) for metadata in (scale, minimum)]
    scales = _load_scales(e, places[0], small, lanes)
    if not small:
        return scales, e.load(places[1], "float16", lanes)
    codes = e.load(places[1], "int8", lanes)
    return scales, e.b.fmul(e.b.fmul(codes, e.float_splat(minimum_unit(plan.v_bits), lanes)), scales)
