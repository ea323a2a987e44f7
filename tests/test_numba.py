"""The Numba backend with exact products against the torch one, which the other tests hold to dense attention."""

import contextlib
import copy
import random

import pytest
import torch
from conftest import make_pair, tokens
from layers import attend_and_store, empty_layer, make_layer, random_states, relative_error

from modules.codecs import grouped
from modules.kernels import registry
from modules.kernels.registry import backend, pick_backend
from modules.store.step import Step

pytest.importorskip("numba", reason="Numba is not installed: `pip install numba` to test its kernels")

from modules.kernels.numba import attention, threads  # noqa: E402

TORCH, NUMBA = backend("torch"), backend("numba")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCALES = {8: 0.7, 7: 1.3}  # of the queries, so that some rows attend to few tokens

# A plan (bits, dtype, query rows, head size, groups, wide channels) is one compilation of seconds: few plans, many shapes
# each. At 2 bits the values are in groups of 64 channels; 8 query rows are also the plan for several new tokens.
PLANS = [
    # bits, kv_heads, gqa, head_dim, group, dtype, share of wide channels
    ((2, 2), 2, 4, 128, 32, torch.float32, 1 / 4),  # 8 bytes of low bits a token
    ((2, 2), 3, 8, 64, 32, torch.float32, 3 / 8),  # 6 bytes
    ((2, 2), 3, 3, 64, 32, torch.bfloat16, 3 / 16),  # 3 bytes
    ((2, 2), 2, 4, 96, 32, torch.float32, 5 / 24),  # 5 bytes, and vectors of 8 as on CPUs without AVX-512
    ((2, 4), 1, 2, 80, 16, torch.float32, 1 / 4),  # vectors of 4
    ((4, 4), 2, 4, 128, 32, torch.float32, 1 / 4),  # wide ones of 6 bits
    ((4, 2), 3, 3, 64, 32, torch.bfloat16, 5 / 16),  # and vectors some lanes of which are wide
    ((8, 4), 1, 7, 64, 16, torch.float16, 0.0),
    ((4, 16), 2, 1, 96, 48, torch.float32, 0.0),
    ((16, 8), 1, 2, 64, 64, torch.float32, 0.0),
]
LENGTHS = [0, 1, 3, 4, 5, 35, 36, 67, 68, 69, 99, 100, 131, 132, 163, 164, 165, 196, 228, 292, 324, 511, 600]


def layer_of(plan, lengths, residual=None, sinks=4, **more):
    """A layer of random tokens for one of the `PLANS`."""
    bits, kv_heads, _, head_dim, group, dtype, share = plan
    residual = group * 2 if residual is None else residual
    options = {"group_size": group, "residual_length": residual, "sink_length": sinks, "wide_channels": share, **more}
    options = {"exact_products": True, **options}
    return make_layer(lengths, bits=bits, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, **options)


