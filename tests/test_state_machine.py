"""Random sequences of what a cache can be asked to do, against plain tensors (a state machine of hypothesis).

The plain cache keeps every state as it was given. When a group is packed, what the cache has made of it must lie within
the bound of its codec, and from then on it must stay exactly that.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import pickle
import tempfile
from collections.abc import Iterator

import pytest
import torch
from conftest import relative_error
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layers import random_scales
from transformers import LlamaConfig

from modules.cache.cache import DRAFT_ROOM
from modules.codecs.grouped import CLIPPED, LOW_BITS
from modules.codecs.metadata import LARGEST_MINIMUM, minimum_unit
from modules.codecs.rotation import rotate
from modules.codecs.static import StaticParameters, model_facts
from modules.kivi_cache_general import KIVICache
from modules.options import ALLOWED_BITS

LAYERS, KV_HEADS, HEADS, HEAD_DIM, GROUP_SIZE = 2, 2, 6, 32, 16
MAX_LENGTH, MOST_ROWS, LONGEST_STEP = 150, 4, 70
SCALING = HEAD_DIM**-0.5
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    hidden_size=HEADS * HEAD_DIM,
)


class Broken(BaseException):
    """Stands for whatever ends a forward."""


# --- plain tensors ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    """What a cache is to hold.

    Attributes:
        held: by layer, side (keys, values) and sequence, `[KV_HEADS, tokens, HEAD_DIM]`.
        given: the same before they were packed.
        packed: packed tokens of each sequence.
        reach: the most tokens each sequence had since its window was laid out.
        real: bool `[B, columns]`.
        draft_room: slots of the window that keep what is packed.
    """

    sink_length: int
    residual_length: int
    held: list[list[list[torch.Tensor]]]
    given: list[list[list[torch.Tensor]]]
    packed: list[int]
    reach: list[int]
    real: torch.Tensor
    draft_room: int = 0
    group_size: int = GROUP_SIZE

    @classmethod
    def empty(
        cls, sink_length: int, residual_length: int, batch: int, draft_room: int = 0, group_size: int = GROUP_SIZE
    ) -> Plain:
        nothing = torch.zeros(KV_HEADS, 0, HEAD_DIM)
        held, given = ([[[nothing] * batch for _ in range(2)] for _ in range(LAYERS)] for _ in range(2))
        real = torch.ones(batch, 0, dtype=torch.bool)
        return cls(sink_length, residual_length, held, given, [0] * batch, [0] * batch, real, draft_room, group_size)

    @property
    def batch(self) -> int:
        return self.real.shape[0]

    @property
    def columns(self) -> int:
        return self.real.shape[1]

    @property
    def lengths(self) -> list[int]:
        return self.real.sum(1).tolist()

    def copy(self) -> Plain:
        return copy.deepcopy(self)

    def rows(self) -> Iterator[list[torch.Tensor]]:
        """`held` and `given` of every layer and side."""
        for states in (self.held, self.given):
            for sides in states:
                yield from sides

    def whole_groups(self, length: int) -> int:
        return max(0, length - self.sink_length) // self.group_size * self.group_size

    def packed_at(self, length: int) -> int:
        """Packed tokens of a sequence that grew to `length` tokens."""
        return self.whole_groups(length - self.residual_length)

    def append(self, states: list[list[torch.Tensor]], real: torch.Tensor) -> list[tuple[int, int]]:
        """Take `[B, KV_HEADS, T, HEAD_DIM]` by layer and side; the tokens of each sequence that are packed by it."""
        self.real = torch.cat([self.real, real], dim=1)
        for rows, side in zip(self.rows(), [side for sides in states for side in sides] * 2):
            rows[:] = [torch.cat([old, side[row][:, real[row]]], dim=1) for row, old in enumerate(rows)]
        newly = []
        for row, length in enumerate(self.lengths):
            start, self.packed[row] = self.packed[row], max(self.packed[row], self.packed_at(length))
            self.reach[row] = max(self.reach[row], length)
            newly.append((self.sink_length + start, self.sink_length + self.packed[row]))
        return newly

    def crop(self, columns: int) -> None:
        """Forget columns. What was packed and comes back into the window is as it was given where there was room for
        drafts, else as it was packed, a whole group at most."""
        self.real = self.real[:, :columns]
        for rows in self.rows():
            rows[:] = [old[:, :length] for old, length in zip(rows, self.lengths)]
        for row, length in enumerate(self.lengths):
            start = min(self.packed[row], self.packed_at(length))
            if not self.in_window(start, row):
                start = min(self.packed[row], self.whole_groups(length))
            given_back = start < self.packed[row] and self.in_window(start, row)
            self.packed[row], first = start, self.sink_length + start
            for held, original in zip(itertools.chain(*self.held), itertools.chain(*self.given)):
                states = torch.cat([held[row][:, :first], (original if given_back else held)[row][:, first:]], dim=1)
                held[row], original[row] = states, torch.cat([original[row][:, :first], states[:, first:]], dim=1)

    def in_window(self, first: int, row: int) -> bool:
        """Whether no later token has taken the slots of the tokens from `first` on, counted behind the sinks."""
        ring = self.residual_length + self.group_size + self.draft_room
        return first > self.reach[row] - self.sink_length - ring

    def make_draft_room(self) -> None:
        self.draft_room = DRAFT_ROOM
        ring = self.residual_length + self.group_size + self.draft_room
        self.reach = [max(length, self.sink_length + old + ring) for length, old in zip(self.lengths, self.packed)]

    def select(self, index: list[int]) -> None:
        self.real, self.packed = self.real[index], [self.packed[row] for row in index]
        self.reach = [self.reach[row] for row in index]
        for rows in self.rows():
            rows[:] = [rows[row] for row in index]

    def dense(self, layer: int, side: int) -> torch.Tensor:
        """`[B, KV_HEADS, columns, HEAD_DIM]`, zeros at padding."""
        dense = torch.zeros(self.batch, KV_HEADS, self.columns, HEAD_DIM)
        for row, states in enumerate(self.held[layer][side]):
            dense[row, :, self.real[row]] = states
        return dense

    def attended(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor):
        """softmax(q k) v of new tokens over what is held and themselves: `[B, T, HEADS, HEAD_DIM]`, zeros at padding."""
        out = torch.zeros(self.batch, query.shape[2], HEADS, HEAD_DIM)
        for row, is_real in enumerate(real):
            keys, values = (
                torch.cat([self.held[layer][side][row], new[row][:, is_real]], dim=1)
                for side, new in enumerate((key, value))
            )
            q = query[row][:, is_real]
            scores = q @ keys.repeat_interleave(HEADS // KV_HEADS, 0).transpose(1, 2) * SCALING
            new, past = q.shape[1], keys.shape[1] - q.shape[1]
            scores.masked_fill_(torch.ones(new, past + new, dtype=torch.bool).triu(past + 1), -torch.inf)
            out[row, is_real] = (scores.softmax(-1) @ values.repeat_interleave(HEADS // KV_HEADS, 0)).transpose(0, 1)
        return out


def quantization_bounds(groups: torch.Tensor, bits: int, codec) -> torch.Tensor:
    """The largest root of a group's mean squared error that a codec may make of states whose last dimension is the group.

    That of the range cut into equal steps: a least-squares fit starts there. float16 rounds scale and minimum; scales of 8 bits
    are a sixteenth off, and minima of 8 bits count them.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    spread, largest = high - low, groups.abs().amax(-1)
    step = spread / (2**bits - 1)
    bound = step / 2 + (spread + largest) * 2**-9
    if codec.method == "clipped":
        bound += spread * (1 - CLIPPED) / 2
    if not codec.metadata.exact:
        bound += (spread + step) / 32
        if codec.metadata.minimum == torch.int8:
            unit = minimum_unit(bits)
            bound += unit * step + largest / (LARGEST_MINIMUM * unit)
    return bound


