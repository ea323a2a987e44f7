"""The constants of one compilation of the attention kernel."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from modules.kernels.numba.host import FLOAT_NAMES, byte_products, host, host_is_supported, row_bytes

MAX_ROWS = 8  # query rows that share each load
_MOST_IN_BYTES = 1 << 15
_MIN_TILE = 128  # tokens of a tile: its scores and weights stay in the first-level cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """The constants of one compilation.

    Attributes:
        k_format, v_format: bits of the packed codes, 2, 4 or 8, or the dtype of packed tokens that are rows of numbers:
            "int8" in code space, the model's in full precision.
        dense: dtype of sinks, window and new tokens: "float32", "bfloat16" or "float16".
        rows: query rows that share each load, 1 to 8.
        head_dim: channels.
        group_size, v_group: tokens that share the scale of a key channel; channels that share one of a value.
        wide: channels of keys that have two bits more, a multiple of 4.
        lanes: float32 lanes of a vector.
        block: scores of one register block, `padded_rows * tokens`.
        k_small_metadata, v_small_metadata: scales and minima are those of 8 bits.
        in_bytes: queries and weights meet codes as bytes, where the layout allows it.
    """

    k_format: int | str
    v_format: int | str
    dense: str
    rows: int
    head_dim: int
    group_size: int
    v_group: int
    wide: int
    lanes: int
    block: int
    k_small_metadata: bool
    v_small_metadata: bool
    in_bytes: bool

    @property
    def summary(self) -> str:
        """For people."""
        key, value = (f"{form}-bit" if isinstance(form, int) else form for form in (self.k_format, self.v_format))
        return f"over {key} keys and {value} values with heads of {self.head_dim}"

    @property
    def padded_rows(self) -> int:
        """`rows` rounded up to a power of two."""
        return 1 << (self.rows - 1).bit_length()

    @property
    def tokens(self) -> int:
        """Tokens of one register block; scores lie as `[blocks, padded_rows, tokens]`."""
        return self.block // self.padded_rows

    @property
    def groups(self) -> int:
        """Groups of channels of a value."""
        return self.head_dim // self.v_group

    @functools.cached_property
    def tile_tokens(self) -> int:
        """Tokens between two steps of the softmax; whole groups."""
        return -(-_MIN_TILE // self.group_size) * self.group_size

    @property
    def k_quantized(self) -> bool:
        return isinstance(self.k_format, int)

    @property
    def v_quantized(self) -> bool:
        return isinstance(self.v_format, int)

    @property
    def k_in_bytes(self) -> bool:
        """Whether queries meet packed keys as bytes: a lane has four channels of one token."""
        return self.in_bytes and isinstance(self.k_format, int) and self._fits_bytes(self.k_format, self.k_bytes)

    @property
    def v_in_bytes(self) -> bool:
        """Whether weights meet packed values as bytes: a lane has four tokens of one channel."""
        return self.in_bytes and isinstance(self.v_format, int) and self._fits_bytes(self.v_format, 4)

    def _fits_bytes(self, form: int, row: int) -> bool:
        whole = self.group_size % self.block == 0 and self.block == host()[0]
        few = self.tile_tokens <= _MOST_IN_BYTES  # their products add up to less than 2**31
        coarse = form < 8  # rounding costs more than codes of 8 bits do
        return byte_products() != "" and whole and few and coarse and row % 4 == 0

    @property
    def k_bits(self) -> int:
        """Bits of a key's code; 16 where keys are rows of numbers."""
        return self.k_format if isinstance(self.k_format, int) else 16

    @property
    def v_bits(self) -> int:
        return self.v_format if isinstance(self.v_format, int) else 16

    @property
    def k_planes(self) -> int:
        """Codes of a byte of packed keys."""
        return max(1, 8 // self.k_bits)

    @property
    def merged_rows(self) -> int:
        """Lanes of the vectors that hold a number for each row."""
        return max(self.lanes, self.padded_rows)

    @property
    def folded_bytes(self) -> int:
        """Bytes of a row of queries that meet keys as bytes: whole vectors."""
        return -(-self.head_dim // (4 * self.lanes)) * 4 * self.lanes

    @property
    def step(self) -> int:
        """Tokens whose weights lie together as bytes, `[padded_rows, step]`."""
        return max(4, self.tokens)

    @property
    def k_bytes(self) -> int:
        """Bytes of one packed key."""
        return row_bytes(self.k_format, self.head_dim)

    @property
    def v_bytes(self) -> int:
        return row_bytes(self.v_format, self.head_dim)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the low bits of one key's wide channels."""
        return self.wide // 4

    @property
    def k_scale_bytes(self) -> int:
        """Bytes of a scale of keys, whose minima are float16."""
        return 1 if self.k_small_metadata else 2

    @property
    def v_scale_bytes(self) -> int:
        """Bytes of a scale of values, and of a minimum."""
        return 1 if self.v_small_metadata else 2

    @property
    def dense_bytes(self) -> int:
        return row_bytes(self.dense, self.head_dim)

    def columns(self, form: int | str) -> list[tuple[int, int]]:
        """`(plane, chunk)` of the vectors that make up a head, planes of one chunk side by side."""
        planes = 8 // form if isinstance(form, int) else 1
        return [(p, c) for c in range(self.head_dim // planes // self.lanes) for p in range(planes)]

    def channel(self, form: int | str, plane: int, chunk: int) -> int:
        """First channel of a column."""
        planes = 8 // form if isinstance(form, int) else 1
        return plane * (self.head_dim // planes) + chunk * self.lanes

    def wide_lanes(self, plane: int, chunk: int) -> int:
        """Lanes of a column of packed keys that are wide channels, which come first."""
        return max(0, min(self.lanes, self.wide - self.channel(self.k_format, plane, chunk)))

    # Sections of a thread's scratch, float32, in multiples of a cache line.

    def _sections(self) -> dict[str, int]:
        head = self.rows * self.head_dim
        start = self.rows * self.lanes
        scores = self.tile_tokens * self.padded_rows
        return {
            "query": head + start,
            "placed": head + self.head_dim if self.k_in_bytes else head if self.wide else 0,
            "folded": head + start,
            "scores": scores,
            "spread": scores * self.groups,
            "offsets": self.groups * self.block,
            "bytes": self.rows * self.folded_bytes // 4 if self.k_in_bytes else 0,
            "units": 3 * self.merged_rows if self.k_in_bytes else 0,
            "weights": scores * self.groups // 4 if self.v_in_bytes else 0,
            "weight_units": self.groups * self.block,
            "maximum": self.block,
            "total": self.block,
            "decay": self.block,
        }

    def at(self, section: str) -> int:
        """Where a section of the scratch starts, in floats; "end" gives the size of it all."""
        position = 0
        for name, size in self._sections().items():
            if name == section:
                break
            position += -(-size // 16) * 16
        return position

    def value_of(self, name: str) -> int | bool:
        """What compiled code gets for an attribute; `at_scores` is `at("scores")`."""
        return self.at(name[3:]) if name.startswith("at_") else getattr(self, name)

    @functools.cached_property
    def scratch_floats(self) -> int:
        """Floats a thread works in."""
        return self.at("end")

    @functools.cached_property
    def partial_floats(self) -> int:
        """Floats a unit hands to the combination: sums `[rows, head_dim]`, maxima and totals `[rows]`."""
        return -(-(self.rows * (self.head_dim + 2)) // 16) * 16


@functools.cache
def plan_of(
    formats: tuple[int | str, int | str],
    dtype: torch.dtype,
    rows: int,
    head_dim: int,
    groups: tuple[int, int],
    wide: int,
    small_metadata: tuple[bool, bool],
    in_bytes: bool,
) -> Plan | None:
    """The plan for a layer, or None where the layout fits no vector or the dtype is not one of the three.

    `formats` and `in_bytes` are those of `Plan`, `groups` tokens (keys) and channels (values); rows of numbers have none.
    `small_metadata` says of either side whether its metadata has 8 bits.
    """
    if dtype not in FLOAT_NAMES or not host_is_supported():
        return None
    group_size = groups[0] if any(isinstance(form, int) for form in formats) else head_dim
    v_group = groups[1] if isinstance(formats[1], int) else head_dim
    most, block = host()
    planes = [8 // form for form in formats if isinstance(form, int)]
    lanes = math.gcd(most, head_dim, v_group, *(head_dim // p for p in planes))
    dense = FLOAT_NAMES[dtype]
    sizes = head_dim, group_size, v_group, wide, lanes, max(block, lanes)
    plan = Plan(*formats, dense, rows, *sizes, *small_metadata, in_bytes)
    return plan if lanes >= 4 and group_size % plan.tokens == 0 else None