def new_states(layer, gqa, new, seed=0):
    """Query, key and value of `new` tokens, laid out as models give them."""
    batch, kv_heads, _, head_dim = layer.key.window.shape
    generator, dtype = torch.Generator().manual_seed(seed), layer.key.window.dtype
    query, key, value = (
        torch.randn(batch, new, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for heads in (kv_heads * gqa, kv_heads, kv_heads)
    )
    return query * SCALES.get(gqa, 1.0), key, value


@contextlib.contextmanager
def no_torch():
    """Within it, the kernels must do the work themselves."""

    def refuse(*args):
        raise AssertionError("the kernel handed the work to torch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend_in_torch", refuse)
        patch.setattr(attention, "attend_rebuilt", refuse)
        patch.setattr(grouped, "_fit", refuse)
        yield


def compare(layer, gqa, new, counts=None):
    """Attention by both backends over the same layer."""
    states, dtype = new_states(layer, gqa, new, seed=sum(layer.lengths)), layer.key.window.dtype
    step = Step.of_lengths(counts or [new] * layer.batch_size, new)
    scaling = layer.key.window.shape[-1] ** -0.5
    with no_torch() if new < attention._MANY_TOKENS else contextlib.nullcontext():
        out = NUMBA.attend(*states, layer, scaling, step)
    ref = TORCH.attend(*states, layer, scaling, step)
    assert out.shape == ref.shape and out.dtype == dtype
    for row, count in enumerate(step.lengths):
        assert not out[row, count:].any()
        if count:
            assert relative_error(out[row, :count], ref[row, :count]) < TOLERANCE[dtype], (layer.lengths, new, row)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_one_token_at_every_boundary(plan):
    for length in LENGTHS:
        compare(layer_of(plan, [length]), plan[2], 1)


@pytest.mark.parametrize("plan", PLANS[:2], ids=str)
def test_residual_and_sinks(plan):
    for residual, sinks in [(0, 0), (0, 5), (128, 0), (128, 150)]:
        for length in (1, 31, 32, 33, 150, 400):
            compare(layer_of(plan, [length], residual, sinks), plan[2], 1)


def test_wide_channels_by_layer():
    """No channel, half of them and all: a piece and steps through a model, and what was packed."""
    _, model = make_pair("llama", wide_channels=[0, 0.5, 1.0], metadata_bits=8)
    pieces = tokens(2, 130).split([100, *[1] * 30], dim=1)
    logits, caches = [], [model.create_kivi_cache(backend=name) for name in ("torch", "numba")]
    for cache in caches:
        with torch.no_grad():
            logits.append(torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1))
    assert [layer.backend.name for layer in caches[1].layers] == ["numba"] * 3
    assert relative_error(logits[1], logits[0]) < 1e-5
    for layers in zip(*(cache.layers for cache in caches)):
        keys = [layer.store.key.read(slice(None), 0, 64, torch.float32) for layer in layers]
        assert relative_error(keys[1], keys[0]) < 1e-3


@pytest.mark.parametrize("plan", PLANS[1:3], ids=str)
def test_ragged_batch(plan):
    rng = random.Random(1)
    for _ in range(6):
        lengths = [rng.choice(LENGTHS) for _ in range(rng.randint(2, 4))]
        compare(layer_of(plan, lengths), plan[2], 1, [rng.randint(0, 1) for _ in lengths])


@pytest.mark.parametrize("plan", PLANS[1:2], ids=str)
def test_several_new_tokens_are_causal(plan):
    rng = random.Random(2)
    for new in (2, 17, 150):
        for lengths in ([0], [1], [68], [324, 5], [600, 0, 133]):
            layer = layer_of(plan, lengths)
            compare(layer, plan[2], new)
            compare(layer, plan[2], new, [rng.randint(0, new) for _ in lengths])


def test_many_new_tokens_are_left_to_torch(monkeypatch):
    """The same layer and states, over codes and rebuilt: static codes are rows of numbers, which are rebuilt alike."""
    for layer in (layer_of(PLANS[1], [600, 5]), make_layer([600, 5], static="int8", kv_heads=3)):
        states, step = new_states(layer, 8, 40), Step.of_lengths([40, 13], 40)
        with no_torch():
            over_codes = NUMBA.attend(*states, layer, 0.125, step)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_MANY_TOKENS", 40)
            patch.setattr(attention, "_Call", None)
            rebuilt = NUMBA.attend(*states, layer, 0.125, step)
        assert relative_error(rebuilt, over_codes) < 1e-5 and not rebuilt[1, 13:].any()


def test_shares_of_the_tokens_add_up(monkeypatch):
    """What several threads would do, whatever the number of cores here."""
    for splits in (2, 3, 7, 20):
        monkeypatch.setattr(attention, "_splits", lambda *_, splits=splits: splits)
        for lengths in ([0], [300], [600, 68]):
            compare(layer_of(PLANS[0], lengths), PLANS[0][2], 1)


def test_large_scores_do_not_overflow():
    layer = layer_of(PLANS[0], [500])
    query, key, value = new_states(layer, PLANS[0][2], 1)
    out, ref = (b.attend(query * 30, key, value, layer, 1.0, Step.of(None, 1, 1)) for b in (NUMBA, TORCH))
    assert relative_error(out, ref) < 1e-3  # softmax of scores in the thousands magnifies float32's rounding