def check_groups(given: torch.Tensor, stored: torch.Tensor, codec, side: int) -> None:
    """Whole groups of tokens `[KV_HEADS, T, HEAD_DIM]` against what the cache made of them, values rotated if it does."""
    if "scale" not in codec.parts(HEAD_DIM, given.dtype):
        assert torch.equal(given, stored)
        return
    if side == 0:  # keys share a scale over tokens
        given, stored = (t.transpose(1, 2) for t in (given, stored))
    given, stored = (t.unflatten(-1, (-1, codec.group_size)) for t in (given, stored))
    errors = (stored - given).square().mean(-1).sqrt()
    assert (errors <= quantization_bounds(given, codec.bits, codec)).all()
    if codec.wide:
        fine = (errors <= quantization_bounds(given, codec.bits + LOW_BITS, codec)).sum(1)  # [KV_HEADS, groups]
        assert (fine >= codec.wide).all()


# --- the machine ------------------------------------------------------------------------------------------------------

lengths = st.one_of(st.integers(1, 3), st.integers(1, LONGEST_STEP))
OURS = ("over codes", "rebuilt")  # a step of the cache; else each layer's `update` alone
forwards = st.sampled_from((*OURS, "stock model", "updates"))


def through_file(cache: KIVICache) -> KIVICache:
    """The cache, saved and loaded; itself while there is nothing to save."""
    if not cache.get_seq_length():
        return copy.deepcopy(cache)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/cache"
        cache.save(path, model=CONFIG)
        return KIVICache.load(path, CONFIG, max_length=cache.ledger.max_length)


