"""Packing on the CPU, compiled by Numba: the counterparts of `quantize_keys` and `quantize_values`.

A unit of work is `group_size` tokens of a head's keys, or one token of its values. Its groups are fitted a vector of
channels (keys) or a group (values) at a time; the rounds of the fit read the input again, from the cache: one pass both
measures the error of a scale and gathers what the next refit needs. Then the codes are written.

Codes that lie halfway between two levels may round otherwise than torch's, as the division is a multiplication here.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modules.codecs.codec import Packed
from modules.codecs.grouped import (
    CLIPPED,
    FLOAT16_MAX,
    LSQ_ROUNDS,
    LSQ_START,
    WIDE_BITS,
    check_layout,
    place_channels,
    refuse_unrepresentable,
)
from modules.codecs.grouped import quantize_keys as _torch_keys
from modules.codecs.grouped import quantize_values as _torch_values
from modules.kernels.numba.vectors import (
    FLOAT_NAMES,
    I8,
    I32,
    I64,
    ITEM_BYTES,
    ConstantsType,
    Emitter,
    allowed_threads,
    emitting,
    host,
    host_is_supported,
    numba_threads,
    void_signature,
)
from modules.store.side import PackedSide

_LARGEST_BITS = int(np.float32(FLOAT16_MAX).view(np.int32))
_SERIAL_ELEMENTS = 1 << 16  # below which starting threads costs more than it saves


@dataclasses.dataclass(frozen=True)
class Packing:
    """The constants of one compilation.

    Attributes:
        what: "keys" or "values".
        bits: 2, 4 or 8.
        group_size: tokens of a key's group, channels of a value's.
        method: "minmax", "clipped" or "lsq".
        form: dtype of the input.
        head_dim: channels.
        lanes: float32 lanes of a vector.
    """

    what: str
    bits: int
    group_size: int
    method: str
    form: str
    head_dim: int
    lanes: int

    @property
    def planes(self) -> int:
        return 8 // self.bits

    @property
    def width(self) -> int:
        """Bytes of codes of one token."""
        return self.head_dim // self.planes

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def tokens(self) -> int:
        """Tokens of a unit."""
        return self.group_size if self.what == "keys" else 1

    @property
    def metadata(self) -> int:
        """Scales of a unit."""
        return self.head_dim if self.what == "keys" else self.head_dim // self.group_size

    def value_of(self, name: str) -> int:
        return getattr(self, name)


class _Fit:
    """Emits the fit of a vector of channels: each lane is a group (keys), or all lanes of all vectors are one (values)."""

    def __init__(self, e: Emitter, vectors: int, load, across: bool) -> None:
        self.e, self.b, self.spec = e, e.b, e.plan
        self.vectors, self.load, self.across = vectors, load, across

    def _each(self, *starts, body):
        """Variables that begin as `starts` after `body(x, variables) -> new ones` for every vector `x`."""
        slots = [self.e.variable(start) for start in starts]
        with cgutils.for_range(self.b, I64(self.vectors)) as loop:
            for slot, new in zip(slots, body(self.load(loop.index), [self.b.load(s) for s in slots])):
                self.b.store(new, slot)
        return [self.b.load(slot) for slot in slots]

    def _reduced(self, vector, combine):
        step = 1
        while self.across and step < self.spec.lanes:
            vector = combine(vector, self.e.shuffle(vector, vector, [lane ^ step for lane in range(self.spec.lanes)]))
            step *= 2
        return vector

    def splat(self, number: float):
        return self.e.float_splat(number)

    def as_stored(self, vector):
        """`vector` as float16 gives it back."""
        half = ir.VectorType(ir.HalfType(), self.spec.lanes)
        return self.b.fpext(self.b.fptrunc(vector, half), vector.type)

    def inverse(self, scale):
        safe = self.b.select(self.b.fcmp_ordered(">", scale, self.splat(0.0)), scale, self.splat(1.0))
        return self.b.fdiv(self.splat(1.0), safe)

    def codes(self, x, inverse, minimum):
        """Codes of `x`, as whole float32 numbers."""
        codes = self.e.round(self.b.fmul(self.b.fsub(x, minimum), inverse))
        codes = self.e.maximum(self.splat(0.0), codes)
        return self.e.minimum(codes, self.splat(float(self.spec.levels)))

    def range(self):
        """Lowest, highest, sum and largest magnitude, the last as int32 bits, so that NaN is large."""

        def body(x, now):
            magnitude = self.b.and_(self.b.bitcast(x, now[3].type), self.e.int_splat(0x7FFFFFFF))
            return (
                self.e.minimum(now[0], x),
                self.e.maximum(now[1], x),
                self.b.fadd(now[2], x),
                self.e.larger_int(magnitude, now[3]),
            )

        first = self.load(I64(0))
        low, high, total, largest = self._each(first, first, self.splat(0.0), self.e.int_splat(0), body=body)
        return (
            self._reduced(low, self.e.minimum),
            self._reduced(high, self.e.maximum),
            self._reduced(total, self.b.fadd),
            largest,
        )

    def _measure(self, scale, minimum, mean):
        """Squared error with a scale and minimum, and the sums of codes, of their squares and of `code * (x - mean)`."""
        inverse = self.inverse(scale)

        def body(x, now):
            codes = self.codes(x, inverse, minimum)
            miss = self.b.fsub(self.e.multiply_add(codes, scale, minimum), x)
            return (
                self.e.multiply_add(miss, miss, now[0]),
                self.b.fadd(now[1], codes),
                self.e.multiply_add(codes, codes, now[2]),
                self.e.multiply_add(codes, self.b.fsub(x, mean), now[3]),
            )

        return [self._reduced(v, self.b.fadd) for v in self._each(*[self.splat(0.0)] * 4, body=body)]

    def _refit(self, codes, squares, products, mean):
        """The least-squares scale and minimum for the codes that gave these sums."""
        count = self.splat(1.0 / self.spec.group_size)
        mean_code = self.b.fmul(codes, count)
        variance = self.b.fsub(squares, self.b.fmul(codes, mean_code))
        differ = self.b.fcmp_ordered(">", variance, self.splat(0.25))  # whole numbers that differ vary by 1/2 or more
        scale = self.b.select(differ, self.b.fdiv(products, variance), self.splat(0.0))
        scale = self.as_stored(scale)
        return scale, self.as_stored(self.b.fsub(mean, self.b.fmul(scale, mean_code)))

    def run(self):
        """`(scale, minimum, largest)` of the chunk; see `modules.codecs.grouped._fit`."""
        low, high, total, largest = self.range()
        span = self.b.fsub(high, low)
        levels = self.spec.levels
        if self.spec.method == "clipped":
            margin = self.b.fmul(span, self.splat((1 - CLIPPED) / 2))
            low, high = self.b.fadd(low, margin), self.b.fsub(high, margin)
            span = self.b.fsub(high, low)
        best_scale = self.as_stored(self.b.fdiv(span, self.splat(float(levels))))
        best_minimum = self.as_stored(low)
        if self.spec.method != "lsq":
            return best_scale, best_minimum, largest
        mean = self.b.fmul(total, self.splat(1.0 / self.spec.group_size))
        best_error = self._measure(best_scale, best_minimum, mean)[0]
        centre = self.b.fmul(self.b.fadd(low, high), self.splat(0.5))
        scale = self.as_stored(self.b.fmul(span, self.splat(LSQ_START / levels)))
        minimum = self.as_stored(self.b.fsub(centre, self.b.fmul(span, self.splat(LSQ_START / 2))))
        state = [self.e.variable(v) for v in (scale, minimum, best_scale, best_minimum, best_error)]
        with cgutils.for_range(self.b, I64(LSQ_ROUNDS + 1)) as loop:
            scale, minimum, *best = [self.b.load(slot) for slot in state]
            error, codes, squares, products = self._measure(scale, minimum, mean)
            fitted = self.e.broadcast(self.b.icmp_signed(">", loop.index, I64(0)))  # the start itself does not compete
            better = self.b.and_(self.b.fcmp_ordered("<", error, best[2]), fitted)
            for slot, new, old in zip(state[2:], (scale, minimum, error), best):
                self.b.store(self.b.select(better, new, old), slot)
            for slot, new in zip(state, self._refit(codes, squares, products, mean)):
                self.b.store(new, slot)
        return self.b.load(state[2]), self.b.load(state[3]), largest


def _emit_pack_group(e: Emitter, source, token_stride, codes, scale, minimum, largest) -> None:
    """Quantize one unit; `largest`, int32, receives the bits of its largest magnitude."""
    _emit_fits(e, source, token_stride, scale, minimum, largest)
    _emit_codes(e, source, token_stride, codes, scale, minimum)


def _emit_fits(e: Emitter, source, token_stride, scale, minimum, largest) -> None:
    spec, keys = e.plan, e.plan.what == "keys"
    size, lanes = ITEM_BYTES[spec.form], spec.lanes
    most = e.variable(e.int_splat(0))
    step = lanes if keys else spec.group_size
    stored = ir.VectorType(ir.HalfType(), lanes if keys else 1)
    with cgutils.for_range(e.b, I64(spec.head_dim // step)) as loop:
        place = e.address(source, 0, loop.index, step * size)

        def load(i):
            offset = e.b.mul(i, token_stride if keys else I64(lanes * size))
            return e.load(e.b.add(place, offset), spec.form)

        fit = _Fit(e, spec.group_size if keys else spec.group_size // lanes, load, across=not keys)
        *numbers, magnitude = fit.run()
        e.b.store(e.larger_int(magnitude, e.b.load(most)), most)
        for number, address in zip(numbers, (scale, minimum)):
            half = e.b.fptrunc(e.shuffle(number, number, list(range(stored.count))), stored)
            target = e.address(address, 0, loop.index, stored.count * 2)
            e.b.store(half, e.b.inttoptr(target, stored.as_pointer()), align=2)
    whole = e.b.load(most)
    for shift in (1 << i for i in range(lanes.bit_length() - 1)):
        whole = e.larger_int(whole, e.shuffle(whole, whole, [lane ^ shift for lane in range(lanes)]))
    e.b.store(e.b.extract_element(whole, I32(0)), e.b.inttoptr(largest, I32.as_pointer()), align=4)


def _emit_codes(e: Emitter, source, token_stride, codes, scale, minimum) -> None:
    """The bytes of a unit, from its input and the metadata that is stored."""
    spec, lanes, size = e.plan, e.plan.lanes, ITEM_BYTES[e.plan.form]
    fit = _Fit(e, 0, None, False)
    with cgutils.for_range(e.b, I64(spec.width // lanes)) as chunks:
        first = e.b.mul(chunks.index, I64(lanes))
        channels = [e.b.add(first, I64(plane * spec.width)) for plane in range(spec.planes)]
        fitted = [[_load_metadata(e, address, channel) for address in (scale, minimum)] for channel in channels]
        inverses = [fit.inverse(scales) for scales, _ in fitted]
        with cgutils.for_range(e.b, I64(spec.tokens)) as tokens:
            row = e.b.add(source, e.b.mul(tokens.index, token_stride))
            packed = e.int_splat(0)
            for plane, (channel, inverse, (_, minima)) in enumerate(zip(channels, inverses, fitted)):
                x = e.load(e.address(row, 0, channel, size), spec.form)
                code = e.b.fptosi(fit.codes(x, inverse, minima), packed.type)
                packed = e.b.or_(packed, e.b.shl(code, e.int_splat(plane * spec.bits)))
            small = e.b.trunc(packed, ir.VectorType(I8, lanes))
            place = e.b.add(e.address(codes, 0, tokens.index, spec.width), first)
            e.b.store(small, e.b.inttoptr(place, small.type.as_pointer()), align=1)


def _load_metadata(e: Emitter, address, channel):
    """Scale or minimum of the channels from `channel` on, float32."""
    if e.plan.what == "keys":
        return e.load(e.address(address, 0, channel, 2), "float16")
    group = e.b.udiv(channel, I64(e.plan.group_size))
    one = e.load(e.address(address, 0, group, 2), "float16", lanes=1)
    return e.shuffle(one, one, [0] * e.plan.lanes)


@intrinsic
def _pack_group(typingctx, spec, source, token_stride, codes, scale, minimum, largest):
    return void_signature(spec, source, token_stride, codes, scale, minimum, largest), emitting(_emit_pack_group)


@njit(cache=True, parallel=True, nogil=True)
def _pack(spec, source, strides, codes, scale, minimum, largest):
    """Units `[heads, groups]` of `source` (an address; `strides` in bytes: head, token) into codes `[heads, T, width]`."""
    units = largest.shape[0]
    heads = strides[0]
    for unit in prange(units):
        number = np.int64(unit)
        head, group = divmod(number, units // heads)
        place = (
            source + head // strides[1] * strides[2] + head % strides[1] * strides[3] + group * spec.tokens * strides[4]
        )
        target = codes + number * spec.tokens * spec.width
        meta = number * spec.metadata * 2
        _pack_group(spec, place, strides[4], target, scale + meta, minimum + meta, largest.ctypes.data + number * 4)


@functools.cache
def _compiled(spec: Packing):
    address = types.int64
    signature = (ConstantsType(spec), address, types.int64[::1], address, address, address, types.int32[::1])
    _pack.compile(signature)
    return _pack.overloads[signature].entry_point


@functools.cache
def _packing(what: str, bits: int, group_size: int, method: str, dtype: torch.dtype, head_dim: int) -> Packing | None:
    """What to compile, or None where the layout fits no vector."""
    if dtype not in FLOAT_NAMES or bits not in (2, 4, 8) or not host_is_supported() or head_dim % (8 // bits):
        return None
    lanes = math.gcd(host()[0], head_dim * bits // 8, *([group_size] if what == "values" else []))
    return Packing(what, bits, group_size, method, FLOAT_NAMES[dtype], head_dim, lanes) if lanes >= 4 else None


def quantize_keys(keys: torch.Tensor, bits: int, group_size: int, method: str = "lsq") -> Packed:
    """As `modules.codecs.grouped.quantize_keys`, for `[B, H, T, D]` on the CPU."""
    return _quantize("keys", keys, bits, group_size, method, keys.shape[-2], _torch_keys)


def quantize_values(values: torch.Tensor, bits: int, group_size: int, method: str = "minmax") -> Packed:
    """As `modules.codecs.grouped.quantize_values`, for `[B, H, T, D]` on the CPU."""
    return _quantize("values", values, bits, group_size, method, values.shape[-1], _torch_values)


@njit(cache=True, nogil=True)
def _place_fine_codes(codes, fine, extra):
    """4-bit codes `fine` `[rows, W/2]`: the high bits into 2-bit `codes` `[rows, D/4]`, in place of those of the first `W`
    channels, the low ones into `extra` `[rows, W/4]`, four neighbours a byte."""
    width, half = codes.shape[1], fine.shape[1]
    for row in range(len(codes)):
        for number in range(2 * half):
            code = fine[row, number % half] >> 4 * (number // half) & 15
            shift = 2 * (number // width)
            codes[row, number % width] = codes[row, number % width] & ~(3 << shift) | code >> 2 << shift
            low = (code & 3) << 2 * (number % 4)
            extra[row, number // 4] = low if number % 4 == 0 else extra[row, number // 4] | low


def widen(packed: Packed, fine: Packed) -> Packed:
    """As `modules.codecs.grouped.widen`, on the CPU; it may write into `packed`."""
    codes, scale, minimum, _ = packed
    codes, wide = codes.contiguous(), fine.scale.shape[-1]
    extra = codes.new_empty(*codes.shape[:-1], wide // 4)
    _place_fine_codes(*(t.contiguous().flatten(0, -2).numpy() for t in (codes, fine.codes, extra)))
    scale[..., :wide], minimum[..., :wide] = fine.scale * 4, fine.minimum
    return Packed(codes, scale, minimum, extra)


def _quantize(what: str, x: torch.Tensor, bits: int, group_size: int, method: str, size: int, fallback) -> Packed:
    check_layout(x, size, what, bits, group_size, method)
    spec = _packing(what, bits, group_size, method, x.dtype, x.shape[-1])
    if spec is None or not x.numel() or x.dim() != 4:
        return fallback(x, bits, group_size, method)
    x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
    batch, heads, tokens, _ = x.shape
    codes = torch.empty(batch, heads, tokens, spec.width, dtype=torch.uint8)
    rows = tokens // group_size if what == "keys" else tokens
    scale, minimum = (torch.empty(batch, heads, rows, spec.metadata, dtype=torch.float16) for _ in range(2))
    largest = np.empty(batch * heads * tokens // spec.tokens, np.int32)
    strides = np.array([batch * heads, heads, *(stride * x.element_size() for stride in x.stride()[:3])])
    with numba_threads(allowed_threads() if x.numel() > _SERIAL_ELEMENTS else 1):
        _compiled(spec)(spec, x.data_ptr(), strides, codes.data_ptr(), scale.data_ptr(), minimum.data_ptr(), largest)
    if largest.max() > _LARGEST_BITS:
        refuse_unrepresentable(x, what)
    return Packed(codes, scale, minimum)


def encode(side: PackedSide, states: torch.Tensor, order: torch.Tensor | None) -> Packed:
    """As `side.codec.encode`, compiled."""
    bits, group_size, method = side.bits, side.group_size, side.method
    if side.what == "values":
        return quantize_values(states, bits, group_size, method)
    if order is None:
        return quantize_keys(states, bits, group_size, method)
    states = place_channels(states, order)
    fine = quantize_keys(states[..., : side.wide], WIDE_BITS, group_size, method)
    return widen(quantize_keys(states, bits, group_size, method), fine)
