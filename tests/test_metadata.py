"""Metadata of 8 bits: what it can say, what it costs, and what is kept of it."""

import pytest
import torch
from layers import make_layer, relative_error

from modules.codecs.grouped import choose_order, dequantize_keys, dequantize_values, quantize_keys, quantize_values
from modules.codecs.metadata import EIGHT_BIT_KEYS, EIGHT_BIT_VALUES, FLOAT16, numbers_of, scale_codes, scales_of
from modules.kernels.registry import backend
from modules.options import KIVIOptions, rotary_share
from modules.store.step import Step

SIDES = {
    "keys": (quantize_keys, dequantize_keys, EIGHT_BIT_KEYS),
    "values": (quantize_values, dequantize_values, EIGHT_BIT_VALUES),
}


def test_every_code_of_a_scale_comes_back():
    codes = torch.arange(0xF8, dtype=torch.uint8)
    scales = scales_of(codes)
    assert torch.equal(scale_codes(scales), codes)
    assert scales[0] == 0 and (scales.diff() > 0).all() and scales[-1] == 61440


def test_scales_are_at_most_a_sixteenth_off():
    scales = 10 ** torch.linspace(-4, 4.7, 1000)
    assert ((scales_of(scale_codes(scales)) / scales - 1).abs() <= 1 / 16).all()


def test_scales_beyond_the_largest_and_without_size():
    assert scales_of(scale_codes(torch.tensor([65504.0, 0.0, -0.0, 1e-9]))).tolist() == [61440, 0, 0, 0]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["minmax", "lsq"])
@pytest.mark.parametrize("bits, more", [(2, 1.02), (4, 1.06)])
def test_the_error_is_hardly_larger(side, method, bits, more):
    quantize, dequantize, small = SIDES[side]
    offset = 40.0 if side == "keys" else 0.5
    x = torch.randn(2, 3, 256, 64, generator=torch.Generator().manual_seed(bits))
    errors = [
        relative_error(dequantize(quantize(x + offset, bits, 32, method, how), bits, 32) - offset, x)
        for how in (FLOAT16, small)
    ]
    assert 0 < errors[1] < more * errors[0]


@pytest.mark.parametrize("side", SIDES)
def test_what_a_fit_counts_on_is_what_is_read(side):
    quantize, _, small = SIDES[side]
    packed = quantize(torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)), 2, 32, "lsq", small)
    assert (packed.scale.dtype, packed.minimum.dtype) == (small.scale, small.minimum)
    again = small.pack(*small.stored(*numbers_of(packed, 2), 2), 2)
    assert torch.equal(again[0], packed.scale) and torch.equal(again[1], packed.minimum)


@pytest.mark.parametrize("constant", [0.0, 1.5, -300.0, 60000.0])
@pytest.mark.parametrize("side", SIDES)
def test_constant_groups(side, constant):
    quantize, dequantize, small = SIDES[side]
    x = torch.full((1, 1, 64, 64), constant)
    out = dequantize(quantize(x, 2, 32, "minmax", small), 2, 32)
    assert (out - x).abs().max() <= abs(constant) / 200  # values count scales: half a step of the smallest that reaches


@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 2)])
def test_stored_bits_are_those_of_the_tensors(bits):
    options = {"metadata_bits": 8, "residual_length": 32, "wide_channels": 0.5}
    layer = make_layer([36 + 256], bits=bits, kv_heads=2, head_dim=64, **options)
    tokens, expected = layer.packed[0], KIVIOptions(**options).stored_bits(*bits, 64)
    for side, per_element in zip(layer.sides, expected):
        parts = [t for t in side.stored(slice(None), 0, tokens) if t is not None]
        assert 8 * sum(t.numel() * t.element_size() for t in parts) / (tokens * 2 * 64) == per_element


def test_three_bits_buy_twice_the_wide_channels():
    assert sum(KIVIOptions(metadata_bits=8, wide_channels=0.5).stored_bits(2, 2, 128)) / 2 == 3.0
    assert sum(KIVIOptions(metadata_bits=16, wide_channels=0.25).stored_bits(2, 2, 128)) / 2 == 3.0


@pytest.mark.parametrize("bits", [(2, 2), (4, 4)])
def test_torch_attends_as_over_dequantized_states(bits):
    layer = make_layer([200], bits=bits, kv_heads=2, head_dim=64, metadata_bits=8)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 1, 64, generator=generator) for heads in (4, 2, 2))
    out = backend("torch").attend(query, key, value, layer, 0.125, Step.of(None, 1, 1))
    keys, values = (
        torch.cat([layer.read(side, slice(0, 1), torch.float32), new], 2)
        for side, new in zip(layer.sides, (key, value))
    )
    dense = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.125, enable_gqa=True)
    assert relative_error(out, dense.transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("metadata_bits", [4, 8.0, True, "8"])
def test_other_bits_are_refused(metadata_bits):
    with pytest.raises(ValueError, match="metadata_bits must be one of 8, 16"):
        KIVIOptions(metadata_bits=metadata_bits)


def test_wide_are_both_channels_of_a_pair():
    """A channel that lies still at the first positions, and its partner, which positions will turn into it."""
    keys = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    keys[..., 5] *= 100
    keys[..., [40, 41]] *= 30
    energy = torch.ones(1, 1, 64)
    alone, paired = (choose_order(keys, 4, 32, energy, rotary)[0, 0] for rotary in (0, 64))
    assert {5, 40, 41} < set(alone[:4].tolist()) and 37 not in alone[:3]
    assert {5, 37} < set(paired[:4].tolist()) and sorted(paired.tolist()) == list(range(64))
    assert all((channel + 32) % 64 in paired[:4] for channel in paired[:4].tolist())
    part = choose_order(keys, 4, 32, energy, 16)[0, 0, :4].tolist()
    assert {5, 13, 40, 41} == set(part)  # only the first 16 are rotated


@pytest.mark.parametrize(
    "parameters, share",
    [
        (None, 0.0),
        ({"rope_type": "default", "rope_theta": 1e4}, 1.0),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.25}, 0.25),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"partial_rotary_factor": 0.5}}, 1.0),
    ],
)
def test_the_rotated_share_of_a_head(parameters, share):
    config = type("Config", (), {"rope_parameters": parameters})()
    assert rotary_share(config) == share