def test_nan_stays_nan():
    layer = layer_of(PLANS[0], [300])
    query, key, value = new_states(layer, PLANS[0][2], 1)
    query[0, 3, 0, 5] = torch.nan
    out = NUMBA.attend(query, key, value, layer, 0.1, Step.of(None, 1, 1))
    assert out[0, 0, 3].isnan().all() and not out[0, 0, [0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize("head_dim, group, dtype", [(40, 8, torch.float32), (64, 32, torch.float64)])
def test_layouts_without_a_kernel(head_dim, group, dtype):
    layer = make_layer([200], head_dim=head_dim, group_size=group, residual_length=2 * group, dtype=dtype)
    states, step = new_states(layer, 2, 1), Step.of(None, 1, 1)
    registry._warn_of_torch.cache_clear()
    with pytest.warns(UserWarning, match="plain torch"):
        assert pick_backend("auto", layer) is TORCH
    with pytest.raises(ValueError, match="backend='numba'"):
        pick_backend("numba", layer)
    assert torch.equal(*(b.attend(*states, layer, 0.1, step) for b in (NUMBA, TORCH)))
    assert NUMBA.decode(*states, layer, 0.1) is None


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_decode_steps_are_those_of_torch(plan):
    """Checks, rotation, attention, sinks, window and packing in one call, past flushes and the ring's end."""
    bits, _, gqa, _, group, dtype, _ = plan
    layer = layer_of(plan, [1, 3 * group + 1, 2 * group + 3], metadata_bits=16)  # with 8 a tie moves a scale by a step
    reference, before = copy.deepcopy(layer), layer.packed
    for step in range(3 * group + 20):
        states = new_states(layer, gqa, 1, seed=step)
        with no_torch():
            out = NUMBA.decode(*states, layer, 0.1)
        layer.ledger.commit(Step.of(None, 3, 1))
        ref = attend_and_store(TORCH, *states, reference, 0.1)
        bound = TOLERANCE[dtype] if layer.packed == before else max(TOLERANCE[dtype], 1e-3)  # codes at a tie may differ
        assert relative_error(out, ref) < bound, step
        assert layer.lengths == reference.lengths and layer.packed == reference.packed
    assert layer.packed[1] > layer.packed[0] > 0
    if layer.key.wide:
        assert torch.equal(layer.key.order, reference.key.order)
        assert relative_error(layer.query_energy, reference.query_energy) < 1e-6
    for ours, theirs in zip(layer.sides, reference.sides):
        for row in range(3):
            rows = slice(row, row + 1)
            read = [one.read(side, rows, torch.float32) for one, side in ((layer, ours), (reference, theirs))]
            assert read[0].shape == read[1].shape
            assert relative_error(*read) < max(TOLERANCE[dtype] / 2, 1e-3)


@pytest.mark.parametrize("plan", [PLANS[1], ((4, 4), 2, 3, 64, 32, torch.float32, 0.0)], ids=str)
def test_metadata_of_8_bits(plan):
    """Attention over it, and packing, by the kernels alone."""
    for lengths in ([600, 68], [163]):
        layer = layer_of(plan, lengths, metadata_bits=8)
        compare(layer, plan[2], 1)
        reference = copy.deepcopy(layer)
        for step in range(2 * plan[4] + 3):
            states = new_states(layer, plan[2], 1, seed=step)
            with no_torch():
                NUMBA.decode(*states, layer, 0.1)
            layer.ledger.commit(Step.of(None, len(lengths), 1))
            attend_and_store(TORCH, *states, reference, 0.1)
        assert layer.packed == reference.packed
        for ours, theirs in zip(layer.sides, reference.sides):
            assert ours.scale.dtype == torch.uint8
            last = [side.read(slice(0, 1), 0, layer.packed[0], torch.float32) for side in (ours, theirs)]
            assert relative_error(*last) < 1e-3


def test_a_decode_step_packs_the_same_bytes_as_an_append():
    """Codes, metadata and low bits of a ragged batch, without window and with wide channels."""
    for residual in (0, 64):
        layer = make_layer([70, 101, 5, 36], group_size=32, residual_length=residual, head_dim=128)
        other = copy.deepcopy(layer)
        for step in range(40):
            query, key, value = new_states(layer, 2, 1, seed=step)
            NUMBA.decode(query, key, value, layer, 0.1)
            attend_and_store(NUMBA, query, key, value, other, 0.1)
            layer.ledger.commit(Step.of(None, 4, 1))
        assert layer.packed == other.packed and min(layer.packed) >= 32 - residual
        for ours, theirs in zip(layer.sides, other.sides):
            for row, packed in enumerate(layer.packed):
                pairs = zip(*(side.stored(slice(row, row + 1), 0, packed) for side in (ours, theirs)))
                assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_what_a_decode_step_writes_lies_behind_the_ledger():
    """Without a commit the layer reads as before, though the step packed."""
    layer = make_layer([163], group_size=32, residual_length=64)  # one more fills a group
    assert layer.ledger.packs(0, 1)
    before = [layer.read(side, slice(None), torch.float32) for side in layer.sides]
    assert NUMBA.decode(*new_states(layer, 2, 1), layer, 0.1) is not None
    after = [layer.read(side, slice(None), torch.float32) for side in layer.sides]
    assert all(torch.equal(*pair) for pair in zip(before, after))


@pytest.mark.parametrize("side, value", [(0, torch.nan), (1, torch.inf), (1, 1e6)])
def test_decode_refuses_what_cannot_be_stored(side, value):
    layer = make_layer([20, 163, 1], group_size=32, residual_length=64)
    states = new_states(layer, 2, 1)
    states[1 + side][1, 1, 0, 5] = value
    before = {name: t.clone() for name, t in layer.tensors().items()}
    with pytest.raises(ValueError, match=("keys", "values")[side] + " reach"):
        NUMBA.decode(*states, layer, 0.1)
    assert layer.lengths == [20, 163, 1]
    assert all(torch.equal(before[name], t) for name, t in layer.tensors().items())


MISFITS = {  # what is wrong: how it is made from query, key and value
    "KV heads .* 4, and the cache has 2": lambda q, k, v: (q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
    "KV heads .* 1, and the cache has 2": lambda q, k, v: (q, k[:, :1], v[:, :1]),
    "value does not fit the cache: KV heads": lambda q, k, v: (q, k, v[:, :1]),
    "head_dim. 128, and the cache has 64": lambda q, k, v: (torch.cat([t, t], 3) for t in (q, k, v)),
    "head_dim. 32, and the cache has 64": lambda q, k, v: (t[..., :32] for t in (q, k, v)),
    "key does not fit the cache: sequences 1": lambda q, k, v: (q, k[:1], v[:1]),
    "sequences 4, and the cache has 2": lambda q, k, v: (t.repeat(2, 1, 1, 1) for t in (q, k, v)),
    "query has 3 heads": lambda q, k, v: (q[:, :3], k, v),
    "dtype torch.bfloat16, and the cache has torch.float32": lambda q, k, v: (t.bfloat16() for t in (q, k, v)),
    "device meta, and the cache has cpu": lambda q, k, v: (t.to("meta") for t in (q, k, v)),
    "tokens 2, and the cache has 1": lambda q, k, v: (q, torch.cat([k, k], 2), torch.cat([v, v], 2)),
    "value must be .batch, heads, tokens, head_dim": lambda q, k, v: (q, k, v[0]),
}


def assert_refused(match, states, layer):
    """Both calls raise, and nothing is stored."""
    before = {name: t.clone() for name, t in layer.tensors().items()}
    with pytest.raises(ValueError, match=match):
        NUMBA.decode(*states, layer, 0.1)
    with pytest.raises(ValueError, match=match):
        NUMBA.attend(*states, layer, 0.1, Step.of(None, 2, 1))
    assert all(torch.equal(before[name], t) for name, t in layer.tensors().items())


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("misfit", MISFITS)
def test_states_that_do_not_fit_the_layer_are_refused(misfit, warm):
    """Before an address reaches a kernel, also where a step that fits was prepared."""
    layer = make_layer([200, 163])
    good = new_states(layer, 2, 1)
    if warm:
        NUMBA.decode(*good, layer, 0.1)
    assert_refused(misfit, tuple(MISFITS[misfit](*good)), layer)


def test_a_step_of_other_sequences_is_refused():
    layer = make_layer([200, 163])
    states = new_states(layer, 2, 1)
    for step in (Step(1, counted=[1]), Step(1, counted=[1, 2]), Step(2, counted=[1, 1])):
        with pytest.raises(ValueError, match="sequences|between 0 and 1|tokens 1"):
            NUMBA.attend(*states, layer, 0.1, step)
    layer.ledger.clear([200])
    assert_refused("its ledger counts 1", states, layer)


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda layer: setattr(layer.key, "scale", layer.key.scale[:, :, :1]), "scale of the keys must be"),
        (lambda layer: setattr(layer.value, "codes", layer.value.codes.transpose(2, 3)), "codes of the values must be"),
        (lambda layer: setattr(layer.key, "order", layer.key.order.int()), "order of the keys must be"),
        (lambda layer: layer.ledger._set([900, 900], [736, 736]), "736 packed tokens in a capacity of"),
    ],
)
def test_a_layer_that_is_not_what_its_ledger_says_is_refused(spoil, match):
    layer = make_layer([300, 300])
    spoil(layer)
    assert_refused(match, new_states(layer, 2, 1), layer)