class CacheMachine(RuleBasedStateMachine):
    """A cache and its plain twin; what a rule does to one it does to the other, and the invariants compare them."""

    backend: str
    bits: st.SearchStrategy  # of a layer
    variants: st.SearchStrategy

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        self.max_length = data.draw(st.sampled_from((None, None, MAX_LENGTH)))
        self.cache = self.make_cache(data)
        self.plain = self.nothing(0)
        self.frozen: list[tuple[KIVICache, Plain]] = []
        self.seed = 0

    group_size = GROUP_SIZE

    def nothing(self, batch: int, draft_room: int = 0) -> Plain:
        return Plain.empty(self.sinks, self.residual, batch, draft_room, self.group_size)

    def make_cache(self, data: st.DataObject) -> KIVICache:
        bits = [data.draw(self.bits) for _ in range(LAYERS)]
        self.sinks, self.residual = data.draw(st.sampled_from((0, 4))), data.draw(st.sampled_from((0, 16, 32)))
        return KIVICache(
            CONFIG,
            k_bits=[k for k, _ in bits],
            v_bits=[v for _, v in bits],
            group_size=GROUP_SIZE,
            residual_length=self.residual,
            sink_length=self.sinks,
            backend=self.backend,
            max_length=self.max_length,
            **data.draw(self.variants),
        )

    # what the rules are made of

    def random(self, *shape: int) -> torch.Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        offset = 3 * torch.randn(shape[1], 1, shape[3], generator=generator)  # keys have one a channel
        return torch.randn(shape, generator=generator) + offset

    def new_states(self, batch: int, length: int) -> list[list[torch.Tensor]]:
        return [[self.random(batch, KV_HEADS, length, HEAD_DIM) for _ in "kv"] for _ in range(LAYERS)]

    def batch_for(self, data: st.DataObject) -> int:
        """Sequences of the next step: those there are, any number where nothing is stored."""
        return self.plain.batch if self.plain.columns else data.draw(st.integers(1, MOST_ROWS), label="batch")

    def emptied_for(self, batch: int) -> None:
        if not self.plain.columns and batch != self.plain.batch:
            self.plain = self.nothing(batch, self.plain.draft_room)

    def fits(self, real: torch.Tensor) -> bool:
        return (
            self.max_length is None
            or max(old + new for old, new in zip(self.plain.lengths, real.sum(1).tolist())) <= self.max_length
        )

    def mask_of(self, real: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.plain.real, real], dim=1).long()

    def forward(self, how: str, states: list, real: torch.Tensor, mask: torch.Tensor | None, broken_at=None) -> None:
        """One forward that writes every layer, or is broken off before the layer `broken_at`."""
        batch, length = real.shape
        cache, attends = self.cache, how == "over codes" and self.plain.columns > 0
        if how == "stock model":
            cache.get_mask_sizes(length, 0)  # which it asks first
        if how not in OURS:
            context, step = contextlib.nullcontext(), None
        else:
            step = cache.new_step(mask, batch, length)
            positions = cache.next_positions(step, batch, torch.device("cpu"))
            expected = torch.tensor(self.plain.lengths).unsqueeze(1) + (real.cumsum(1) - 1).clamp_min(0)
            assert torch.equal(positions, expected)
            context = cache.step(step, over_codes=how == "over codes")
        with context:
            for index, (layer, (key, value)) in enumerate(zip(cache.layers, states)):
                if index == broken_at:
                    raise Broken
                query = self.random(batch, HEADS, length, HEAD_DIM)
                if attends:
                    expected = self.plain.attended(index, query, key, value, real)
                    out = cache.attend(query, key, value, layer, SCALING, step)
                    assert relative_error(out[real], expected[real]) < 1e-5 or not real.any()
                elif how == "over codes":
                    cache.store(key, value, layer, step, query)
                else:
                    keys, values = cache.update(key, value, index)
                    assert torch.equal(keys[:, :, -length:], key) and torch.equal(values[:, :, -length:], value)
            if broken_at == LAYERS:
                raise Broken

    def adopt(self, newly: list[tuple[int, int]]) -> None:
        """Check groups that were packed just now; from here on they are to stay as they are."""
        for index, layer in enumerate(self.cache.layers):
            for number, side in enumerate(layer.store.sides):
                dense, rows = layer.dense(side), self.plain.held[index][number]
                for row, (start, stop) in enumerate(newly):
                    if start == stop:
                        continue
                    given, stored = rows[row][:, start:stop], dense[row][:, self.plain.real[row]][:, start:stop]
                    rotated = number == 1 and layer.store.rotates
                    check_groups(*(rotate(t[None])[0] if rotated else t for t in (given, stored)), side.codec, number)
                    rows[row] = torch.cat([rows[row][:, :start], stored, rows[row][:, stop:]], dim=1)

    def failed(self, length: int) -> None:
        """A step that failed may have taken slots of the window, of which the ledger then says that they hold nothing."""
        reach, before = self.cache.ledger.save().reach, self.plain.reach
        if self.plain.columns:
            assert all(old <= new <= old + length for old, new in zip(before, reach))
        if len(reach) == len(before):
            self.plain.reach = list(reach)

    def step(self, how: str, real: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.emptied_for(real.shape[0])
        states = self.new_states(*real.shape)
        if not self.fits(real):
            event("full")
            with pytest.raises(ValueError, match=f"max_length={self.max_length}"):
                self.forward(how, states, real, mask)
            self.failed(real.shape[1])
            return
        self.forward(how, states, real, mask)
        newly = self.plain.append(states, real)
        self.adopt(newly)

    # rules

    @rule(data=st.data(), length=lengths, how=forwards, masked=st.booleans())
    def tokens(self, data, length, how, masked) -> None:
        """A forward in which every token is real; a mask may say so."""
        real = torch.ones(self.batch_for(data), length, dtype=torch.bool)
        self.emptied_for(real.shape[0])
        self.step(how, real, self.mask_of(real) if masked and how in OURS else None)

    @rule(data=st.data(), count=st.integers(2, 40), how=forwards)
    def single_tokens(self, data, count, how) -> None:
        """A stretch of decoding."""
        batch = self.batch_for(data)
        for _ in range(count):
            self.step(how, torch.ones(batch, 1, dtype=torch.bool), None)

    @rule(data=st.data(), length=lengths, kind=st.sampled_from(("left", "right", "holes")), how=forwards)
    def padded_tokens(self, data, length, kind, how) -> None:
        """A forward with padding; models that are not ours give none to the cache."""
        batch = self.batch_for(data)
        self.emptied_for(batch)
        if kind == "holes":
            self.seed += 1
            real = torch.rand(batch, length, generator=torch.Generator().manual_seed(self.seed)) < 0.6
        else:
            counts = torch.tensor([data.draw(st.integers(0, length), label="real") for _ in range(batch)])
            real = torch.arange(length) < counts.unsqueeze(1)
            real = real.flip(1) if kind == "left" else real
        self.step(how if how in OURS else "rebuilt", real, self.mask_of(real))

    @rule(
        data=st.data(),
        length=lengths,
        how=forwards,
        at=st.integers(0, LAYERS),
        cause=st.sampled_from(("broken", "not finite", "layer left out")),
    )
    def failing_tokens(self, data, length, how, at, cause) -> None:
        """A forward that ends before the layer `at`, is given NaN there, or never gets there: it leaves no trace."""
        plain = self.plain
        real = torch.ones(self.batch_for(data), length, dtype=torch.bool)
        self.emptied_for(real.shape[0])
        if not self.fits(real):
            return
        states = self.new_states(*real.shape)
        if cause == "not finite":
            states[min(at, LAYERS - 1)][1][-1, 0, length // 2, 3] = torch.nan
            with pytest.raises(ValueError, match="values reach nan"):
                self.forward(how, states, real, None)
        elif cause == "broken" and how in OURS:
            with pytest.raises(Broken):
                self.forward(how, states, real, None, broken_at=at)
        elif 0 < at < LAYERS:
            with pytest.raises(ValueError, match="gave no states to the layers"):
                self.forward(how, states[:at], real, None)
                self.cache.get_mask_sizes(1, 0)  # where nothing says that a forward has ended, the next one does
        self.plain = plain
        self.failed(length)

    @precondition(lambda self: self.plain.columns)
    @rule(data=st.data(), keeps=st.booleans())
    def crop(self, data, keeps) -> None:
        removed = data.draw(st.one_of(st.integers(0, 20), st.integers(0, self.plain.columns + 3)), label="removed")
        keep = max(0, self.plain.columns - removed)
        self.cache.crop(keep if keeps and keep else -removed)
        self.plain.crop(keep)

    @precondition(lambda self: self.plain.columns)
    @rule(data=st.data())
    def reorder(self, data) -> None:
        rows = st.integers(0, self.plain.batch - 1)
        index = data.draw(st.lists(rows, min_size=self.plain.batch, max_size=self.plain.batch), label="rows")
        self.cache.reorder_cache(torch.tensor(index))
        self.plain.select(index)

    @precondition(lambda self: self.plain.columns)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data, as_mask) -> None:
        index = data.draw(st.lists(st.integers(0, self.plain.batch - 1), min_size=1, max_size=MOST_ROWS), label="rows")
        indices = torch.tensor(index)
        if as_mask:
            index = sorted(set(index))
            indices = torch.zeros(self.plain.batch, dtype=torch.bool)
            indices[index] = True
        self.cache.batch_select_indices(indices)
        self.plain.select(index)

    @precondition(lambda self: self.plain.columns and self.plain.batch * 2 <= MOST_ROWS)
    @rule()
    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.plain.select([row for row in range(self.plain.batch) for _ in range(2)])

    @rule(through=st.sampled_from((copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), through_file)))
    def go_on_with_a_copy(self, through) -> None:
        """The cache it was copied from must not change any more."""
        twin = through(self.cache)
        self.frozen = [(self.cache, self.plain.copy())]
        self.cache = twin

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        kept = self.plain.batch if self.max_length is not None else 0  # sequences too are forgotten with their memory
        self.plain = self.nothing(kept, self.plain.draft_room)

    @precondition(lambda self: not self.plain.draft_room)
    @rule()
    def make_room_for_drafts(self) -> None:
        self.cache.activate_past_recording()
        if not self.cache.ledger.geometry.at_once:
            self.plain.make_draft_room()

    @precondition(lambda self: self.plain.columns and self.plain.draft_room)
    @rule(data=st.data(), how=forwards, length=st.integers(1, DRAFT_ROOM - GROUP_SIZE))
    def a_draft_that_is_taken_back(self, data, how, length) -> None:
        """Nothing is different afterwards, however many groups it filled, unless more was taken back before."""
        at_its_end = self.plain.reach == self.plain.lengths
        before = self.plain.copy()
        real = torch.ones(self.plain.batch, length, dtype=torch.bool)
        if not self.fits(real):
            return
        self.step(how, real, None)
        self.cache.crop(-length)
        self.plain.crop(before.columns)
        if at_its_end:
            assert self.plain.packed == before.packed
            for now, then in zip(self.plain.rows(), before.rows()):
                assert all(map(torch.equal, now, then))

    # what must hold after each

    @invariant()
    def the_same(self) -> None:
        if hasattr(self, "cache"):
            self.compare(self.cache, self.plain)

    def teardown(self) -> None:
        for cache, plain in getattr(self, "frozen", []):
            self.compare(cache, plain)

    def compare(self, cache: KIVICache, plain: Plain) -> None:
        assert [cache.get_seq_length(index) for index in range(LAYERS)] == [plain.columns] * LAYERS
        assert cache.ledger.open is None
        if not plain.columns:
            return
        assert cache.batch_size == plain.batch
        assert cache.ledger.lengths == plain.lengths and cache.ledger.packed == plain.packed
        assert cache.get_mask_sizes(3, 1) == (plain.columns + 3, 0)
        for index, layer in enumerate(cache.layers):
            for number, side in enumerate(layer.store.sides):
                dense, expected = layer.dense(side), plain.dense(index, number)
                if number == 1 and layer.store.rotates:
                    assert relative_error(dense, expected) < 1e-5 or not expected.any()
                else:
                    assert torch.equal(dense, expected)


