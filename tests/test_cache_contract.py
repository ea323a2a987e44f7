"""transformers' `Cache` contract, on both sides of the supported range, with states given by hand."""

import copy

import pytest
import torch
from conftest import FAMILIES, SIZES, SMALL, relative_error
from transformers import DynamicCache

from modules.kivi_cache_general import KIVICache, print_kivi_stats
from modules.options import KIVIOptions

CONFIG = FAMILIES["llama"][0](**SIZES, head_dim=32)
LAYERS = SIZES["num_hidden_layers"]
HEADS, HEAD_DIM = 2, 32


def make(**options) -> KIVICache:
    return KIVICache(CONFIG, **{**SMALL, **options})


def states(batch, length, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, length, HEAD_DIM, generator=generator).to(dtype) for _ in "kv"]


def feed(cache, batch, length, seed=0, dtype=torch.float32):
    """Put random states into every layer; returns what the last `update` gave and what went in."""
    new = states(batch, length, seed, dtype)
    for index in range(LAYERS):
        out = cache.update(*new, index)
    return out, new


def test_update_returns_everything_in_order():
    for bits, bound in ((16, 1e-7), (8, 0.01), (4, 0.1), (2, 0.6)):
        cache, kept = make(k_bits=bits, v_bits=bits), []
        for seed, length in enumerate((50, 1, 1, 40, 3)):
            out, new = feed(cache, 2, length, seed)
            kept.append(new)
        for side in range(2):
            expected = torch.cat([new[side] for new in kept], dim=2)
            assert out[side].shape == expected.shape
            assert relative_error(out[side], expected) <= bound
            # sinks and the newest tokens are in full precision
            assert relative_error(out[side][:, :, :4], expected[:, :, :4]) < 1e-6
            assert relative_error(out[side][:, :, -32:], expected[:, :, -32:]) < 1e-6


def test_lengths_and_masks():
    cache = make()
    assert cache.get_seq_length() == 0 and cache.get_max_length() == -1 and not cache.is_initialized
    assert len(cache) == LAYERS and cache.get_mask_sizes(7, 0) == (7, 0)
    feed(cache, 2, 70)
    feed(cache, 2, 1)
    assert cache.get_seq_length() == 71 == cache.get_seq_length(1)
    assert cache.get_mask_sizes(3, 0) == (74, 0) and cache.get_query_offset() == 71
    assert cache.is_initialized and cache.batch_size == 2 and cache.is_croppable
    assert cache.is_sliding == [False] * LAYERS and not cache.is_compileable
    assert "KIVICache" in repr(cache) and "71" in repr(cache)
    with pytest.raises(AttributeError):
        _ = make().layers[0].batch_size


def test_nothing_is_quantized_twice_and_one_flush_every_group():
    cache = make()
    feed(cache, 1, 60)
    side = cache.layers[0].store.key
    frozen = side.codes[:, :, : cache.ledger.packed[0]].clone()
    flushed = []
    for step in range(64):
        feed(cache, 1, 1, step + 1)
        flushed.append(cache.ledger.packed[0])
    assert torch.equal(side.codes[:, :, : frozen.shape[2]], frozen)
    assert sorted(set(flushed)) == list(range(flushed[0], flushed[-1] + 1, 16))
    window = 124 - 4 - flushed[-1]
    assert 32 <= window < 32 + 16


@pytest.mark.parametrize("convention", ["remove", "keep", "tensor"])
@pytest.mark.parametrize(
    "length,keep", [(100, 99), (100, 80), (100, 61), (100, 40), (100, 21), (100, 20), (100, 3), (100, 1)]
)
def test_crop(convention, length, keep):
    cache = make(k_bits=8, v_bits=8)
    _, first = feed(cache, 2, length)
    argument = {"remove": keep - length, "keep": keep, "tensor": torch.tensor(keep - length)}[convention]
    cache.crop(argument)
    assert cache.get_seq_length() == keep
    out, new = feed(cache, 2, 45, seed=1)
    for side in range(2):
        expected = torch.cat([first[side][:, :, :keep], new[side]], dim=2)
        assert out[side].shape == expected.shape and relative_error(out[side], expected) < 0.02
    out, _ = feed(cache, 2, 1, seed=2)
    assert (
        relative_error(out[0][:, :, : keep + 45], expected_keys := torch.cat([first[0][:, :, :keep], new[0]], 2)) < 0.02
    )
    assert expected_keys.shape[2] == keep + 45