def test_groups_that_have_no_place_are_refused():
    layer = make_layer([300], group_size=32, residual_length=64)
    good = random_states((1, 2, 32, 64))[0]
    one, capacity = slice(0, 1), layer.key.capacity
    for rows, start, states, match in (
        (one, capacity, good, "no place in a capacity"),
        (one, 16, good, "whole groups of 32"),
        (one, 0, good[:, :, :30], "whole groups of 32"),
        (one, 0, good[:, :1], "KV heads .* 1, and the cache has 2"),
        (one, 0, good[..., :32], "head_dim. 32, and the cache has 64"),
        (one, 0, good.half(), "dtype torch.float16"),
        (one, 0, good.repeat(2, 1, 1, 1), "sequences 2"),
    ):
        with pytest.raises(ValueError, match=match):
            NUMBA.pack(layer.key, rows, start, states)


def stored_by(name, side, states, order=None):
    """Packed groups `[B, H, T, D]` as a backend stores them in an empty side like `side`."""
    side = copy.deepcopy(side)
    side.grow(states.shape[2])
    if order is not None:
        side.order.copy_(order)
    backend(name).pack(side, slice(None), 0, states)
    return side


@pytest.mark.parametrize(
    "what, method, bits, dtype, head_dim, group, share",
    [
        ("keys", "lsq", 2, torch.float32, 128, 32, 0.0),
        ("keys", "lsq", 2, torch.float32, 128, 32, 1.0),
        ("keys", "lsq", 2, torch.float16, 64, 32, 0.25),
        ("keys", "lsq", 2, torch.bfloat16, 64, 16, 3 / 16),
        ("keys", "lsq", 2, torch.float32, 80, 16, 0.25),
        ("keys", "lsq", 4, torch.float32, 128, 32, 0.25),
        ("keys", "lsq", 4, torch.float16, 80, 16, 0.25),
        ("keys", "lsq", 8, torch.bfloat16, 64, 16, 0.0),
        ("keys", "minmax", 4, torch.float32, 32, 32, 0.0),
        ("values", "minmax", 2, torch.float32, 128, 64, 0.0),
        ("values", "clipped", 8, torch.float16, 96, 32, 0.0),
        ("values", "lsq", 4, torch.bfloat16, 64, 64, 0.0),
    ],
)
def test_packing_is_that_of_torch(what, method, bits, dtype, head_dim, group, share):
    ranges = {"k_range": method, "v_range": None} if what == "keys" else {"v_range": method}
    options = {"group_size": group, "v_group_size": group, "wide_channels": share, "residual_length": 0, **ranges}
    layer = empty_layer(2, bits=(bits, bits), kv_heads=3, head_dim=head_dim, dtype=dtype, **options)
    side = layer.key if what == "keys" else layer.value
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, group * 5, 3, head_dim, generator=generator).transpose(1, 2) * torch.rand(
        head_dim, generator=generator
    )
    x = (x + 4 * torch.randn(head_dim, generator=generator)).to(dtype)
    x[0, 0, :group] = 1.25  # a group without a range
    x[1, 2] *= 1e-6  # a range float16 rounds to zero or nearly
    order = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(6)]).view(2, 3, -1)
    with no_torch():
        ours = stored_by("numba", side, x, order if side.wide else None)
    theirs = stored_by("torch", side, x, order if side.wide else None)
    codes = [grouped.unpack_codes(one.codes, bits) for one in (ours, theirs)]
    assert (codes[0] != codes[1]).float().mean() < 1e-2
    if side.wide:
        assert (ours.extra != theirs.extra).float().mean() < 4e-2
    for a, b in ((ours.scale, theirs.scale), (ours.minimum, theirs.minimum)):
        if a.dtype == torch.uint8:  # its steps are large: few may differ
            assert (a != b).float().mean() < 1e-2
        else:
            assert relative_error(a, b) < (5e-3 if ours.scale.dtype == torch.uint8 else 1e-3)
    stop = x.shape[2]
    errors = [
        (one.read(slice(None), 0, stop, torch.float32) - x.float()).double().norm().item() for one in (ours, theirs)
    ]
    # from a tie that rounds otherwise the rounds reach another optimum, the farther away the coarser minima are
    slack = (1e-4 if ours.minimum.dtype == torch.int8 else 1e-5) if method == "lsq" else 1e-6
    assert errors[0] <= errors[1] * (1 + slack)