class TorchMachine(CacheMachine):
    backend = "torch"
    bits = st.tuples(st.sampled_from(ALLOWED_BITS), st.sampled_from(ALLOWED_BITS))
    variants = st.sampled_from(({}, {"k_range": "minmax"}, {"v_rotation": True}, {"v_range": "lsq"}))


class NumbaMachine(CacheMachine):
    """Few layouts, as each is compiled; every number of bits on each side."""

    backend = "numba"
    bits = st.sampled_from(((2, 2), (4, 8), (8, 16), (16, 4)))
    variants = st.just({"exact_products": True})


class StaticMachine(CacheMachine):
    """States that static INT8 holds exactly: what is stored must be what was given. The first layer is not calibrated."""

    group_size, sinks, residual = 1, 0, 0

    def make_cache(self, data: st.DataObject) -> KIVICache:
        scales = random_scales(KV_HEADS, HEAD_DIM, True), random_scales(KV_HEADS, HEAD_DIM, False)
        parameters = StaticParameters({1: scales}, model_facts(CONFIG), {}, {}, 0)
        return KIVICache(CONFIG, static=parameters, backend=self.backend, max_length=self.max_length)

    def new_states(self, batch: int, length: int) -> list[list[torch.Tensor]]:
        free, exact = super().new_states(batch, length)
        return [free, [scales.round(side) for scales, side in zip(self.cache.static.layers[1], exact)]]


