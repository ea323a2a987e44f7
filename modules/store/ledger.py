"""How many tokens of each sequence a cache holds, and where: said once for all of its layers.

Token `i` of a sequence has index `i` whatever the padding. The first `sink_length` are sinks; of the rest, counted from
there, the first `packed` are codes and the others lie in a ring of `residual_length + group_size` slots, token `t` in
slot `t mod ring`. Groups therefore lie in contiguous slots and nothing is ever shifted.

Layers write a step behind these lengths; `commit` moves them on once all have. Until then what was written is dead, and
`Ledger.restore` is all it takes to forget it (but for ring slots that several new tokens reuse, see
`LayerStore.overwrites`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import torch

from modules.codecs.grouped import FLOAT16_MAX
from modules.store.step import Step

LENGTH, PACKED, MARK = range(3)  # rows of the counts on a device


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where tokens go, the same in every layer: `group_size`, `residual_length` and `sink_length` in tokens.

    `draft_room` is slots of the window beyond those it needs, a multiple of `group_size`: what is packed stays there in
    full precision until that many more tokens have come, so that taking tokens back unpacks exactly. `at_once` says that
    there is no need of it, nor of a window: tokens come as they are packed, one by one, and every one is.
    """

    group_size: int
    residual_length: int
    sink_length: int
    draft_room: int = 0
    at_once: bool = False

    @property
    def window(self) -> int:
        """Tokens behind the packed ones at which a group is packed."""
        return self.residual_length + self.group_size

    @property
    def ring(self) -> int:
        """Slots of the window."""
        return self.window + self.draft_room

    def packed_after(self, length: int, packed: int) -> int:
        """Packed tokens of a sequence that held `packed` of them and now has `length` tokens in all."""
        whole = (length - self.sink_length - self.residual_length) // self.group_size * self.group_size
        return max(packed, whole)

    def window_slots(self, length: int, packed: int) -> list[slice]:
        """The slots of the window tokens of a sequence, oldest first, as one or two slices."""
        first, count = packed % self.ring, max(0, length - self.sink_length - packed)
        end = first + count
        if end <= self.ring:
            return [slice(first, end)] if count else []
        return [slice(first, self.ring), slice(0, end - self.ring)]


@dataclasses.dataclass
class OpenStep:
    """A step that is being written: the layers, by number, that have written it."""

    step: Step
    written: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Saved:
    """What `Ledger.restore` goes back to."""

    seq_length: int
    lengths: list[int] | None
    packed: list[int] | None
    is_real: torch.Tensor | None
    most: int
    fewest_packed: int
    reach: list[int]
    tokens: torch.Tensor | None
    counts: dict[torch.device, torch.Tensor]