def test_crop_of_nothing_and_of_everything():
    cache = make()
    cache.crop(-3)
    feed(cache, 1, 50)
    cache.crop(0)
    cache.crop(70)
    assert cache.get_seq_length() == 50
    cache.crop(-50)
    assert cache.get_seq_length() == 0
    out, new = feed(cache, 1, 5)
    assert torch.equal(out[0], new[0])


@pytest.mark.parametrize("max_length", [None, 200])
def test_reset(max_length):
    cache = make() if max_length is None else KIVICache(CONFIG, max_length=max_length, **SMALL)
    feed(cache, 2, 90)
    cache.reset()
    assert cache.get_seq_length() == 0
    out, new = feed(cache, 2, 90, seed=4)
    fresh = make()
    feed(fresh, 2, 90, seed=4)
    later, _ = feed(cache, 2, 1, seed=5)
    expected, _ = feed(fresh, 2, 1, seed=5)
    assert torch.equal(out[0], new[0])
    assert all(torch.equal(a, b) for a, b in zip(later, expected))


def test_batch_operations_give_each_sequence_its_own_past():
    cache = make()
    feed(cache, 3, 90)
    before = cache.layers[1].dense(cache.layers[1].store.key)

    def now(c):
        return c.layers[1].dense(c.layers[1].store.key)

    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(now(chosen), before[[2, 0]]) and chosen.batch_size == 2
    masked = copy.deepcopy(cache)
    masked.batch_select_indices(torch.tensor([True, False, True]))
    assert torch.equal(now(masked), before[[0, 2]])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    assert torch.equal(now(repeated), before[[0, 0, 1, 1, 2, 2]])
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(now(cache), before[[1, 1, 0]])
    feed(cache, 3, 20, seed=3)  # rows that came from one no longer share memory
    dense = now(cache)
    assert not torch.equal(dense[0, :, -20:], dense[1, :, -20:])


def test_batch_operations_on_an_empty_cache():
    cache = make()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert cache.get_seq_length() == 0


def test_deepcopy_is_independent():
    cache = make()
    feed(cache, 1, 80)
    copied = copy.deepcopy(cache)
    feed(copied, 1, 60, seed=9)
    assert cache.get_seq_length() == 80 and copied.get_seq_length() == 140
    again, _ = feed(cache, 1, 1, seed=2)
    fresh = make()
    feed(fresh, 1, 80)
    expected, _ = feed(fresh, 1, 1, seed=2)
    assert torch.equal(again[0], expected[0])


def test_offload_and_prefetch_keep_the_contents():
    cache = make()
    feed(cache, 1, 80)
    before = {name: t.clone() for name, t in cache.layers[0].store.tensors().items()}
    cache.offload(0)
    cache.layers[0].prefetch()
    assert all(torch.equal(t, before[name]) for name, t in cache.layers[0].store.tensors().items())
    out, _ = feed(cache, 1, 1, seed=1)
    expected = make()
    feed(expected, 1, 80)
    assert torch.equal(out[0], feed(expected, 1, 1, seed=1)[0][0])


def test_max_length_allocates_once_and_is_kept_to():
    cache = KIVICache(CONFIG, max_length=120, **SMALL)
    feed(cache, 1, 100)
    pointers = [t.data_ptr() for t in cache.layers[0].store.tensors().values()]
    for step in range(20):
        feed(cache, 1, 1, step)
    assert pointers == [t.data_ptr() for t in cache.layers[0].store.tensors().values()]
    assert cache.get_max_length() == 120
    with pytest.raises(ValueError, match="max_length=120"):
        feed(cache, 1, 1)
    assert cache.get_seq_length() == 120