class StaticTorchMachine(StaticMachine):
    backend = "torch"


class StaticNumbaMachine(StaticMachine):
    backend = "numba"


def machine_settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=25,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


TestTorch = TorchMachine.TestCase
TestTorch.settings = machine_settings(200)
TestNumba = NumbaMachine.TestCase
TestNumba.settings = machine_settings(150)
TestStaticTorch = StaticTorchMachine.TestCase
TestStaticTorch.settings = machine_settings(40)
TestStaticNumba = StaticNumbaMachine.TestCase
TestStaticNumba.settings = machine_settings(60)


# --- the same codes on every way --------------------------------------------------------------------------------------


def fill(cache: KIVICache, states: list[torch.Tensor], pieces: list[int]) -> None:
    """Keys and values `[B, KV_HEADS, T, HEAD_DIM]` into every layer, as many tokens at a time as `pieces` say."""
    for part in zip(*(side.split(pieces, dim=2) for side in states)):
        for index in range(LAYERS):
            cache.update(*part, index)


def packed_bytes(cache: KIVICache, row: int) -> list[torch.Tensor]:
    """What is packed of a sequence, in every layer and side."""
    rows = slice(row, row + 1)
    sides = [side for layer in cache.layers for side in layer.store.sides]
    stored = [part for side in sides for part in side.stored(rows, 0, cache.ledger.packed[row])]
    return [part for part in stored if part is not None] + [
        side.order[rows] for side in sides if side.order is not None
    ]


