"""The Numba backend against the torch one, which the other tests hold to dense attention."""

import contextlib
import copy
import random
import warnings

import pytest
import torch
from conftest import relative_error
from modules.packed_attention import _attend_torch, packed_attention, pick_backend
from modules.packed_state import PackedLayer

from modules import packed_attention as dispatch
from modules import quantization
from modules.options import KIVIOptions

pytest.importorskip("numba", reason="Numba is not installed: `pip install numba` to test its kernels")

from modules.kernels import numba_attention, numba_quantize  # noqa: E402

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
    ((8, 4), 1, 7, 64, 16, torch.float16, 0.0),
    ((4, 16), 2, 1, 96, 48, torch.float32, 0.0),
    ((16, 8), 1, 2, 64, 64, torch.float32, 0.0),
]
LENGTHS = [0, 1, 3, 4, 5, 35, 36, 67, 68, 69, 99, 100, 131, 132, 163, 164, 165, 196, 228, 292, 324, 511, 600]


def make_layer(lengths, bits, kv_heads, head_dim, group, dtype, share=0.25, residual=None, sinks=4, backend="torch"):
    """A layer of random tokens with an offset in some channels, and the generator that made them."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
    residual = group * 2 if residual is None else residual
    options = KIVIOptions(group_size=group, residual_length=residual, sink_length=sinks, wide_channels=share)
    shape = (len(lengths), kv_heads, max([1, *lengths]), head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in "kv")
    keys += 2 * torch.randn(1, kv_heads, 1, head_dim, generator=generator)
    layer = PackedLayer.empty(keys.to(dtype), bits, options)
    layer.backend = backend
    earlier = [length * 2 // 3 for length in lengths]
    layer.append(keys.to(dtype), values.to(dtype), earlier)
    for row, (start, stop) in enumerate(zip(earlier, lengths)):  # the ring wraps
        for token in range(start, stop):
            counts = [int(r == row) for r in range(len(lengths))]
            layer.append(*(t[:, :, token : token + 1].to(dtype) for t in (keys, values)), counts)
            if token - start > 40 and stop - token > 40:
                break
    rest = [length - now for length, now in zip(lengths, layer.lengths)]
    if any(rest):
        layer.append(keys.to(dtype), values.to(dtype), rest)
    assert layer.lengths == list(lengths)
    return layer, generator


def new_states(layer, gqa, new, dtype, generator):
    batch, kv_heads, _, head_dim = layer.key.window.shape
    query = torch.randn(batch, new, kv_heads * gqa, head_dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, new, kv_heads, head_dim, generator=generator).to(dtype).transpose(1, 2) for _ in "kv"
    )
    return query * SCALES.get(gqa, 1.0), key, value


@contextlib.contextmanager
def no_torch():
    """Within it, the kernels must do the work themselves."""

    def refuse(*args):
        raise AssertionError("the kernel handed the work to torch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_attend_torch", refuse)
        patch.setattr(numba_quantize, "_torch_keys", refuse)
        patch.setattr(numba_quantize, "_torch_values", refuse)
        yield


def compare(layer, gqa, new, dtype, generator, counts=None):
    states = new_states(layer, gqa, new, dtype, generator)
    counts = counts or [new] * layer.batch_size
    scaling = layer.key.window.shape[-1] ** -0.5
    with no_torch() if gqa * new <= numba_attention._MANY_ROWS else contextlib.nullcontext():
        out = numba_attention.attend(*states, layer, scaling, counts)
    ref = _attend_torch(*states, layer, scaling, counts)
    assert out.shape == ref.shape and out.dtype == dtype
    for row, count in enumerate(counts):
        assert not out[row, count:].any()
        if count:
            assert relative_error(out[row, :count], ref[row, :count]) < TOLERANCE[dtype], (layer.lengths, new, row)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_one_token_at_every_boundary(plan):
    bits, kv_heads, gqa, head_dim, group, dtype, share = plan
    for length in LENGTHS:
        layer, generator = make_layer([length], bits, kv_heads, head_dim, group, dtype, share)
        compare(layer, gqa, 1, dtype, generator)


@pytest.mark.parametrize("plan", PLANS[:2], ids=str)
def test_residual_and_sinks(plan):
    bits, kv_heads, gqa, head_dim, group, dtype, share = plan
    for residual, sinks in [(0, 0), (0, 5), (128, 0), (128, 150)]:
        for length in (1, 31, 32, 33, 150, 400):
            layer, generator = make_layer([length], bits, kv_heads, head_dim, group, dtype, share, residual, sinks)
            compare(layer, gqa, 1, dtype, generator)


@pytest.mark.parametrize("plan", PLANS[1:3], ids=str)
def test_ragged_batch(plan):
    bits, kv_heads, gqa, head_dim, group, dtype, share = plan
    rng = random.Random(1)
    for _ in range(6):
        lengths = [rng.choice(LENGTHS) for _ in range(rng.randint(2, 4))]
        layer, generator = make_layer(lengths, bits, kv_heads, head_dim, group, dtype, share)
        compare(layer, gqa, 1, dtype, generator, [rng.randint(0, 1) for _ in lengths])


@pytest.mark.parametrize("plan", PLANS[1:2], ids=str)
def test_several_new_tokens_are_causal(plan):
    bits, kv_heads, gqa, head_dim, group, dtype, share = plan
    rng = random.Random(2)
    for new in (2, 17, 150):
        for lengths in ([0], [1], [68], [324, 5], [600, 0, 133]):
            layer, generator = make_layer(lengths, bits, kv_heads, head_dim, group, dtype, share)
            compare(layer, gqa, new, dtype, generator)
            compare(layer, gqa, new, dtype, generator, [rng.randint(0, new) for _ in lengths])


def test_shares_of_the_tokens_add_up(monkeypatch):
    """What several threads would do, whatever the number of cores here."""
    bits, kv_heads, gqa, head_dim, group, dtype, share = PLANS[0]
    for splits in (2, 3, 7, 20):
        monkeypatch.setattr(numba_attention, "_splits", lambda *_, splits=splits: splits)
        for lengths in ([0], [300], [600, 68]):
            layer, generator = make_layer(lengths, bits, kv_heads, head_dim, group, dtype, share)
            compare(layer, gqa, 1, dtype, generator)


def test_threads():
    from numba import config

    before = torch.get_num_threads()
    if config.NUMBA_NUM_THREADS < 2 or before < 2:
        pytest.skip("Numba and torch have one thread here; run without NUMBA_NUM_THREADS=1 and OMP_NUM_THREADS=1")
    bits, kv_heads, gqa, head_dim, group, dtype, share = PLANS[0]
    layer, generator = make_layer([6000], bits, kv_heads, head_dim, group, dtype, share)
    compare(layer, gqa, 1, dtype, generator)


def test_large_scores_do_not_overflow():
    bits, kv_heads, gqa, head_dim, group, dtype, share = PLANS[0]
    layer, generator = make_layer([500], bits, kv_heads, head_dim, group, dtype, share)
    query, key, value = new_states(layer, gqa, 1, dtype, generator)
    out, ref = (
        packed_attention(query * 30, key, value, _with(layer, name), 1.0).double() for name in ("numba", "torch")
    )
    assert relative_error(out, ref) < 1e-3  # softmax of scores in the thousands magnifies float32's rounding


def test_nan_stays_nan():
    bits, kv_heads, gqa, head_dim, group, dtype, share = PLANS[0]
    layer, generator = make_layer([300], bits, kv_heads, head_dim, group, dtype, share)
    query, key, value = new_states(layer, gqa, 1, dtype, generator)
    query[0, 3, 0, 5] = torch.nan
    out = packed_attention(query, key, value, _with(layer, "numba"), 0.1)
    assert out[0, 0, 3].isnan().all() and not out[0, 0, [0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize("head_dim, group, dtype", [(40, 8, torch.float32), (64, 32, torch.float64)])
def test_layouts_without_a_kernel(head_dim, group, dtype):
    layer, generator = make_layer([200], (2, 2), 2, head_dim, group, dtype)
    states = new_states(layer, 2, 1, dtype, generator)
    with pytest.warns(UserWarning, match="plain torch"):
        assert pick_backend("auto", layer) == "torch"
    with pytest.raises(ValueError, match="backend='numba'"):
        pick_backend("numba", layer)
    out, ref = (packed_attention(*states, _with(layer, name), 0.1) for name in ("numba", "torch"))
    assert torch.equal(out, ref)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_decode_steps_are_those_of_torch(plan):
    """Checks, rotation, attention and the window in one call, past sinks, flushes and the ring's end."""
    bits, kv_heads, gqa, head_dim, group, dtype, share = plan
    layer, generator = make_layer([1, 3 * group + 1], bits, kv_heads, head_dim, group, dtype, share)
    fused = 0
    for _ in range(2 * group + 20):
        states = new_states(layer, gqa, 1, dtype, generator)
        due = all(length >= 4 for length in layer.lengths) and not any(layer.packs_at(row, 1) for row in (0, 1))
        other = copy.deepcopy(layer)
        with no_torch() if due else contextlib.nullcontext():
            out = dispatch.decode(*states, _with(layer, "numba"), 0.1)
        assert (out is not None) == due
        if due:
            layer.observe(states[0], [1, 1])
        else:
            out = dispatch.attend_and_store(*states, layer, 0.1, [1, 1])
        ref = dispatch.attend_and_store(*states, _with(other, "torch"), 0.1, [1, 1])
        assert relative_error(out, ref) < TOLERANCE[dtype]
        assert layer.lengths == other.lengths and layer.packed == other.packed
        if due:
            fused += 1
            for ours, theirs in zip(layer.sides, other.sides):
                assert relative_error(ours.window, theirs.window) < TOLERANCE[dtype] / 2
    assert fused > group


