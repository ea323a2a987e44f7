"""Code that fits the scale and minimum of groups, a vector of channels (keys) or a group (values) at a time.

The rounds of the fit read the input again, from the CPU's cache: one pass both measures the error of a scale and gathers
what the next refit needs.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from modules.codecs.grouped import CLIPPED, LSQ_ROUNDS, LSQ_START
from modules.codecs.metadata import LARGEST_MINIMUM, minimum_unit
from modules.kernels.numba import small_metadata as small
from modules.kernels.numba.vectors import I64, Emitter


class Fit:
    """Emits the fit of a vector of channels: each lane is a group (keys), or all lanes of all vectors are one (values).

    `share(i)` is what errors of vector `i` count, a vector; all of a group add up to 1.
    """

    def __init__(self, e: Emitter, vectors: int, load, share, across: bool) -> None:
        self.e, self.b, self.spec = e, e.b, e.plan
        self.vectors, self.load, self.share, self.across = vectors, load, share, across

    def _each(self, *starts, body):
        """Variables that begin as `starts` after `body(x, share, variables) -> new ones` for every vector `x`."""
        slots = [self.e.variable(start) for start in starts]
        with cgutils.for_range(self.b, I64(self.vectors)) as loop:
            now = [self.b.load(slot) for slot in slots]
            for slot, new in zip(slots, body(self.load(loop.index), self.share(loop.index), now)):
                self.b.store(new, slot)
        return [self.b.load(slot) for slot in slots]

    def _reduced(self, vector, combine):
        return self.e.across_lanes(vector, combine) if self.across else vector

    def splat(self, number: float):
        return self.e.float_splat(number)

    def as_stored(self, vector):
        """`vector` as float16 gives it back."""
        half = ir.VectorType(ir.HalfType(), self.spec.lanes)
        return self.b.fpext(self.b.fptrunc(vector, half), vector.type)

    def stored(self, scale, minimum):
        """Both as they will be read; see `modules.codecs.metadata.Metadata.stored`."""
        if not self.spec.small_metadata:
            return self.as_stored(scale), self.as_stored(minimum)
        e, b, levels = self.e, self.b, self.spec.levels
        rounded, unit = small.scales_of(e, small.scale_codes(e, scale)), minimum_unit(self.spec.bits)
        moved = e.multiply_add(b.fsub(scale, rounded), self.splat(levels / 2), minimum)
        if self.spec.keys:
            return rounded, self.as_stored(moved)
        needed = b.fmul(small.magnitude(e, minimum), self.splat(1 / (LARGEST_MINIMUM * unit)))
        above = small.at_most(e, b.add(small.scale_codes(e, needed), e.int_splat(1)))
        far = b.fcmp_ordered(">", needed, rounded)
        rounded = b.select(far, small.scales_of(e, above), rounded)
        codes = small.minimum_codes(e, rounded, b.select(far, minimum, moved))
        return rounded, b.fmul(b.fmul(codes, rounded), self.splat(unit))

    def inverse(self, scale):
        safe = self.b.select(self.b.fcmp_ordered(">", scale, self.splat(0.0)), scale, self.splat(1.0))
        return self.b.fdiv(self.splat(1.0), safe)

    def codes(self, x, inverse, minimum):
        """Codes of `x`, as whole float32 numbers."""
        codes = self.e.round(self.b.fmul(self.b.fsub(x, minimum), inverse))
        codes = self.e.maximum(self.splat(0.0), codes)
        return self.e.minimum(codes, self.splat(float(self.spec.levels)))

    def range(self):
        """Lowest, highest, mean and largest magnitude, the last as int32 bits, so that NaN is large."""

        def body(x, share, now):
            magnitude = self.b.and_(self.b.bitcast(x, now[3].type), self.e.int_splat(0x7FFFFFFF))
            return (
                self.e.minimum(now[0], x),
                self.e.maximum(now[1], x),
                self.e.multiply_add(x, share, now[2]),
                self.e.larger_int(magnitude, now[3]),
            )

        first = self.load(I64(0))
        low, high, mean, largest = self._each(first, first, self.splat(0.0), self.e.int_splat(0), body=body)
        return (
            self._reduced(low, self.e.minimum),
            self._reduced(high, self.e.maximum),
            self._reduced(mean, self.b.fadd),
            largest,
        )

    def _measure(self, scale, minimum, mean):
        """Squared error with a scale and minimum, and the means of codes, of their squares and of `code * (x - mean)`."""
        inverse = self.inverse(scale)

        def body(x, share, now):
            codes = self.codes(x, inverse, minimum)
            miss = self.b.fsub(self.e.multiply_add(codes, scale, minimum), x)
            counted = self.b.fmul(codes, share)
            return (
                self.e.multiply_add(self.b.fmul(miss, share), miss, now[0]),
                self.b.fadd(now[1], counted),
                self.e.multiply_add(counted, codes, now[2]),
                self.e.multiply_add(counted, self.b.fsub(x, mean), now[3]),
            )

        return [self._reduced(v, self.b.fadd) for v in self._each(*[self.splat(0.0)] * 4, body=body)]

    def _refit(self, codes, squares, products, mean):
        """The least-squares scale and minimum for the codes that gave these means."""
        variance = self.b.fsub(squares, self.b.fmul(codes, codes))
        least = 1 / (8 * self.spec.group_size)  # below what one code that differs makes of it, above what rounding does
        differ = self.b.fcmp_ordered(">", variance, self.splat(least))
        scale = self.b.select(differ, self.b.fdiv(products, variance), self.splat(0.0))
        scale, _ = self.stored(scale, self.b.fsub(mean, self.b.fmul(scale, codes)))
        return self.stored(scale, self.b.fsub(mean, self.b.fmul(scale, codes)))

    def run(self):
        """`(scale, minimum, largest)` of the chunk; see `modules.codecs.grouped._fit`."""
        low, high, mean, largest = self.range()
        span = self.b.fsub(high, low)
        levels = self.spec.levels
        if self.spec.method == "clipped":
            margin = self.b.fmul(span, self.splat((1 - CLIPPED) / 2))
            low, high = self.b.fadd(low, margin), self.b.fsub(high, margin)
            span = self.b.fsub(high, low)
        best_scale, best_minimum = self.stored(self.b.fdiv(span, self.splat(float(levels))), low)
        if self.spec.method != "lsq":
            return best_scale, best_minimum, largest
        best_error = self._measure(best_scale, best_minimum, mean)[0]
        centre = self.b.fmul(self.b.fadd(low, high), self.splat(0.5))
        scale, minimum = self.stored(
            self.b.fmul(span, self.splat(LSQ_START / levels)),
            self.b.fsub(centre, self.b.fmul(span, self.splat(LSQ_START / 2))),
        )
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