pieces = st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=12)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@settings(machine_settings(25))
@given(
    first=st.integers(60, 75), later=pieces, rejected=st.lists(st.integers(1, 12), max_size=3), seed=st.integers(0, 99)
)
def test_the_same_tokens_become_the_same_codes(backend, first, later, rejected, seed):
    """At once, piece by piece, token by token, beside a shorter sequence, and with drafts taken back before they are packed.

    The order of the channels is chosen by the first tokens, which come together here; rotating one value or many may
    round differently, so values are not rotated.
    """
    generator = torch.Generator().manual_seed(seed)
    total = first + sum(later)
    states = [torch.randn(1, KV_HEADS, total, HEAD_DIM, generator=generator) for _ in "kv"]
    options = {"group_size": GROUP_SIZE, "residual_length": 32, "v_rotation": False, "backend": backend}

    def make(states: list[torch.Tensor], pieces: list[int]) -> KIVICache:
        cache = KIVICache(CONFIG, k_bits=[2, 4], v_bits=[2, 8], **options)
        fill(cache, states, pieces)
        return cache

    expected = packed_bytes(make(states, [first, total - first]), 0)
    assert all(map(torch.equal, packed_bytes(make(states, [first, *later]), 0), expected))

    drafted = make([side[:, :, :first] for side in states], [first])
    for token in range(first, total):
        fill(drafted, [side[:, :, token : token + 1] for side in states], [1])
        room = GROUP_SIZE - 1 - (token + 1 - 4 - 32) % GROUP_SIZE  # tokens before the next group is packed
        draft = min(room, rejected[token % len(rejected)]) if rejected else 0
        if draft:
            fill(drafted, [torch.full((1, KV_HEADS, draft, HEAD_DIM), 9.0)] * 2, [draft])
            drafted.crop(-draft)
    assert all(map(torch.equal, packed_bytes(drafted, 0), expected))

    ragged = KIVICache(CONFIG, k_bits=[2, 4], v_bits=[2, 8], **options)
    mask = torch.ones(2, total, dtype=torch.bool)
    mask[0, : total // 3] = False
    start = 0
    for length in (total // 2, total - total // 2):
        new = [side[:, :, start : start + length].expand(2, -1, -1, -1) for side in states]
        with ragged.step(ragged.new_step(mask[:, : start + length], 2, length), over_codes=False):
            for index in range(LAYERS):
                ragged.update(*new, index)
        start += length
    alone = KIVICache(CONFIG, k_bits=[2, 4], v_bits=[2, 8], **options)
    fill(alone, states, [total // 2, total - total // 2])
    assert all(map(torch.equal, packed_bytes(ragged, 1), packed_bytes(alone, 0)))
