"""The keys or the values of one layer: sinks, packed tokens and the window."""

from __future__ import annotations

import dataclasses

import torch

from modules.codecs.codec import Codec, Packed, Part
from modules.store.ledger import Geometry


@dataclasses.dataclass
class PackedSide:
    """The keys or the values of one layer, for `B` sequences, `H` KV heads of `D` channels.

    Attributes:
        what: "keys" or "values".
        codec: what turns states into the packed parts and back.
        codes, scale, minimum, extra: the packed parts, see `modules.codecs.codec.Packed`, with `C` tokens of capacity;
            None where the codec has no such part. At 16 bits `codes` is `[B, H, C, D]` in the model's dtype.
        order: int64 `[B, H, D]`, the channels in the order in which codes and metadata hold them, wide ones first, chosen
            when a sequence's first groups are packed; None without wide channels.
        parts: how the packed parts are laid out, by name.
        sinks: `[B, H, sink_length, D]` in the model's dtype.
        window: `[B, H, residual_length + group_size, D]` in the model's dtype, a ring.
    """

    what: str
    codec: Codec
    parts: dict[str, Part]
    sinks: torch.Tensor
    window: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    order: torch.Tensor | None = None

    PACKED = Packed._fields
    TENSORS = (*PACKED, "order", "sinks", "window")

    @classmethod
    def empty(cls, what: str, codec: Codec, like: torch.Tensor, geometry: Geometry) -> PackedSide:
        """No tokens yet, for states shaped `[B, H, *, D]` as `like`."""
        batch, heads, _, head_dim = like.shape
        parts = codec.parts(head_dim, like.dtype)
        packed = {name: like.new_empty(batch, heads, 0, part.width, dtype=part.dtype) for name, part in parts.items()}
        order = None
        if codec.wide:
            order = torch.arange(head_dim, device=like.device).expand(batch, heads, -1).clone()
        return cls(
            what=what,
            codec=codec,
            parts=parts,
            sinks=like.new_zeros(batch, heads, geometry.sink_length, head_dim),
            window=like.new_zeros(batch, heads, geometry.ring, head_dim),
            order=order,
            **packed,
        )

    @property
    def bits(self) -> int:
        """Bits of a code; 16 in full precision."""
        return self.codec.bits

    @property
    def group_size(self) -> int:
        """Tokens (keys) or channels (values) a group."""
        return self.codec.group_size

    @property
    def grouped(self) -> bool:
        """Whether packed tokens have scales and minima; else they are rows of numbers, one a channel."""
        return "scale" in self.parts

    @property
    def method(self) -> str:
        """How the range of a group is found, as the codec names it."""
        return self.codec.method

    @property
    def wide(self) -> int:
        """Channels that have two bits more than the others."""
        return self.codec.wide

    @property
    def capacity(self) -> int:
        """Packed tokens there is room for."""
        return self.codes.shape[2]

    @property
    def planes(self) -> int:
        """Codes of one byte; 1 at 16 bits."""
        return max(1, 8 // self.bits)

    def check_magnitude(self, largest: float) -> None:
        """Raise `ValueError` where new states reach `largest` and that is too large or NaN."""
        if not largest <= self.codec.limit:
            raise ValueError(
                f"{self.what} reach {largest}: at {self.bits} bits they must be finite and at most {self.codec.limit:.5g} "
                "in magnitude (values as they are stored, rotated unless v_rotation=False). Look for the overflow upstream, "
                "or keep this side at 16 bits."
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors this side owns, by name."""
        return {name: t for name in self.TENSORS if (t := getattr(self, name)) is not None}

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` packed tokens; what is there is copied once, part by part."""
        for name in self.PACKED:
            old = getattr(self, name)
            if old is not None:
                new = old.new_zeros(*old.shape[:2], self._row(name, capacity), old.shape[3])
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def write(self, sequences: slice, start: int, packed: Packed) -> None:
        """Store packed groups at packed tokens `start…` of `sequences`."""
        for name, part in zip(self.PACKED, packed):
            if part is not None:
                first = self._row(name, start)
                getattr(self, name)[sequences, :, first : first + part.shape[2]] = part

    def _row(self, name: str, token: int) -> int:
        """Row of a packed part at which `token` starts."""
        return token // self.parts[name].every

    def stored(self, sequences: slice, start: int, stop: int) -> Packed:
        """Views of the packed tokens `start…stop`, multiples of the group size, of `sequences`."""
        return Packed(
            *(
                None if t is None else t[sequences, :, self._row(name, start) : self._row(name, stop)]
                for name in self.PACKED
                for t in (getattr(self, name),)
            )
        )

    def read(self, sequences: slice, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """The packed tokens `start…stop` `[b, H, stop - start, D]`, dequantized; both multiples of the group size."""
        order = None if self.order is None else self.order[sequences]
        return self.codec.decode(self.stored(sequences, start, stop), order, dtype)

    def write_window(self, sequences: slice, token: int, states: torch.Tensor) -> None:
        """Put states `[b, H, n, D]` of the tokens from `token` on, counted behind the sinks, into their slots."""
        ring, done = self.window.shape[2], 0
        while done < states.shape[2]:
            slot = (token + done) % ring
            step = min(states.shape[2] - done, ring - slot)
            self.window[sequences, :, slot : slot + step] = states[:, :, done : done + step]
            done += step