@pytest.mark.parametrize("side, value", [(0, torch.nan), (1, torch.inf), (1, 1e6)])
def test_decode_refuses_what_cannot_be_stored(side, value):
    layer, generator = make_layer([200], (2, 2), 2, 64, 32, torch.float32)
    layer.backend = "numba"
    states = new_states(layer, 2, 1, torch.float32, generator)
    states[1 + side][0, 1, 0, 5] = value
    before = [t.clone() for t in layer.tensors().values()]
    with pytest.raises(ValueError, match=("keys", "values")[side] + " reach"):
        dispatch.decode(*states, layer, 0.1)
    assert layer.lengths == [200]
    assert all(torch.equal(old, new) for old, new in zip(before, layer.tensors().values()))


def _with(layer, backend):
    layer.backend = backend
    return layer


@pytest.mark.parametrize(
    "what, method, bits, dtype, head_dim, group",
    [
        ("keys", "lsq", 2, torch.float32, 128, 32),
        ("keys", "lsq", 8, torch.bfloat16, 64, 16),
        ("keys", "lsq", 4, torch.float32, 32, 32),
        ("values", "minmax", 2, torch.float32, 128, 64),
        ("values", "clipped", 8, torch.float16, 96, 32),
        ("values", "lsq", 4, torch.bfloat16, 64, 64),
    ],
)
def test_packing_is_that_of_torch(what, method, bits, dtype, head_dim, group):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 3, group * 5, head_dim, generator=generator) * torch.rand(head_dim, generator=generator)
    x = (x + 4 * torch.randn(head_dim, generator=generator)).to(dtype)
    x[0, 0, :group] = 1.25  # a group without a range
    x[1, 2] *= 1e-6  # a range float16 rounds to zero or nearly
    with no_torch():
        ours = getattr(numba_quantize, f"quantize_{what}")(x, bits, group, method)
    theirs = getattr(quantization, f"quantize_{what}")(x, bits, group, method)
    dequantize = getattr(quantization, f"dequantize_{what}")
    codes = [quantization.unpack_codes(q.codes, bits) for q in (ours, theirs)]
    assert (codes[0] != codes[1]).float().mean() < 1e-2
    for a, b in ((ours.scale, theirs.scale), (ours.minimum, theirs.minimum)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(a, b) < 1e-3
    errors = [(dequantize(q, bits, group) - x.float()).double().norm().item() for q in (ours, theirs)]
    slack = 1e-5 if method == "lsq" else 1e-6  # from a tie that rounds otherwise, the rounds reach another optimum
    assert errors[0] <= errors[1] * (1 + slack)


@pytest.mark.parametrize("count", [4, 12, 24, 32, 64])
def test_widening_is_that_of_torch(count):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(count))
    fine = quantization.quantize_keys(x[..., :count], 4, 32)
    theirs = quantization.widen(quantization.quantize_keys(x, 2, 32), fine)
    for a, b in zip(numba_quantize.widen(quantization.quantize_keys(x, 2, 32), fine), theirs):
        assert torch.equal(a, b)


