"""The memory of one layer of a cache."""

from __future__ import annotations

import dataclasses

import torch

from modules.codecs.codec import Codec
from modules.codecs.grouped import choose_order
from modules.codecs.rotation import rotate
from modules.codecs.static import ChannelScales
from modules.codecs.static_codec import StaticCodec
from modules.store.ledger import Geometry, Ledger
from modules.store.side import PackedSide
from modules.store.step import Step

_SLACK = 64  # capacity grows by a sixty-fourth: at most 1.6 % of the packed part is unused
_SLACK_AT_ONCE = 32  # tokens, where they are packed one by one: a short cache would grow at each
_LEAST_SLACK = 256  # tokens, on a GPU: a graph is recorded again each time memory moves
_CAST_TOKENS = 1024  # codes are dequantized this many tokens at a time
_SLICE_ELEMENTS = 1 << 21  # queries squared at a time


@dataclasses.dataclass(eq=False)
class PackedLayer:
    """One layer of the cache: the two sides, and what is known of its queries. How many tokens it holds is the ledger's.

    Attributes:
        key, value: the two sides.
        ledger: of the cache, shared by its layers.
        query_energy: float32 `[B, H, D]`, Σ q² of the queries until the wide key channels are chosen by it; None where
            there are none to choose. Never written to in place.
        rotates: values are stored times a Hadamard matrix.
        exact_products: kernels multiply codes with queries and weights as they are, never rounded to bytes.
        newest_energy: q² of the newest queries that `query_energy` counts, float32 `[B, H, D]` each with the number of its
            token; kept while the window has room for drafts, which may be taken back.
    """

    key: PackedSide
    value: PackedSide
    ledger: Ledger
    query_energy: torch.Tensor | None = None
    rotates: bool = False
    exact_products: bool = False
    newest_energy: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)

    @classmethod
    def empty(
        cls,
        key: torch.Tensor,
        codecs: tuple[Codec, Codec],
        ledger: Ledger,
        rotates: bool,
        exact_products: bool = False,
    ) -> PackedLayer:
        """No tokens yet, for states shaped `[B, H, *, D]` as `key`; room for those that the ledger expects."""
        batch, heads, _, head_dim = key.shape
        keys, values = (
            PackedSide.empty(what, codec, key, ledger.geometry) for what, codec in zip(("keys", "values"), codecs)
        )
        layer = cls(keys, values, ledger, rotates=rotates, exact_products=exact_products)
        if layer.key.wide:
            layer.query_energy = key.new_zeros(batch, heads, head_dim, dtype=torch.float32)
        expected = ledger.geometry.packed_after(ledger.expected, 0)
        if expected:
            for side in layer.sides:
                side.grow(expected)
        ledger.moves += 1
        return layer

    @property
    def sides(self) -> tuple[PackedSide, PackedSide]:
        """Keys and values."""
        return self.key, self.value

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return self.ledger.lengths

    @property
    def packed(self) -> list[int]:
        """Packed tokens of each sequence."""
        return self.ledger.packed

    @property
    def group_size(self) -> int:
        """Tokens that are packed together."""
        return self.ledger.geometry.group_size

    @property
    def sink_length(self) -> int:
        """The first tokens, in full precision."""
        return self.ledger.geometry.sink_length

    @property
    def ring(self) -> int:
        """Slots of the window."""
        return self.ledger.geometry.ring

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.key.window.shape[0]

    def window_slots(self, sequence: int) -> list[slice]:
        """The slots of the window tokens of a sequence, oldest first, as one or two slices."""
        return self.ledger.geometry.window_slots(self.lengths[sequence], self.packed[sequence])

    def full_precision(self, side: PackedSide, sequences: slice) -> list[torch.Tensor]:
        """The sinks of equally long sequences and the parts of their window, oldest first, `[b, H, T, D]` each."""
        sequence = sequences.start or 0
        sinks = side.sinks[sequences, :, : min(self.lengths[sequence], self.sink_length)]
        return [sinks, *(side.window[sequences, :, slots] for slots in self.window_slots(sequence))]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the layer, by a dotted name."""
        named = {f"key.{name}": t for name, t in self.key.tensors().items()}
        named |= {f"value.{name}": t for name, t in self.value.tensors().items()}
        return named if self.query_energy is None else named | {"query_energy": self.query_energy}

    @property
    def scales(self) -> tuple[ChannelScales, ChannelScales] | None:
        """Those of keys and values where they are in code space, else None."""
        key, value = self.key.codec, self.value.codec
        return (key.scales, value.scales) if isinstance(key, StaticCodec) and isinstance(value, StaticCodec) else None

    def enter(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New states `[B, H, T, D]` as they are stored: values rotated, or both in code space.

        Raises:
            ValueError: for states that are NaN, infinite or too large.
        """
        if self.scales is None:
            value = self.rotate(value)
        self.check_states(key, value)
        if self.scales is None:
            return key, value
        return self.scales[0].enter(key), self.scales[1].enter(value)

    def fold(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[B, heads, q, D]` as they are to meet stored keys."""
        return query if self.scales is None else self.scales[0].fold(query)

    def leave(self, attended: torch.Tensor) -> torch.Tensor:
        """What was attended over stored values, `[B, q, heads, D]`, as the model has its values."""
        return self.rotate(attended) if self.scales is None else self.scales[1].unfold(attended)

    def given(self, side: PackedSide, states: torch.Tensor) -> torch.Tensor:
        """Stored states `[b, H, T, D]` of a side as the model has them."""
        if isinstance(side.codec, StaticCodec):
            return side.codec.scales.decode(states, states.dtype)
        return self.rotate(states) if side is self.value else states

    def seen(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New states `[B, H, T, D]` as attention sees them: rounded where they enter code space."""
        if self.scales is None:
            return key, value
        return self.scales[0].round(key), self.scales[1].round(value)

    def saturated(self) -> tuple[int, int]:
        """How many of the stored keys and values lay beyond the range their scales were calibrated for."""
        if self.scales is None:
            return 0, 0
        keys, values = (
            sum(
                int(ChannelScales.saturated(side.codes[sequence, :, start : min(start + _CAST_TOKENS, packed)]))
                for sequence, packed in enumerate(self.packed)
                for start in range(0, packed, _CAST_TOKENS)
            )
            for side in self.sides
        )
        return keys, values

    def rotate(self, states: torch.Tensor) -> torch.Tensor:
        """Values `[B, H, T, D]` as they are stored; attended values back from there (the rotation is its own inverse)."""
        return rotate(states) if self.rotates else states

    @property
    def observes(self) -> bool:
        """Whether queries still count for the choice of wide channels."""
        return self.query_energy is not None and self.ledger.fewest_packed == 0

    def observe(self, query: torch.Tensor, step: Step) -> None:
        """Count the queries `[B, num_attention_heads, q, D]` in, real tokens first, while the wide channels of a sequence
        are not chosen."""
        energy = self.query_energy
        if energy is None or not self.observes:
            return
        real = None
        if not step.all_real:
            counted = step.lengths_on(query.device).unsqueeze(1)
            real = (counted > torch.arange(query.shape[2], device=query.device))[:, None, :, None]
        tokens = max(1, _SLICE_ELEMENTS * query.shape[2] // max(1, query.numel()))
        for start in range(0, query.shape[2], tokens):
            part = query[:, :, start : start + tokens].float()
            if real is not None:
                part = part * real[:, :, start : start + tokens]
            energy = energy + part.square().sum(2).unflatten(1, (energy.shape[1], -1)).sum(2)
        self.query_energy = energy
        if self.ledger.geometry.draft_room:
            self._note_newest(query, real)

    def _note_newest(self, query: torch.Tensor, real: torch.Tensor | None) -> None:
        room, stored, kv_heads = self.ledger.geometry.draft_room, max(self.lengths), self.key.window.shape[1]
        for number in range(max(0, query.shape[2] - room), query.shape[2]):
            squares = query[:, :, number].float().square().unflatten(1, (kv_heads, -1)).sum(2)
            if real is not None:
                squares = squares * real[:, :, number]
            self.newest_energy.append((stored + number, squares))
        del self.newest_energy[:-room]

    def choose_wide(self, sequences: slice | list[int], groups: torch.Tensor) -> None:
        """Choose the wide key channels, if there are any, of sequences by their first groups of keys `[b, H, T, D]`."""
        if self.key.order is not None and self.query_energy is not None:
            energy = self.query_energy[sequences]
            codec = self.key.codec
            self.key.order[sequences] = choose_order(groups, codec.wide, codec.group_size, energy, codec.rotary)

    def overwrites(self, step: Step) -> bool:
        """Whether new tokens take slots of the window in which tokens lie that are stored by now."""
        if step.length == 1 or not self.ledger.seq_length:
            return False
        ledger, sinks = self.ledger, self.sink_length
        states = zip(ledger.lengths, ledger.packed, step.lengths)
        return any(
            length > sinks + packed and length + new - sinks - packed > self.ring for length, packed, new in states
        )

    def check_states(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise `ValueError` for new states, values rotated if they are to be, that are NaN, infinite or too large.

        A single token on a GPU is not looked at, since that would stop the device at every step; packing checks it.
        """
        if key.device.type != "cpu" and key.shape[2] == 1:
            return
        for side, states in ((self.key, key), (self.value, value)):
            side.check_magnitude(torch.linalg.vector_norm(states, torch.inf).item() if states.numel() else 0.0)

    def make_room(self, step: Step) -> None:
        """Grow the packed part where new tokens will fill groups that do not fit; its memory moves then."""
        self.room_for(self.ledger.capacity_for(step))

    def room_for(self, need: int) -> None:
        """Grow the packed part to `need` tokens and some more where they do not fit; its memory moves then."""
        if need <= self.key.capacity:
            return
        least = _LEAST_SLACK if self.key.window.device.type == "cuda" else 0
        unit = _SLACK_AT_ONCE if self.ledger.geometry.at_once else self.group_size
        slack = max(need // _SLACK, unit, least)
        capacity = max((need + slack) // self.group_size * self.group_size, self._expected())
        for side in self.sides:
            side.grow(capacity)
        self.ledger.moves += 1

    def _expected(self) -> int:
        return self.ledger.geometry.packed_after(self.ledger.expected, 0)

    def read(self, side: PackedSide, sequences: slice, dtype: torch.dtype) -> torch.Tensor:
        """All tokens of `sequences` (equally long), in order, `[b, H, length, D]`, dequantized."""
        sequence = sequences.start or 0
        packed = self.packed[sequence]
        parts = [side.sinks[sequences, :, : min(self.lengths[sequence], self.sink_length)].to(dtype)]
        step = max(self.group_size, _CAST_TOKENS // self.group_size * self.group_size)
        for start in range(0, packed, step):
            parts.append(side.read(sequences, start, min(start + step, packed), dtype))
        parts += [side.window[sequences, :, slot].to(dtype) for slot in self.window_slots(sequence)]
        return torch.cat(parts, dim=2)

    def keep(self, lengths: list[int]) -> None:
        """Prepare for the ledger to forget all but the first `lengths[b]` tokens of each sequence.

        A group that is cut is dequantized into the window, from where it is packed again when the window is full.
        """
        starts = self.ledger.packed_within(lengths)
        for sequence, (length, start) in enumerate(zip(lengths, starts)):
            if start < self.packed[sequence] and not self.ledger.holds(sequence, start):
                sequences, left = slice(sequence, sequence + 1), length - self.sink_length - start
                for side in self.sides:
                    group = side.read(sequences, start, start + self.group_size, side.window.dtype)
                    side.write_window(sequences, start, group[:, :, : max(0, left)])
        while self.newest_energy and self.newest_energy[-1][0] >= max(lengths):
            _, squares = self.newest_energy.pop()
            self.query_energy = self.query_energy - squares
        if self.query_energy is not None and not all(lengths):
            self.query_energy = self.query_energy.clone()
            self.query_energy[[sequence for sequence, length in enumerate(lengths) if not length]] = 0

    def enlarge_window(self, geometry: Geometry) -> None:
        """Give the window the slots of another geometry; its tokens stay."""
        for side in self.sides:
            states = [
                torch.cat([side.window[sequence : sequence + 1, :, slot] for slot in self.window_slots(sequence)] or
                          [side.window[sequence : sequence + 1, :, :0]], dim=2)
                for sequence in range(self.batch_size)
            ]  # fmt: skip
            batch, heads, _, head_dim = side.window.shape
            side.window = side.window.new_zeros(batch, heads, geometry.ring, head_dim)
            for sequence, tokens in enumerate(states):
                side.write_window(slice(sequence, sequence + 1), self.packed[sequence], tokens)

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences `index` (int64, `[n]`), in that order; one may come several times."""
        for side in self.sides:
            for name, t in side.tensors().items():
                setattr(side, name, t.index_select(0, index.to(t.device)))
        if self.query_energy is not None:
            index = index.to(self.query_energy.device)
            self.query_energy = self.query_energy.index_select(0, index)
            self.newest_energy = [(token, squares.index_select(0, index)) for token, squares in self.newest_energy]

    def to(self, device: torch.device | str) -> None:
        """Move every tensor to `device`."""
        for side in self.sides:
            for name, t in side.tensors().items():
                setattr(side, name, t.to(device, non_blocking=True))
        if self.query_energy is not None:
            self.query_energy = self.query_energy.to(device, non_blocking=True)
            self.newest_energy = [(token, t.to(device, non_blocking=True)) for token, t in self.newest_energy]