class Ledger:
    """The lengths of the sequences of one cache.

    On a GPU a step of one token may be known to the device alone (a mask lies there, and looking at it would wait). The
    lists are then fetched when somebody asks for them; `most` and `fewest_packed` bound them meanwhile.

    Attributes:
        geometry: where tokens go.
        seq_length: columns seen, padding included (tokens).
        is_real: bool `[B, seq_length]` once some are padding, else None.
        most: the longest sequence has no more tokens.
        fewest_packed: every sequence has this many packed tokens or more.
        moves: how often memory of the cache was moved, made or dropped; what is bound to addresses looks at it.
        tokens: ids of the columns from the first on, int64 `[B, n]`, where a file said them, else None. Those of columns to
            come are dropped when the cache moves on.
        max_length: tokens a sequence may reach, None without a limit.
        expected: tokens the longest sequence is expected to reach; there is room for them from the start.
        open: the step that layers are writing, None between steps.
        coming: packed tokens after the forward that is under way in several steps, 0 while none is.
    """

    def __init__(self, geometry: Geometry, max_length: int | None = None) -> None:
        self.geometry, self.max_length = geometry, max_length
        self.moves, self.expected = 0, max_length or 0
        self.open: OpenStep | None = None
        self.coming = 0
        self._recording = False
        self._watched: torch.Tensor | None = None  # marks of a GPU as they were some steps ago
        self._counts: dict[torch.device, torch.Tensor] = {}
        self.clear([])

    def clear(self, lengths: list[int]) -> None:
        """Hold `len(lengths)` sequences of that many tokens, none of them packed, and no columns."""
        self.seq_length = 0
        self.is_real: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self._reach = list(lengths)  # the most tokens each sequence ever had: its newest slots hold those
        self._set(lengths, [0] * len(lengths))

    def _set(self, lengths: list[int], packed: list[int]) -> None:
        self._lengths: list[int] | None = lengths
        self._packed: list[int] | None = packed
        self.most, self.fewest_packed = max(lengths, default=0), min(packed, default=0)
        self._forget_counts()

    def _forget_counts(self) -> None:
        if self._counts:  # what has their address must not use it again
            self.moves += 1
        self._counts = {}

    def _fetch(self) -> tuple[list[int], list[int]]:
        """Lengths and packed tokens, which only the device knew."""
        counts = next(iter(self._counts.values()))
        lengths, packed = counts[LENGTH].tolist(), counts[PACKED].tolist()
        self._lengths, self._packed = lengths, packed
        self.most, self.fewest_packed = max(lengths), min(packed)
        self._note_reach(lengths)
        return lengths, packed

    def _note_reach(self, lengths: list[int]) -> None:
        self._reach = [max(old, new) for old, new in zip(self._reach, lengths)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, in all its parts. Waits for the device where the host does not know."""
        return self._fetch()[0] if self._lengths is None else self._lengths

    @property
    def packed(self) -> list[int]:
        """Packed tokens of each sequence, likewise."""
        return self._fetch()[1] if self._packed is None else self._packed

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return len(self._lengths) if self._lengths is not None else next(iter(self._counts.values())).shape[1]

    def counts(self, device: torch.device) -> torch.Tensor:
        """Int32 `[3, B]` on `device`, in step with the lists: tokens, packed tokens, and a mark that kernels set where
        they were to pack states that cannot be stored."""
        counts = self._counts.get(device)
        if counts is None:
            rows = [self.lengths, self.packed, [0] * len(self.lengths)]
            counts = self._counts[device] = torch.tensor(rows, dtype=torch.int32, device=device)
        return counts

    def marked(self) -> bool:
        """Whether a kernel met states that it could not pack. Waits for the device."""
        return any(bool(counts[MARK].any()) for counts in self._counts.values())

    def raise_if_marked(self) -> None:
        """Raise `ValueError` where a step of one token packed states that cannot be stored. Waits for the device."""
        if self.marked():
            raise ValueError(
                f"states to quantize must be finite and, unless their scales are static, at most {FLOAT16_MAX:.0f} in magnitude "
                "(their scale and minimum are float16); a decode step packed others. Keep this side in full precision with "
                "bits 16, or look for the overflow upstream."
            )

    def watch_marks(self) -> None:
        """`raise_if_marked` without waiting: looks at what was copied to the host the last time, and copies anew.

        A step of one token on a GPU may have packed states that cannot be stored; this finds it some tokens later.
        """
        if self._watched is not None and self._watched.numpy().any():
            self.raise_if_marked()
        on_gpu = [counts for counts in self._counts.values() if counts.is_cuda]
        self._watched = on_gpu[0][MARK].to("cpu", non_blocking=True) if len(on_gpu) == 1 else None

    def packs(self, row: int, new: int) -> bool:
        """Whether `new` more tokens fill a group of the sequence `row`."""
        return self.geometry.packed_after(self.lengths[row] + new, self.packed[row]) > self.packed[row]

    def capacity_for(self, step: Step) -> int:
        """Packed tokens there must be room for once a step is stored, and the forward that it is a piece of."""
        if self._lengths is None or step.counted is None:
            return max(self.coming, self.geometry.packed_after(self.most + step.length, 0))
        none = [0] * len(step.counted)  # of sequences that are yet to come
        states = zip(self._lengths or none, self.packed or none, step.counted)
        return max([self.coming, *(self.geometry.packed_after(old + new, packed) for old, packed, new in states)])

    @contextlib.contextmanager
    def in_pieces(self, step: Step) -> Iterator[None]:
        """Within it `step` comes in several: the first makes room for all, so that nothing is moved between them."""
        self.coming = self.capacity_for(step)
        try:
            yield
        finally:
            self.coming = 0

    def columns_of(self, layer_idx: int) -> int:
        """Columns that a layer has seen, with those of the open step where it has written them."""
        if self.open is None or layer_idx not in self.open.written:
            return self.seq_length
        return self.seq_length + self.open.step.length

    def check_batch(self, batch: int) -> None:
        """Raise `ValueError` where `batch` is not the number of sequences held."""
        if batch != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} sequences, the new states {batch}; reset() the cache or use "
                "batch_repeat_interleave() / batch_select_indices()."
            )

    def check_room(self, step: Step) -> None:
        """Raise `ValueError` where the new tokens of a step do not fit."""
        if self.max_length is None or self.most + step.length <= self.max_length:
            return
        longest = max((old + new for old, new in zip(self.lengths, step.lengths)), default=0)
        if longest > self.max_length:
            raise ValueError(f"the cache was made with max_length={self.max_length} tokens; {longest} are needed.")

    def equally_long(self, new_lengths: list[int]) -> Iterator[tuple[slice, int]]:
        """Slices of neighbours in the batch that hold and receive equally many tokens, with that number of new ones."""
        first = 0
        for (_, _, new), alike in itertools.groupby(zip(self.lengths, self.packed, new_lengths)):
            stop = first + sum(1 for _ in alike)
            yield slice(first, stop), new
            first = stop

    def commit(self, step: Step, on_devices: bool = True) -> None:
        """Count a step in that every layer has written; there is no open one after it.

        One token a sequence moves the counts of the devices on in place; `on_devices=False` says that a replayed graph
        has done so.
        """
        self.open = None
        if step.length != 1:
            if self._lengths is None:
                self._fetch()
            self._forget_counts()
        elif on_devices:
            for device, counts in self._counts.items():
                self._advance(counts, 1 if step.all_real else step.lengths_on(device))
        if not self._recording:
            self._commit_on_host(step)

    def _commit_on_host(self, step: Step) -> None:
        known = self._lengths is not None and step.counted is not None
        if known or not self._counts:  # with no counts on a device this fetches those of the step once
            lengths = [old + new for old, new in zip(self.lengths, step.lengths)]
            packed = [self.geometry.packed_after(length, old) for length, old in zip(lengths, self.packed)]
            self._lengths, self._packed = lengths, packed
            self.most, self.fewest_packed = max(lengths, default=0), min(packed, default=0)
            self._note_reach(lengths)
        else:
            self._lengths = self._packed = None
            self.most += 1
        self.add_columns(step)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, steps move the counts on devices on and not what the host knows: they are recorded, not run."""
        self._recording = True
        try:
            yield
        finally:
            self._recording, self.open = False, None

    def _advance(self, counts: torch.Tensor, new: int | torch.Tensor) -> None:
        """Counts on a device after `new` more tokens of each sequence, in place and without waiting."""
        g = self.geometry
        counts[LENGTH].add_(new)
        whole = (counts[LENGTH] - (g.sink_length + g.residual_length)).div_(g.group_size, rounding_mode="floor")
        counts[PACKED].copy_(torch.maximum(counts[PACKED], whole.mul_(g.group_size)))

    def add_columns(self, step: Step) -> None:
        """Count the columns of a step in."""
        old, new = self.is_real, step.real
        known = old if new is None else new
        if known is not None:
            batch, device = self.batch_size, known.device
            if old is None:
                old = torch.ones(batch, self.seq_length, dtype=torch.bool, device=device)
            if new is None:
                new = torch.ones(batch, step.length, dtype=torch.bool, device=device)
            self.is_real = torch.cat([old.to(device), new], dim=1)
        self._keep_tokens(self.seq_length)
        self.seq_length += step.length

    def lengths_within(self, seq_length: int) -> list[int]:
        """Tokens of each sequence in the first `seq_length` columns."""
        if self.is_real is None:
            return [seq_length] * self.batch_size
        return self.is_real[:, :seq_length].sum(1).tolist()

    def set_columns(self, stored: int, step: Step) -> None:
        """Say in which columns from `stored` on the real tokens of `step` came, where they were stored real ones first."""
        if self.is_real is None or step.real is None:
            return  # no padding, no order
        self.is_real = torch.cat([self.is_real[:, :stored], step.real.to(self.is_real.device)], dim=1)

    def crop(self, seq_length: int) -> None:
        """Forget all but the first `seq_length` columns, and the tokens of the others; groups that are cut are not packed."""
        lengths = self.lengths_within(seq_length)
        self._set(lengths, self.packed_within(lengths))
        self.seq_length = seq_length
        if self.is_real is not None:
            self.is_real = self.is_real[:, :seq_length]
        self._keep_tokens(seq_length)

    def _keep_tokens(self, seq_length: int) -> None:
        if self.tokens is not None:
            self.tokens = self.tokens[:, :seq_length]

    def packed_within(self, lengths: list[int]) -> list[int]:
        """Packed tokens that stay where only the first `lengths[b]` tokens of each sequence do.

        As many as if the others had never come, where the window still holds what is then not packed; else all whole groups.
        """
        stay = []
        for length, packed, reach in zip(lengths, self.packed, self._reach):
            unpacked = min(packed, self.geometry.packed_after(length, 0))
            whole = max(0, length - self.geometry.sink_length) // self.geometry.group_size * self.geometry.group_size
            stay.append(unpacked if self._in_window(unpacked, reach) else min(packed, whole))
        return stay

    def clean_cut(self, row: int, length: int) -> int:
        """The most tokens, of the first `length` of a sequence, that it can be cropped to with none of them in full precision
        that was packed. None is packed then that would not be if the sequence had never been longer than `length`."""
        unpacked = self.geometry.packed_after(length, 0)
        if unpacked >= self.packed[row] or self.holds(row, unpacked):
            return length
        return min(length, self.geometry.sink_length + unpacked)

    def holds(self, row: int, first: int) -> bool:
        """Whether the window of a sequence holds its tokens from `first` on, counted behind the sinks, packed ones too."""
        return self._in_window(first, self._reach[row])

    def held_from(self) -> list[int]:
        """The oldest token of each sequence, counted behind the sinks, that its window holds, packed ones too."""
        g = self.geometry
        return [
            max(0, min(packed, reach - g.sink_length - g.ring + 1)) for packed, reach in zip(self.packed, self._reach)
        ]

    def make_draft_room(self, tokens: int) -> Geometry:
        """The geometry with slots for `tokens` tokens that may be taken back, which is in force once `geometry` is set."""
        group = self.geometry.group_size
        return dataclasses.replace(self.geometry, draft_room=-(-tokens // group) * group)

    def only_window(self) -> None:
        """The window was laid anew: its slots hold the tokens that are not packed and no others."""
        g = self.geometry
        self._reach = [
            max(length, packed + g.sink_length + g.ring) for length, packed in zip(self.lengths, self.packed)
        ]

    def _in_window(self, first: int, reach: int) -> bool:
        """Whether the tokens from `first` on, counted behind the sinks, are in their slots; one may be lost to a step that
        failed."""
        return first > reach - self.geometry.sink_length - self.geometry.ring

    def pieces(self, length: int, chunk: int | None, drafts: int = 0) -> list[int]:
        """How `length` new tokens of a forward are to be cut, in tokens.

        Args:
            chunk: the longest piece; None for no limit.
            drafts: how many of them, at the end, may be taken back. Each is to see what it would see if the tokens came one
                by one: a piece ends where a group would be packed, and where the first tokens of an empty cache end.
        """
        cuts = set(range(0, length, chunk or length))
        if drafts and not self.geometry.at_once and len(set(self.lengths)) <= 1:
            stored, packed = max(self.lengths, default=0), max(self.packed, default=0)
            seen = [self.geometry.packed_after(stored + i, packed) for i in range(length)]
            cuts |= {i for i in range(max(1, length - drafts), length) if seen[i] != seen[i - 1]}
            cuts |= {length - drafts} if not stored and 0 < drafts < length else set()
        ends = sorted(cuts)[1:] + [length]
        return [end - start for start, end in zip(sorted(cuts), ends)]

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences `index` (int64, `[n]`), in that order; one may come several times."""
        rows = index.tolist()
        if self.is_real is not None:
            self.is_real = self.is_real[index.to(self.is_real.device)]
        if self.tokens is not None:
            self.tokens = self.tokens[index.to(self.tokens.device)]
        self._reach = [self._reach[row] for row in rows]
        self._set([self.lengths[row] for row in rows], [self.packed[row] for row in rows])

    def save(self) -> Saved:
        """What there is, to go back to; counts on a device are copied, as a step moves them on in place."""
        copied = self._lengths is None and not self._recording
        counts = {device: t.clone() for device, t in self._counts.items()} if copied else {}
        return Saved(
            seq_length=self.seq_length,
            lengths=self._lengths,
            packed=self._packed,
            is_real=self.is_real,
            most=self.most,
            fewest_packed=self.fewest_packed,
            reach=self._reach,
            tokens=self.tokens,
            counts=counts,
        )

    def restore(self, saved: Saved, attempted: int = 0) -> None:
        """Go back to what `save` gave; a step may have written `attempted` tokens of each sequence since."""
        self.open = None
        if self._recording:
            return
        self.seq_length, self.is_real = saved.seq_length, saved.is_real
        self._forget_counts()
        self._lengths, self._packed, self._counts = saved.lengths, saved.packed, dict(saved.counts)
        self.most, self.fewest_packed = saved.most, saved.fewest_packed
        self.tokens = saved.tokens
        self._reach = [reach + attempted for reach in saved.reach]