def test_packing_refuses_what_torch_refuses():
    x = torch.randn(1, 2, 64, 128)
    for bad in (torch.nan, torch.inf, -7e4):
        x[0, 1, 40, 3] = bad
        for quantize, group in ((numba_quantize.quantize_keys, 32), (numba_quantize.quantize_values, 64)):
            with pytest.raises(ValueError, match="finite and at most 65504"):
                quantize(x, 2, group)
    with pytest.raises(ValueError, match="not a multiple of group_size=48"):
        numba_quantize.quantize_keys(x, 2, 48)


def test_packing_takes_views_and_empty_tensors():
    x = torch.randn(2, 128, 3, 128, generator=torch.Generator().manual_seed(0)).transpose(1, 2)[:, :, 32:96]
    for ours, theirs in zip(numba_quantize.quantize_keys(x, 2, 32)[:3], quantization.quantize_keys(x, 2, 32)[:3]):
        assert (ours != theirs).float().mean() < 1e-2
    assert numba_quantize.quantize_keys(x[:, :, :0], 2, 32).codes.shape == (2, 3, 0, 32)


def test_a_layer_packs_with_its_backend():
    layers = [make_layer([500], (2, 2), 2, 128, 32, torch.float32, backend=name)[0] for name in ("numba", "torch")]
    assert torch.equal(*(layer.key.order for layer in layers))
    for side in ("key", "value"):
        ours, theirs = (layer.read(getattr(layer, side), slice(None), torch.float32) for layer in layers)
        assert relative_error(ours, theirs) < 1e-3


