"""Code that packs one unit: fits its groups, then writes their codes."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from modules.codecs.grouped import SMALLEST
from modules.codecs.metadata import minimum_unit
from modules.kernels.numba import small_metadata as small
from modules.kernels.numba.compiling import emitting, void_signature
from modules.kernels.numba.emit_fit import Fit
from modules.kernels.numba.packing_spec import Packing
from modules.kernels.numba.vectors import F32, I8, I32, I64, Emitter


def _emit_fits(e: _UnitEmitter, source, scale, minimum, largest) -> None:
    """Scale and minimum of the groups of one unit of float32 states `[tokens, head_dim]` at `source`; `largest`,
    int32, receives the bits of its largest magnitude."""
    spec, lanes = e.plan, e.plan.lanes
    most = e.variable(e.int_splat(0))
    step = lanes if spec.keys else spec.group_size
    count = lanes if spec.keys else 1
    with cgutils.for_range(e.b, I64(spec.head_dim // step)) as loop:
        place = e.address(source, 0, loop.index, step * 4)

        def load(i):
            return e.load(e.address(place, 0, i, e.source_stride if spec.keys else lanes * 4))

        def share(i):
            if not spec.weighs:
                return e.float_splat(1 / spec.group_size)
            return e.broadcast(e.load_float(e.address(source, e.at_shares, i, 4)))

        vectors = spec.group_size if spec.keys else spec.group_size // lanes
        fit = Fit(e, vectors, load, share, across=not spec.keys)
        *numbers, magnitude = fit.run()
        e.b.store(e.larger_int(magnitude, e.b.load(most)), most)
        scales, minima = (e.shuffle(number, number, list(range(count))) for number in numbers)
        _store_scale(e, scales, e.address(scale, 0, loop.index, count * spec.scale_bytes))
        _store_minimum(e, scales, minima, e.address(minimum, 0, loop.index, count * spec.minimum_bytes))
    whole = e.across_lanes(e.b.load(most), e.larger_int)
    e.b.store(e.b.extract_element(whole, I32(0)), e.b.inttoptr(largest, I32.as_pointer()), align=4)


def _emit_codes(e: _UnitEmitter, source, codes, scale, minimum) -> None:
    """The bytes of a unit, from its states and the metadata that is stored."""
    spec, lanes = e.plan, e.plan.lanes
    fit = Fit(e, 0, None, None, False)
    with cgutils.for_range(e.b, I64(spec.width // lanes)) as chunks:
        first = e.b.mul(chunks.index, I64(lanes))
        channels = [e.b.add(first, I64(plane * spec.width)) for plane in range(spec.planes)]
        fitted = [_load_metadata(e, scale, minimum, channel) for channel in channels]
        inverses = [fit.inverse(scales) for scales, _ in fitted]
        with cgutils.for_range(e.b, I64(spec.tokens)) as tokens:
            row = e.address(source, 0, tokens.index, e.source_stride)
            packed = e.int_splat(0)
            for plane, (channel, inverse, (_, minima)) in enumerate(zip(channels, inverses, fitted)):
                x = e.load(e.address(row, 0, channel, 4))
                code = e.b.fptosi(fit.codes(x, inverse, minima), packed.type)
                packed = e.b.or_(packed, e.b.shl(code, e.int_splat(plane * spec.bits)))
            small = e.b.trunc(packed, ir.VectorType(I8, lanes))
            place = e.b.add(e.address(codes, 0, tokens.index, spec.width), first)
            e.b.store(small, e.b.inttoptr(place, small.type.as_pointer()), align=1)


def _store_scale(e: Emitter[Packing], scale, address) -> None:
    if not e.plan.small_metadata:
        e.store_as(scale, address, "float16")
        return
    codes = small.scale_codes(e, scale)
    e.store_scalar(e.b.trunc(codes, ir.VectorType(I8, codes.type.count)), address, 1)


def _store_minimum(e: Emitter[Packing], scale, minimum, address) -> None:
    whole = e.plan.minimum_bytes == 2
    e.store_as(minimum if whole else small.minimum_codes(e, scale, minimum), address, "float16" if whole else "int8")


def _load_scale(e: Emitter[Packing], address, lanes: int):
    if not e.plan.small_metadata:
        return e.load(address, "float16", lanes)
    codes = e.load_scalar(address, ir.VectorType(I8, lanes), 1)
    return small.scales_of(e, e.b.zext(codes, ir.VectorType(I32, lanes)))


def _load_metadata(e: Emitter[Packing], scale, minimum, channel) -> list:
    """Scale and minimum of the channels from `channel` on, float32."""
    spec = e.plan
    place = channel if spec.keys else e.b.udiv(channel, I64(spec.group_size))
    count = spec.lanes if spec.keys else 1
    scales = _load_scale(e, e.address(scale, 0, place, spec.scale_bytes), count)
    kind = "float16" if spec.minimum_bytes == 2 else "int8"
    minima = e.load(e.address(minimum, 0, place, spec.minimum_bytes), kind, count)
    if kind == "int8":
        minima = e.b.fmul(e.b.fmul(minima, scales), e.float_splat(minimum_unit(spec.bits), count))
    return [scales, minima] if spec.keys else [e.shuffle(one, one, [0] * spec.lanes) for one in (scales, minima)]


class _UnitEmitter(Emitter[Packing]):
    """An emitter for the channels of a unit, or the first ones of them: rows lie `source_stride` bytes apart, what their errors
    count `at_shares` bytes behind the first."""

    def __init__(self, e: Emitter[Packing], fine: bool = False) -> None:
        super().__init__(e.b, e.plan.fine if fine else e.plan)
        self.source_stride, self.at_shares = e.plan.head_dim * 4, e.plan.at_shares * 4


def _emit_shares(e: _UnitEmitter, source, means) -> None:
    """What the error of each token of a unit counts, see `modules.codecs.grouped.token_shares`; at `means` is room for a row."""
    b, spec = e.b, e.plan
    tokens, chunks, row = I64(spec.tokens), I64(spec.head_dim // spec.lanes), spec.lanes * 4
    with cgutils.for_range(b, chunks) as chunk:
        mean = e.variable(e.float_splat(0.0))
        with cgutils.for_range(b, tokens) as token:
            x = e.load(e.address(e.address(source, 0, chunk.index, row), 0, token.index, e.source_stride))
            b.store(e.multiply_add(x, e.float_splat(1 / spec.tokens), b.load(mean)), mean)
        e.store(b.load(mean), e.address(means, 0, chunk.index, row))

    with cgutils.for_range(b, tokens) as token:
        distance = e.variable(e.float_splat(0.0))
        with cgutils.for_range(b, chunks) as chunk:
            x = e.load(e.address(e.address(source, 0, token.index, e.source_stride), 0, chunk.index, row))
            apart = b.fsub(x, e.load(e.address(means, 0, chunk.index, row)))
            b.store(e.multiply_add(apart, apart, b.load(distance)), distance)
        whole = b.extract_element(e.across_lanes(b.load(distance), b.fadd), I32(0))
        e.store_scalar(whole, e.address(source, e.at_shares, token.index, 4), 4)

    shares, size = e.address(source, e.at_shares), F32(float(spec.tokens))

    def each(change) -> ir.Value:
        """Change the number of each token; the sum of the new ones."""
        total = e.variable(F32(0.0))
        with cgutils.for_range(b, tokens) as token:
            new = change(e.load_float(e.address(shares, 0, token.index, 4)))
            e.store_scalar(new, e.address(shares, 0, token.index, 4), 4)
            b.store(b.fadd(b.load(total), new), total)
        return b.load(total)

    def divisor(total) -> ir.Value:
        mean = b.fdiv(total, size)
        return b.select(b.fcmp_ordered(">", mean, F32(SMALLEST)), mean, F32(SMALLEST))

    mean = divisor(each(lambda distance: distance))

    def cubed(distance) -> ir.Value:
        ratio = b.fdiv(distance, mean)
        return b.fmul(b.fmul(ratio, ratio), ratio)

    mean_cube = divisor(each(cubed))
    weights = each(lambda cube: b.fadd(F32(1.0), b.fdiv(cube, mean_cube)))
    each(lambda weight: b.fdiv(weight, weights))


def _emit_pack_unit(e: Emitter[Packing], source, codes, scale, minimum, largest) -> None:
    unit = _UnitEmitter(e)
    if e.plan.weighs:
        _emit_shares(_UnitEmitter(e, fine=bool(e.plan.wide)), source, e.address(source, e.plan.at_row * 4))
    _emit_fits(unit, source, scale, minimum, largest)
    _emit_codes(unit, source, codes, scale, minimum)


def _emit_pack_fine(e: Emitter[Packing], source, codes, scale, minimum, largest) -> None:
    if not e.plan.wide:
        return
    unit = _UnitEmitter(e, fine=True)
    _emit_fits(unit, source, scale, minimum, largest)
    _emit_codes(unit, source, codes, scale, minimum)


def _emit_widen_scales(e: Emitter[Packing], scale) -> None:
    """The scales of the wide channels as they are stored: times four, see `modules.codecs.grouped.quantize_keys`."""
    if not e.plan.wide:
        return
    fine = _UnitEmitter(e, fine=True)
    with cgutils.for_range(e.b, I64(e.plan.wide // fine.plan.lanes)) as loop:
        place = fine.address(scale, 0, loop.index, fine.plan.lanes * fine.plan.scale_bytes)
        _store_scale(fine, e.b.fmul(_load_scale(fine, place, fine.plan.lanes), fine.float_splat(4.0)), place)


@intrinsic
def pack_unit(typingctx, spec, source, codes, scale, minimum, largest):
    """Quantize one unit, see `_emit_fits` and `_emit_codes`."""
    return void_signature(spec, source, codes, scale, minimum, largest), emitting(_emit_pack_unit)


@intrinsic
def pack_fine(typingctx, spec, source, codes, scale, minimum, largest):
    """Likewise its first channels, the wide ones, to two bits more."""
    return void_signature(spec, source, codes, scale, minimum, largest), emitting(_emit_pack_fine)


@intrinsic
def widen_scales(typingctx, spec, scale):
    """See `_emit_widen_scales`."""
    return void_signature(spec, scale), emitting(_emit_widen_scales)
