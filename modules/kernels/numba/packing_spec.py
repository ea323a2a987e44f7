"""The constants of one compilation of the packing kernel."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from modules.codecs.grouped import LOW_BITS
from modules.kernels.numba.host import FLOAT_NAMES, host, host_is_supported


@dataclasses.dataclass(frozen=True)
class Packing:
    """What is packed, and how.

    A unit of work is `group_size` tokens of a head's keys, or one token of its values.

    Attributes:
        what: "keys" or "values".
        bits: 2, 4 or 8; 6 where only wide channels are packed, a byte each.
        group_size: tokens of a key's group, channels of a value's.
        method: "minmax", "clipped" or "lsq".
        dense: dtype of the states.
        head_dim: channels.
        wide: channels of keys that get two bits more.
        lanes: float32 lanes of a vector.
        small_metadata: it has 8 bits, see `modules.codecs.metadata`.
    """

    what: str
    bits: int
    group_size: int
    method: str
    dense: str
    head_dim: int
    wide: int
    lanes: int
    small_metadata: bool

    @property
    def summary(self) -> str:
        """For people."""
        return f"{self.what} of {self.head_dim} channels at {self.bits} bits"

    @property
    def keys(self) -> bool:
        return self.what == "keys"

    @property
    def weighs(self) -> bool:
        """Whether errors of some tokens count more than those of others."""
        return self.keys and self.method == "lsq"

    @property
    def planes(self) -> int:
        """Codes of a byte."""
        return 8 // self.bits

    @property
    def width(self) -> int:
        """Bytes of codes of one token."""
        return self.head_dim // self.planes

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def tokens(self) -> int:
        """Tokens of a unit."""
        return self.group_size if self.keys else 1

    @property
    def metadata(self) -> int:
        """Scales of a unit."""
        return self.head_dim if self.keys else self.head_dim // self.group_size

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return 1 if self.small_metadata else 2

    @property
    def minimum_bytes(self) -> int:
        """Bytes of one minimum."""
        return 1 if self.small_metadata and not self.keys else 2

    @property
    def fine(self) -> Packing:
        """The packing of the wide channels alone."""
        whole = dataclasses.replace(self, bits=self.fine_bits, head_dim=self.wide, wide=0)
        return dataclasses.replace(whole, lanes=math.gcd(host()[0], whole.width))

    @property
    def fine_width(self) -> int:
        """Bytes of the whole codes of one key's wide channels."""
        return self.fine.width if self.wide else 0

    @property
    def fine_bits(self) -> int:
        """Bits of one of those codes."""
        return self.bits + LOW_BITS

    @property
    def extra_bytes(self) -> int:
        """Bytes of the low bits of one key's wide channels."""
        return self.wide // 4

    # Sections of a thread's scratch, float32.

    @property
    def at_row(self) -> int:
        """Where one row lies before its channels are placed, behind the unit itself."""
        return self.tokens * self.head_dim

    @property
    def at_fine(self) -> int:
        """Where the whole codes of the wide channels lie, `[tokens, fine_width]` bytes, behind that row."""
        return self.at_row + self.head_dim

    @property
    def at_shares(self) -> int:
        """Where what the errors of the tokens count lies, behind those codes."""
        return self.at_fine + self.tokens * self.fine_width // 4 + 1

    @property
    def scratch_floats(self) -> int:
        """Floats a thread works in; whole cache lines."""
        return -(-(self.at_shares + self.tokens) // 16) * 16

    def value_of(self, name: str) -> int | bool:
        """What compiled code gets for an attribute."""
        return getattr(self, name)


@functools.cache
def packing_of(
    what: str,
    bits: int,
    group_size: int,
    method: str,
    dtype: torch.dtype,
    head_dim: int,
    wide: int,
    small_metadata: bool,
) -> Packing | None:
    """What to compile, or None where the layout fits no vector."""
    if dtype not in FLOAT_NAMES or bits not in (2, 4, 8) or not host_is_supported() or head_dim % (8 // bits):
        return None
    lanes = math.gcd(host()[0], head_dim * bits // 8, *([group_size] if what == "values" else []))
    spec = Packing(what, bits, group_size, method, FLOAT_NAMES[dtype], head_dim, wide, lanes, small_metadata)
    return spec if lanes >= 4 else None