def test_growth_keeps_slack_small():
    cache = make()
    feed(cache, 1, 2000)
    for step in range(70):
        feed(cache, 1, 1, step)
        state = cache.layers[0].store
        assert state.key.capacity - state.packed[0] <= max(16, 0.06 * state.packed[0])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"k_bits": 3}, "k_bits must be one of 2, 4, 8, 16; got 3"),
        ({"v_bits": "two"}, "v_bits must be one of"),
        ({"k_bits": True}, "k_bits must be one of"),
        ({"k_bits": [2, 4]}, "2 entries for 3 layers"),
        ({"k_bits": [2, 4, 5]}, "got 5"),
        ({"group_size": 0}, "group_size must be a whole number"),
        ({"group_size": 24, "residual_length": 48}, "group_size must divide head_dim"),
        ({"group_size": 32, "residual_length": 40}, "group_size must divide residual_length"),
        ({"residual_length": -16}, "residual_length must be"),
        ({"sink_length": -1}, "sink_length must be"),
        ({"sink_length": 1.5}, "sink_length must be"),
        ({"k_range": "max"}, "k_range must be one of lsq, minmax"),
        ({"use_kivi": "yes"}, "use_kivi must be"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"kbits": 2}, "no option 'kbits'; did you mean 'k_bits'"),
        ({"max_length": 0}, "max_length must be"),
        (
            {"wide_channels": [0.5, 1.5, 0]},
            "wide_channels must be a share between 0 and 1, a list of them, or None; got 1.5",
        ),
        ({"wide_channels": [0.5, None, 0]}, "wide_channels must be a share .* got None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bits_by_layer():
    cache = make(k_bits=[2, 4, 16], v_bits=[2, 2, 8])
    feed(cache, 1, 100)
    assert [layer.bits for layer in cache.layers] == [(2, 2), (4, 2), (16, 8)]
    assert cache.layers[2].store.key.codes.dtype == torch.float32
    cache = make(use_kivi=False)
    out, new = feed(cache, 1, 100)
    assert cache.layers[0].bits == (16, 16)


def test_wide_channels_by_layer():
    """A share of its own for every layer; a list of another length names it and the layers."""
    cache = make(wide_channels=[0, 0.5, 1.0], metadata_bits=8)
    feed(cache, 1, 100)
    assert [layer.store.key.wide for layer in cache.layers] == [0, 16, 32]
    assert [layer.store.observes for layer in cache.layers] == [False] * 3  # all are packed
    for index, layer in enumerate(cache.layers):
        alone = KIVICache(CONFIG, **{**SMALL, "wide_channels": layer.options.wide_channels, "metadata_bits": 8})
        feed(alone, 1, 100)
        same = [
            torch.equal(a, b)
            for a, b in zip(layer.store.tensors().values(), alone.layers[index].store.tensors().values())
        ]
        assert len(same) > 8 and all(same)
    for wrong in ([0.5, 0.5], [0.5] * 4):
        with pytest.raises(ValueError, match=f"wide_channels has {len(wrong)} entries for {LAYERS} layers"):
            make(wide_channels=wrong)
    with pytest.raises(ValueError, match="wide_channels has 3 entries for 1 layers"):
        KIVICache(wide_channels=[0, 0.5, 1.0])
    with pytest.raises(ValueError, match="take the options of one layer"):
        cache.options.stored_bits(2, 2, HEAD_DIM)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("length", [1, 60])
def test_bad_states_name_the_layer_and_leave_the_cache_alone(bad, side, length):
    cache = make()
    feed(cache, 1, 70)
    good = copy.deepcopy(cache)
    new = states(1, length, seed=8)
    new[side][0, 1, length // 2, 7] = bad
    with pytest.raises(ValueError, match="layer 2"):
        cache.update(*new, 2)
    after, _ = feed(cache, 1, 1, seed=6)
    expected, _ = feed(good, 1, 1, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(after, expected))


@pytest.mark.parametrize("dtype,offset", [(torch.float16, 20000), (torch.float32, 60000)])
@pytest.mark.parametrize("length", [1, 60])
def test_values_that_are_too_large_once_rotated_are_refused(dtype, offset, length):
    """A rotation gathers what all channels have in common in one; nothing may be stored by then."""
    cache = make()
    feed(cache, 1, 70, dtype=dtype)
    good = copy.deepcopy(cache)
    key, value = states(1, length, seed=8, dtype=dtype)
    with pytest.raises(ValueError, match="layer 1.*values reach.*v_rotation=False"):
        cache.update(key, torch.full_like(value, offset), 1)
    after, _ = feed(cache, 1, 1, seed=6, dtype=dtype)
    expected, _ = feed(good, 1, 1, seed=6, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(after, expected))


def test_sequences_that_are_not_there_cannot_be_selected():
    cache = make()
    feed(cache, 2, 80)
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([5]))
    cache.batch_select_indices(torch.tensor([-1]))
    assert cache.layers[0].batch_size == 1
    cache.batch_select_indices(torch.tensor([False]))
    assert cache.get_cache_info()["tokens"]["lengths"] == []


def test_another_batch_size_is_refused():
    cache = make()
    feed(cache, 2, 10)
    with pytest.raises(ValueError, match="holds 2 sequences, the new states 3"):
        feed(cache, 3, 1)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_reported_bytes_are_those_of_the_tensors(batch, bits):
    cache = make(k_bits=bits, v_bits=bits)
    feed(cache, batch, 1000, dtype=torch.bfloat16)
    info = cache.get_cache_info()
    tensors = [t for layer in cache.layers for t in layer.store.tensors().values()]
    assert info["bytes"]["total"] == sum(t.untyped_storage().nbytes() for t in tensors)
    parts = info["bytes"]
    assert parts["codes"] + parts["metadata"] + parts["full_precision"] == parts["total"]
    assert parts["dense"] == 2 * batch * HEADS * 1000 * HEAD_DIM * 2 * LAYERS
    assert info["tokens"] == {"sinks": 4, "packed": 960, "window": 36, "lengths": [1000] * batch}
    assert info["backend"] is not None


def test_the_table_is_printed(capsys):
    cache = make()
    print_kivi_stats(cache)
    feed(cache, 1, 1000)
    print_kivi_stats(cache)
    text = capsys.readouterr().out
    assert "tokens in sinks / packed / window" in text and "4 / 960 / 36" in text


def test_options_come_from_a_config_and_from_options():
    config = FAMILIES["llama"][2](**SIZES, head_dim=32, k_bits=4, v_bits=8, **SMALL)
    assert KIVICache(config).options.k_bits == 4
    assert KIVICache(config, k_bits=8).options.k_bits == 8
    assert KIVICache(config, KIVIOptions(k_bits=2)).options.k_bits == 2


def test_a_stock_model_can_use_the_cache(pair):
    stock, kivi = pair
    ids = torch.randint(3, 100, (2, 150), generator=torch.Generator().manual_seed(3))
    cache, expected = make(k_bits=8, v_bits=8), DynamicCache()
    with torch.no_grad():
        for piece in (ids[:, :120], ids[:, 120:121], ids[:, 121:]):
            out = stock(piece, past_key_values=cache).logits
            ref = stock(piece, past_key_values=expected).logits
            assert relative_error(out, ref) < 0.02
        packed = KIVICache(CONFIG, k_bits=8, v_bits=8, **SMALL)
        for piece in (ids[:, :120], ids[:, 120:121], ids[:, 121:]):
            out2 = kivi(piece, past_key_values=packed).logits
    assert relative_error(out2, out) < 1e-4  # the same codes, attended two ways


def test_a_cache_without_a_config_makes_its_layers_as_they_come(pair):
    stock, kivi = pair
    ids = torch.randint(3, 100, (1, 120), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for model in (kivi, stock):
            cache, expected = KIVICache(**SMALL), make()
            for piece in (ids[:, :100], ids[:, 100:]):
                out = model(piece, past_key_values=cache).logits
                ref = model(piece, past_key_values=expected).logits
            assert torch.equal(out, ref) and len(cache) == LAYERS
            assert copy.deepcopy(cache).get_seq_length() == 120
    with pytest.raises(ValueError, match="entries for 1 layers"):
        KIVICache(k_bits=[2, 4, 2])