def test_packing_of_some_sequences_leaves_the_others():
    layer = make_layer([300, 300, 300], group_size=32, residual_length=64, head_dim=128)
    before = layer.key.codes.clone()
    NUMBA.pack(layer.key, slice(1, 2), 64, random_states((1, 2, 32, 128))[0])
    changed = (before != layer.key.codes).flatten(2).view(3, 2, before.shape[2], -1).any(-1)
    assert changed[1, :, 64:96].all() and not changed[[0, 2]].any()
    assert not changed[1, :, :64].any() and not changed[1, :, 96:].any()


def test_packing_refuses_what_torch_refuses():
    layer = empty_layer(1, head_dim=128, residual_length=0)
    for side in layer.sides:
        side.grow(64)
        for bad in (torch.nan, torch.inf, -7e4):
            x = random_states((1, 2, 64, 128))[1]
            x[0, 1, 40, 3] = bad
            with pytest.raises(ValueError, match=f"{side.what} .* finite and at most 65504"):
                NUMBA.pack(side, slice(None), 0, x)


def test_a_layer_packs_with_its_backend():
    layers = [make_layer([500], head_dim=128, backend=name) for name in ("numba", "torch")]
    assert torch.equal(*(layer.key.order for layer in layers))
    for side in ("key", "value"):
        ours, theirs = (layer.read(getattr(layer, side), slice(None), torch.float32) for layer in layers)
        assert relative_error(ours, theirs) < 1e-3


def test_large_buffers_are_not_kept():
    small, large = threads.buffer("test", 1000), threads.buffer("test", threads._KEPT_FLOATS + 1)
    assert large.floats > threads._KEPT_FLOATS and threads.buffer("test", 1000) is small
    assert small.address % 64 == 0 == large.address % 64


def test_backend_is_picked_by_device():
    layer = make_layer([10])
    assert pick_backend("auto", layer) is pick_backend("numba", layer) is NUMBA
    assert pick_backend("torch", layer) is TORCH
    layer.to("meta")
    assert pick_backend("auto", layer) is TORCH
    with pytest.raises(ValueError, match="it runs on 'cpu' and the cache is on 'meta'"):
        pick_backend("numba", layer)