def test_few_wide_channels_are_packed_by_torch():
    x = torch.randn(1, 2, 64, 12, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(numba_quantize.quantize_keys(x, 4, 32)[:3], quantization.quantize_keys(x, 4, 32)[:3]):
        assert torch.equal(ours, theirs)


def test_backend_is_picked_by_device(monkeypatch):
    layer, _ = make_layer([10], (2, 2), 2, 64, 32, torch.float32)
    assert pick_backend("auto", layer) == pick_backend("numba", layer) == "numba"
    assert pick_backend("torch", layer) == "torch"
    layer.to("meta")
    assert pick_backend("auto", layer) == "torch"
    with pytest.raises(ValueError, match="runs on the CPU, not on 'meta'"):
        pick_backend("numba", layer)


def test_without_numba_torch_attends_and_says_so_once(monkeypatch):
    layer, _ = make_layer([10], (2, 2), 2, 64, 32, torch.float32)
    monkeypatch.setattr(dispatch, "_numba_problem", lambda _: "Numba cannot be imported (test)")
    dispatch._torch_instead.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Numba cannot be imported"):
            assert pick_backend("auto", layer) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pick_backend("auto", layer) == "torch"
        with pytest.raises(ValueError, match="Numba cannot be imported"):
            pick_backend("numba", layer)
    finally:
        dispatch._torch_instead.cache_clear()
