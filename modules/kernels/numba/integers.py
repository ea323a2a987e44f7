"""Vector instructions on bytes: products of codes with bytes, four of them added up in each lane of 32 bits."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from modules.kernels.numba.host import byte_products, host_has
from modules.kernels.numba.plan import Plan
from modules.kernels.numba.vectors import F32, I8, I16, I32, Emitter

_SMALLEST = 1e-30  # the largest magnitude of numbers that become bytes counts for at least this
_MAGIC = 1.5 * 2**23  # added to a float32 it leaves the nearest whole number, two's complement, in its low bits
_MAGIC_BITS = 0x4B400000  # of this number itself

_MULTIPLY_ADD = {  # of bytes and of pairs of them, by lanes of 32 bits
    16: ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512"),
    8: ("avx2.pmadd.ub.sw", "avx2.pmadd.wd"),
    4: ("ssse3.pmadd.ub.sw.128", "sse2.pmadd.wd"),
}

_PACKS = {  # with saturation, to words and to bytes, by lanes of 32 bits
    16: ("avx512.packssdw.512", "avx512.packsswb.512"),
    8: ("avx2.packssdw", "avx2.packsswb"),
    4: ("sse2.packssdw.128", "sse2.packsswb.128"),
}


class ByteEmitter(Emitter[Plan]):
    """An emitter for kernels that multiply bytes."""

    def __init__(self, e: Emitter[Plan]) -> None:
        super().__init__(e.b, e.plan)

    # Floats and bytes

    def counted(self, numbers, factor):
        """The whole numbers nearest to `numbers * factor`, int32, beyond `_MAGIC_BITS`, whose low bits are 0. NaN gives any."""
        moved = self.multiply_add(numbers, factor, self.float_splat(_MAGIC, numbers.type.count))
        return self.b.bitcast(moved, ir.VectorType(I32, numbers.type.count))

    def counted_sum(self, total, count):
        """As float32 the sum of whole numbers of which `count`, int32, were added up as `counted` gave them."""
        lanes = total.type.count
        beyond = self.broadcast(self.b.mul(count, I32(_MAGIC_BITS)), lanes)
        return self.b.sitofp(self.b.sub(total, beyond), ir.VectorType(F32, lanes))

    def low_bytes(self, counted):
        """Whole numbers as `counted` gave them as bytes."""
        return self.b.trunc(counted, ir.VectorType(I8, counted.type.count))

    def packed(self, counted: list):
        """The signed bytes of up to four vectors that `counted` gave, in four words a lane as `place_of_packed` says, as
        int32: what packs them works within 128 bits."""
        lanes = counted[0].type.count
        beyond, (of_words, of_bytes) = self.int_splat(_MAGIC_BITS, lanes), _PACKS[lanes]
        whole = [self.b.sub(vector, beyond) for vector in counted] + [self.int_splat(0, lanes)] * (4 - len(counted))
        pairs, size = ir.VectorType(I16, 2 * lanes), ir.VectorType(I8, 4 * lanes)
        halves = [self._x86(of_words, pairs, *whole[i : i + 2]) for i in (0, 2)]
        return self.b.bitcast(self._x86(of_bytes, size, *halves), whole[0].type)

    @staticmethod
    def place_of_packed(word: int, lanes: int) -> int:
        """The place of a word, four consecutive bytes, among the `lanes` of `packed` vectors."""
        vectors, word = divmod(word, lanes)
        vector, lane = divmod(word, lanes // 4)
        return vectors * lanes + 4 * lane + vector

    def units(self, largest, levels: int):
        """`(unit, inverse)`: what one of `levels` steps up to `largest` is, and what numbers are multiplied with to be
        counted in it."""
        lanes = largest.type.count
        largest = self.maximum(self.float_splat(_SMALLEST, lanes), largest)
        unit = self.b.fmul(largest, self.float_splat(1 / levels, lanes))
        return unit, self.b.fdiv(self.float_splat(float(levels), lanes), largest)

    def magnitude(self, numbers):
        """Absolute values."""
        return self._call("llvm.fabs", numbers)

    def store_bytes(self, vector, address) -> None:
        self.b.store(vector, self.b.inttoptr(address, vector.type.as_pointer()), align=1)

    def fetch(self, address, ahead: int, size: int) -> None:
        """Have the CPU fetch the `size` bytes that lie `ahead` bytes behind an address: its own guesses end with a page."""
        pointer, constant = I8.as_pointer(), [I32(0), I32(2), I32(1)]  # to read, into the second-level cache, data
        typ = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, typ, "llvm.prefetch.p0")
        for line in range(0, size, 64):
            self.b.call(function, [self.b.inttoptr(self.address(address, ahead + line), pointer), *constant])

    def load_bytes(self, address, count: int):
        return self._load(address, ir.VectorType(I8, count), 1)

    def splat_word(self, address, lanes: int):
        """The four bytes at an address in each lane."""
        return self.broadcast(self._load(address, I32, 1), lanes)

    def merged(self, vectors: list, combine) -> list:
        """Each of a few vectors combined over its lanes: the results, each in some lanes of few vectors, see `place_of_merged`."""
        lanes = vectors[0].type.count
        vectors = vectors + vectors[:1] * ((1 << (len(vectors) - 1).bit_length()) - len(vectors))
        per = lanes
        while len(vectors) > 1 and per > 1:
            both, per = self.unzipped(vectors), per // 2
            vectors = [combine(*pair) for pair in zip(both[: len(both) // 2], both[len(both) // 2 :])]
        for step in (1 << bit for bit in range(per.bit_length() - 1)):
            order = [lane ^ step for lane in range(lanes)]
            vectors = [combine(vector, self.shuffle(vector, vector, order)) for vector in vectors]
        return vectors

    @staticmethod
    def place_of_merged(number: int, count: int, lanes: int) -> int:
        """The lane, counted over all vectors, of the result for one of `count` vectors that were `merged`."""
        return number * max(1, lanes // (1 << (count - 1).bit_length()))

    # Where numbers lie

    @staticmethod
    def _every_other(lanes: int, chunk: int, odd: int) -> list[int]:
        return [lane for lane in range(2 * lanes) if lane // chunk % 2 == odd]

    def unzipped(self, vectors: list, chunk: int = 1) -> list:
        """The even chunks of the sequence that `vectors` are, an even number of them, then its odd ones."""
        lanes = vectors[0].type.count
        pairs = list(zip(vectors[::2], vectors[1::2]))
        return [self.shuffle(a, b, self._every_other(lanes, chunk, odd)) for odd in (0, 1) for a, b in pairs]

    def columns_of(self, vectors: list, width: int) -> list:
        """The columns of what lies row by row of `width` lanes, each a vector with a lane a row."""
        lanes, groups = vectors[0].type.count, [vectors]  # a group has every `len(groups)`th column
        while width % 2 == 0:
            both, width = [self.unzipped(group) for group in groups], width // 2
            groups = [one[:width] for one in both] + [one[width:] for one in both]
        order = [(groups[column % len(groups)], column // len(groups)) for column in range(width * len(groups))]
        return [self._column(group, lanes, width, column) for group, column in order]

    def _column(self, vectors: list, lanes: int, width: int, column: int):
        """Every `width`th lane from `column` on."""
        result = vectors[0]
        for number, vector in enumerate(vectors if width > 1 else ()):
            places = [row * width + column - number * lanes for row in range(lanes)]
            inside = [lanes + lane if 0 <= lane < lanes else row for row, lane in enumerate(places)]
            result = self.shuffle(result, vector, inside)
        return result

    # Codes

    def position(self, form: int, plane: int, most: int) -> int:
        """The bit to which codes of a plane are moved: their own, or the next one where they are at most `most`."""
        bit = form * plane
        while ((1 << form) - 1) << bit > most:
            bit -= 1
        return bit

    def codes(self, words, form: int, plane: int, position: int):
        """The codes of a plane of bytes, four in a lane, each from bit `position` of its byte on."""
        lanes = words.type.count
        moved = self._shifted(words, form * plane - position)
        return self.b.and_(moved, self.int_splat(0x01010101 * (((1 << form) - 1) << position), lanes))

    def wide_codes(self, words, plane: int, low, byte: int):
        """The whole codes whose high bits are a plane of keys, and whose low two are in a byte of each lane of `low`."""
        lanes = words.type.count
        high = self.codes(words, self.plan.k_bits, plane, 2)
        low = self.b.and_(self._spread_pairs(low, byte), self.int_splat(0x03030303, lanes))
        return self.b.or_(high, low)

    def _spread_pairs(self, words, byte: int):
        """Pairs of bits of one byte of each lane in the low bits of the lane's bytes, other bits above them."""
        lanes = words.type.count
        if host_has("avx512vbmi") and lanes == 16:
            size = ir.VectorType(I8, 64)
            starts = ir.Constant(size, [I8(32 * (i // 4 % 2) + 8 * byte + 2 * (i % 4)) for i in range(64)])
            moved = self._x86("avx512.pmultishift.qb.512", size, starts, self.b.bitcast(words, size))
            return self.b.bitcast(moved, words.type)
        pairs = self.b.and_(self._shifted(words, 8 * byte), self.int_splat(0xFF, lanes))
        pairs = self.b.or_(pairs, self._shifted(pairs, -12))
        return self.b.or_(pairs, self._shifted(pairs, -6))

    def _shifted(self, raw, bit: int):
        amount = self.int_splat(abs(bit), raw.type.count)
        return self.b.shl(raw, amount) if bit < 0 else self.b.lshr(raw, amount) if bit else raw

    # Products

    def add_products(self, sums, unsigned, signed):
        """`sums`, int32, plus in each lane the products of its four bytes; see `byte_products` for what must not be exceeded."""
        words = sums.type
        if byte_products() == "vnni":
            return self._x86(f"avx512.vpdpbusd.{32 * words.count}", words, sums, unsigned, signed)
        of_bytes, of_pairs = _MULTIPLY_ADD[words.count]
        size, pairs = ir.VectorType(I8, 4 * words.count), ir.VectorType(I16, 2 * words.count)
        halves = self._x86(of_bytes, pairs, *(self.b.bitcast(t, size) for t in (unsigned, signed)))
        ones = ir.Constant(pairs, [I16(1)] * pairs.count)
        return self.b.add(sums, self._x86(of_pairs, words, halves, ones))

    def _x86(self, name: str, result, *args):
        typ = ir.FunctionType(result, [arg.type for arg in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, typ, f"llvm.x86.{name}"), args)
