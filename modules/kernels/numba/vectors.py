"""Vector instructions: what the kernels' inner loops are made of.

Inner loops are emitted as LLVM vector instructions, because what keeps them fast, a block of accumulators that stays in
registers, is not something a loop over arrays makes LLVM do. Any CPU runs them; the lanes fit the host's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, TypeVar

from llvmlite import ir
from numba.core import cgutils

from modules.kernels.numba.host import ITEM_BYTES, host

if TYPE_CHECKING:
    from modules.kernels.numba.packing_spec import Packing
    from modules.kernels.numba.plan import Plan

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()


Constants = TypeVar("Constants", bound="Plan | Packing")


class Emitter(Generic[Constants]):
    """Vector instructions on addresses (int64 values) for one plan."""

    def __init__(self, builder: ir.IRBuilder, plan: Constants) -> None:
        self.b, self.plan = builder, plan

    def address(self, base, offset=0, index=None, stride: int = 0):
        """`base + offset + index * stride`, in bytes; `index` is an int64 value."""
        if index is not None:
            base = self.b.add(base, self.b.mul(index, I64(stride)))
        return self.b.add(base, I64(offset)) if offset else base

    def _load(self, address, typ, align: int):
        return self.b.load(self.b.inttoptr(address, typ.as_pointer()), align=align)

    def load_scalar(self, address, typ, align: int):
        """One number of an IR type."""
        return self._load(address, typ, align)

    def store_scalar(self, number, address, align: int) -> None:
        self.b.store(number, self.b.inttoptr(address, number.type.as_pointer()), align=align)

    def load_float(self, address):
        return self._load(address, F32, 4)

    def load(self, address, form: str = "float32", lanes: int | None = None):
        """`lanes` numbers of a dtype, as float32."""
        lanes = lanes or self.plan.lanes
        if form == "float32":
            return self._load(address, ir.VectorType(F32, lanes), 4)
        if form == "float16":
            return self.b.fpext(self._load(address, ir.VectorType(ir.HalfType(), lanes), 2), ir.VectorType(F32, lanes))
        if form == "int8":
            whole = self.b.sext(self._load(address, ir.VectorType(I8, lanes), 1), ir.VectorType(I32, lanes))
            return self.b.sitofp(whole, ir.VectorType(F32, lanes))
        wide = self.b.zext(self._load(address, ir.VectorType(I16, lanes), 2), ir.VectorType(I32, lanes))
        return self.b.bitcast(self.b.shl(wide, self.int_splat(16, lanes)), ir.VectorType(F32, lanes))

    def store(self, vector, address) -> None:
        self.b.store(vector, self.b.inttoptr(address, vector.type.as_pointer()), align=4)

    def store_as(self, vector, address, form: str) -> None:
        """A float32 vector in a dtype, rounded to nearest even; for int8 it holds whole numbers."""
        lanes = vector.type.count
        if form == "int8":
            vector = self.b.trunc(self.b.fptosi(vector, ir.VectorType(I32, lanes)), ir.VectorType(I8, lanes))
        if form == "float16":
            vector = self.b.fptrunc(vector, ir.VectorType(ir.HalfType(), lanes))
        elif form == "bfloat16":  # NaN needs no care: none is stored
            bits = self.b.bitcast(vector, ir.VectorType(I32, lanes))
            odd = self.b.and_(self.b.lshr(bits, self.int_splat(16, lanes)), self.int_splat(1, lanes))
            bits = self.b.add(bits, self.b.add(odd, self.int_splat(0x7FFF, lanes)))
            vector = self.b.trunc(self.b.lshr(bits, self.int_splat(16, lanes)), ir.VectorType(I16, lanes))
        self.b.store(vector, self.b.inttoptr(address, vector.type.as_pointer()), align=ITEM_BYTES[form])

    def float_splat(self, number: float, lanes: int | None = None):
        lanes = lanes or self.plan.lanes
        return ir.Constant(ir.VectorType(F32, lanes), [ir.Constant(F32, number)] * lanes)

    def int_splat(self, number: int, lanes: int | None = None):
        lanes = lanes or self.plan.lanes
        return ir.Constant(ir.VectorType(I32, lanes), [ir.Constant(I32, number)] * lanes)

    def broadcast(self, scalar, lanes: int | None = None):
        lanes = lanes or self.plan.lanes
        typ = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(typ, ir.Undefined), scalar, I32(0))
        return self.shuffle(one, one, [0] * lanes)

    def shuffle(self, first, second, order: list[int]):
        return self.b.shuffle_vector(
            first, second, ir.Constant(ir.VectorType(I32, len(order)), [I32(i) for i in order])
        )

    def _call(self, name: str, *args):
        typ = args[0].type
        function = ir.FunctionType(typ, [a.type for a in args])
        full = f"{name}.v{typ.count}f32"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, full), args)

    def multiply_add(self, first, second, third):
        """`first * second + third`, fused where the CPU can."""
        return self._call("llvm.fmuladd", first, second, third)

    def maximum(self, first, second):
        """The larger; `first` where `second` is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", second, first), second, first)

    def minimum(self, first, second):
        """The smaller; `first` where `second` is NaN."""
        return self.b.select(self.b.fcmp_ordered("<", second, first), second, first)

    def larger_int(self, first, second):
        """The larger of signed integers."""
        return self.b.select(self.b.icmp_signed(">", first, second), first, second)

    def round(self, x):
        """To whole numbers, halves to even."""
        return self._call("llvm.nearbyint", x)

    def across_lanes(self, vector, combine, together: int | None = None):
        """A vector with each lane combined with the others of its run of `together` lanes, a power of two; None: with all."""
        lanes, step = vector.type.count, 1
        while step < (together or lanes):
            vector = combine(vector, self.shuffle(vector, vector, [lane ^ step for lane in range(lanes)]))
            step *= 2
        return vector

    def across_tokens(self, vector, combine):
        """A block `[padded_rows, tokens]` with each lane combined with the others of its row."""
        return self.across_lanes(vector, combine, self.plan.tokens)

    def exp2(self, x):
        """2**x to 2 units in the last place; 0 below -127, NaN for NaN."""
        n = x.type.count
        floor = self.float_splat(-127.0, n)
        x = self.b.select(self.b.fcmp_ordered("<", x, floor), floor, x)
        whole = self.round(x)
        rest = self.b.fsub(x, whole)
        result = self.float_splat(math.log(2) ** 6 / 720, n)
        for power in range(5, -1, -1):
            result = self.multiply_add(result, rest, self.float_splat(math.log(2) ** power / math.factorial(power), n))
        exponent = self.b.add(self.b.fptosi(whole, ir.VectorType(I32, n)), self.int_splat(127, n))
        return self.b.fmul(result, self.b.bitcast(self.b.shl(exponent, self.int_splat(23, n)), x.type))

    def variable(self, value):
        """A mutable vector; LLVM keeps it in a register."""
        slot = cgutils.alloca_once(self.b, value.type)
        self.b.store(value, slot)
        return slot

    # Codes

    def raw(self, address, form: int | str):
        """A chunk as it is loaded: bytes widened to int32, or the floats themselves."""
        if not isinstance(form, int):
            return self.load(address, form)
        lanes = self.plan.lanes
        return self.b.zext(self._load(address, ir.VectorType(I8, lanes), 1), ir.VectorType(I32, lanes))

    def raw_offset(self, form: int | str, chunk: int) -> int:
        """Byte at which a chunk starts in a token."""
        return chunk * self.plan.lanes * (1 if isinstance(form, int) else ITEM_BYTES[form])

    def plane(self, raw, form: int | str, plane: int):
        """The codes of one plane of a chunk as floats, `1 / unit(form, plane)` times as large: a mask needs no shift."""
        if not isinstance(form, int):
            return raw
        if form == 8:
            return self._converted(raw)
        bit, mask = form * plane, (1 << form) - 1
        if self.looks_up:
            return self._looked_up(raw, bit, [(index >> bit % 4) & mask for index in range(16)])
        return self._converted(self.b.and_(raw, self.int_splat(mask << bit)))

    def unit(self, form: int | str, plane: int) -> float:
        """What `plane` is to be multiplied with to give codes; a power of two."""
        return 2.0 ** -(form * plane) if isinstance(form, int) and not self.looks_up else 1.0

    def wide_plane(self, raw, form: int, plane: int, low):
        """The whole codes whose high bits are a plane of a chunk, and whose low two start at bit `2 * lane` of `low`."""
        bit = form * plane
        if not self.looks_up or form != 2:
            high = self.b.and_(self._shifted(raw, bit - 2), self.int_splat(((1 << form) - 1) << 2))
            low = self.b.and_(self.b.lshr(self.broadcast(low), self._lanes_times_two()), self.int_splat(3))
            return self._converted(self.b.or_(high, low))
        place = 2 - bit % 4  # of the low bits in the index, beside the high ones
        low = self._rotated_right(self.broadcast(low), [(2 * lane - place) % 32 for lane in range(self.plan.lanes)])
        high = self.b.and_(self._shifted(raw, bit - bit % 4), self.int_splat(3 << (bit % 4)))
        index = self.b.or_(high, self.b.and_(low, self.int_splat(~(3 << (bit % 4)))))
        table = [4 * ((i >> bit % 4) & 3) + ((i >> place) & 3) for i in range(16)]
        return self._looked_up(index, 0, table)

    @property
    def looks_up(self) -> bool:
        """Whether the CPU finds 16 floats by the low 4 bits of 16 integers in one instruction, which takes the place of a
        mask and a conversion."""
        return self.plan.lanes == 16 and host()[1] == 16

    def _looked_up(self, raw, bit: int, table: list[int]):
        """`table[bits from bit - bit % 4 on]`; what lies above four bits is ignored."""
        floats = ir.Constant(ir.VectorType(F32, 16), [ir.Constant(F32, float(number)) for number in table])
        index = self._shifted(raw, bit - bit % 4)
        typ = ir.FunctionType(floats.type, [floats.type, index.type])
        name = "llvm.x86.avx512.permvar.sf.512"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, typ, name), [floats, index])

    def _shifted(self, raw, bit: int):
        """`raw` shifted so that `bit` becomes bit 0; `bit` may be negative."""
        if bit < 0:
            return self.b.shl(raw, self.int_splat(-bit))
        return self.b.lshr(raw, self.int_splat(bit)) if bit else raw

    def _converted(self, codes):
        return self.b.sitofp(codes, ir.VectorType(F32, self.plan.lanes))

    def _lanes_times_two(self):
        return ir.Constant(ir.VectorType(I32, self.plan.lanes), [I32(2 * lane) for lane in range(self.plan.lanes)])

    def _rotated_right(self, vector, bits: list[int]):
        amounts = ir.Constant(vector.type, [I32(bit) for bit in bits])
        function = ir.FunctionType(vector.type, [vector.type] * 3)
        name = f"llvm.fshr.v{vector.type.count}i32"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), [vector, vector, amounts])

    def word(self, address, count: int):
        """`count` bytes, at most four, as one int32."""
        word = self._load(address, ir.IntType(8 * count), 1)
        return word if count == 4 else self.b.zext(word, I32)

    def row_sums(self, vectors: list) -> list:
        """Sums over the lanes of each of `vectors`, in order, as vectors: a tree of shuffles and additions."""
        for how in (self._unpack32, self._unpack64) + (self._even_odd_parts,) * (self.plan.lanes.bit_length() - 3):
            vectors = [self._shuffled_sum(a, b, how()) for a, b in zip(vectors[::2], vectors[1::2])]
        return vectors

    def _shuffled_sum(self, a, b, order: tuple[list[int], list[int]]):
        return self.b.fadd(self.shuffle(a, b, order[0]), self.shuffle(a, b, order[1]))

    def _unpack32(self):
        n = self.plan.lanes
        return tuple(
            [lane + i for lane in range(0, n, 4) for i in (first, n + first, first + 1, n + first + 1)]
            for first in (0, 2)
        )

    def _unpack64(self):
        n = self.plan.lanes
        return tuple(
            [lane + i for lane in range(0, n, 4) for i in (first, first + 1, n + first, n + first + 1)]
            for first in (0, 2)
        )

    def _even_odd_parts(self):
        parts = self.plan.lanes // 4
        return tuple([4 * part + i for part in range(first, 2 * parts, 2) for i in range(4)] for first in (0, 1))
