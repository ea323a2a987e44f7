"""Grouped quantization: layout, exactness, quality of the fit, refusals."""

import pytest
import torch

from modules.codecs import grouped
from modules.codecs.grouped import (
    dequantize_keys,
    dequantize_values,
    dequantize_wide_keys,
    pack_codes,
    quantize_keys,
    quantize_values,
    token_shares,
    unpack_codes,
)
from modules.codecs.metadata import EIGHT_BIT_KEYS, FLOAT16

SIDES = {"keys": (quantize_keys, dequantize_keys), "values": (quantize_values, dequantize_values)}
AS_THEY_ARE = torch.arange(64)  # the order of channels


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_round_trip_and_byte_layout(bits):
    codes = torch.randint(0, 1 << bits, (2, 3, 5, 64), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, 5, 64 * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)
    planes = 8 // bits
    byte = sum(int(codes[1, 2, 4, 7 + plane * 64 // planes]) << (bits * plane) for plane in range(planes))
    assert int(packed[1, 2, 4, 7]) == byte


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["minmax", "lsq"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_representable_values_come_back_exactly(bits, method, side, group):
    quantize, dequantize = SIDES[side]
    generator = torch.Generator().manual_seed(bits * group)
    levels = (1 << bits) - 1
    dim = -2 if side == "keys" else -1
    x = torch.randint(0, levels + 1, (2, 2, 128, 64), generator=generator).float()
    x.narrow(dim, 0, x.shape[dim]).unflatten(dim, (-1, group)).select(dim, 0).fill_(0)
    x.unflatten(dim, (-1, group)).select(dim, 1).fill_(levels)
    x = x * 0.25 - 3.5
    packed = quantize(x, bits, group, method)
    assert torch.equal(dequantize(packed, bits, group), x)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["minmax", "lsq"])
def test_shapes_and_dtypes(side, method):
    quantize, dequantize = SIDES[side]
    x = torch.randn(2, 3, 96, 128, dtype=torch.bfloat16)
    packed = quantize(x, 4, 32, method)
    metadata = (2, 3, 3, 128) if side == "keys" else (2, 3, 96, 4)
    assert packed.codes.shape == (2, 3, 96, 64) and packed.codes.dtype == torch.uint8
    assert packed.scale.shape == packed.minimum.shape == metadata and packed.scale.dtype == torch.float16
    assert dequantize(packed, 4, 32, torch.bfloat16).dtype == torch.bfloat16
    assert quantize(x[:, :, :0], 4, 32, method).codes.shape == (2, 3, 0, 64)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits,bound", [(2, 0.5), (4, 0.5), (8, 0.5)])
def test_minmax_error_is_half_a_step(side, bits, bound):
    quantize, dequantize = SIDES[side]
    x = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(1))
    packed = quantize(x, bits, 32, "minmax")
    dim = -2 if side == "keys" else -1
    steps = packed.scale.float().repeat_interleave(32, dim=dim)
    # half a step, and what float16 rounds off the scale and the minimum
    assert ((dequantize(packed, bits, 32) - x).abs() <= bound * steps + 4e-3).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_is_never_worse_than_minmax_and_better_at_two_bits(bits):
    x = torch.randn(1, 4, 256, 64, generator=torch.Generator().manual_seed(2)) * 3 + 20

    groups = x.unflatten(2, (-1, 32))
    shares = token_shares(groups)

    def errors(method):
        found = dequantize_keys(quantize_keys(x, bits, 32, method), bits, 32)
        return ((found.unflatten(2, (-1, 32)) - groups).square() * shares).sum(3)

    minmax, lsq = errors("minmax"), errors("lsq")
    assert (lsq <= minmax * (1 + 1e-6) + 1e-9).all()
    if bits == 2:
        assert lsq.sum() < 0.8 * minmax.sum()


def test_a_token_that_lies_apart_counts_more():
    groups = torch.randn(1, 2, 3, 32, 64, generator=torch.Generator().manual_seed(4))
    groups[..., 5, :16] *= 8
    shares = token_shares(groups)
    assert torch.allclose(shares.sum(3), torch.ones(1, 2, 3, 1))
    assert (shares[..., 5, 0] > 0.4).all() and shares.min() > 0.4 / 32
    alike = token_shares(groups[..., 16:])
    assert alike.max() < 0.2 < 0.4 < shares.max()
    assert torch.equal(token_shares(torch.ones(1, 32, 64)), torch.full((1, 32, 1), 1 / 32))


def test_keys_that_lie_apart_lose_less_than_the_others(monkeypatch):
    """One of 32, in some channels: with all alike the fit gives it up, for it is one of many."""

    def apart():
        stored = dequantize_wide_keys(quantize_keys(x, 2, 32, "lsq", wide=16), 2, AS_THEY_ARE.expand(1, 4, -1), 32)
        return (stored - x).square().unflatten(2, (-1, 32))[..., :16].select(3, 0).mean()

    x = torch.randn(1, 4, 256, 64, generator=torch.Generator().manual_seed(5))
    x[:, :, ::32, :16] += 6
    found = apart()
    monkeypatch.setattr(grouped, "token_shares", lambda groups: 1 / groups.shape[-2])
    assert found < 0.5 * apart()


@pytest.mark.parametrize("metadata", [FLOAT16, EIGHT_BIT_KEYS], ids=["16", "8"])
@pytest.mark.parametrize("bits", [2, 4])
def test_wide_channels_are_those_of_two_bits_more(bits, metadata):
    """The others are as without wide ones, and errors are as many times smaller as there are steps in a range."""
    x = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(bits))
    plain = (dequantize_keys(quantize_keys(x, bits, 32, "minmax", metadata), bits, 32) - x).square()
    packed = quantize_keys(x, bits, 32, "minmax", metadata, wide=24)
    assert packed.extra.shape == (2, 3, 128, 6) and packed.codes.shape == (2, 3, 128, 64 * bits // 8)
    stored = dequantize_wide_keys(packed, bits, AS_THEY_ARE.expand(2, 3, -1), 32)
    error = (stored - x).square()
    assert torch.equal(error[..., 24:], plain[..., 24:])
    steps = ((1 << bits + 2) - 1) / ((1 << bits) - 1)
    least = 0.8 if metadata.exact else 0.7  # many steps of a scale that is rounded miss the ends of a range
    assert least < plain[..., :24].mean() / error[..., :24].mean() / steps**2 < 1.2
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).expand(2, 3, -1)
    assert torch.equal(
        dequantize_wide_keys(packed, bits, order, 32), torch.empty_like(x).index_copy_(3, order[0, 0], stored)
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["minmax", "lsq"])
@pytest.mark.parametrize("constant", [0.0, 1.5, -60000.0, 1e-9])
def test_constant_groups(side, method, constant):
    quantize, dequantize = SIDES[side]
    x = torch.full((1, 1, 64, 64), constant)
    out = dequantize(quantize(x, 2, 32, method), 2, 32)
    assert torch.isfinite(out).all()
    assert (out - x).abs().max() <= 1e-3 * abs(constant) + 1e-7


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e5])
def test_what_float16_cannot_hold_is_refused(side, bad):
    x = torch.randn(1, 1, 32, 64)
    x[0, 0, 3, 5] = bad
    with pytest.raises(ValueError, match="finite"):
        SIDES[side][0](x, 2, 32)


@pytest.mark.parametrize("side", SIDES)
def test_the_largest_float16_values_stay_finite(side):
    quantize, dequantize = SIDES[side]
    x = torch.randn(1, 1, 64, 64).sign() * 65504
    for method in ("minmax", "lsq"):
        out = dequantize(quantize(x, 2, 32, method), 2, 32)
        assert torch.isfinite(out).all() and ((out - x).norm() / x.norm()) < 1e-3


@pytest.mark.parametrize(
    "arguments,message",
    [((3, 32), "bits must be"), ((2, 0), "group"), ((2, 24), "group"), ((2, 32, "l2"), "range")],
)
def test_bad_arguments(arguments, message):
    for quantize, _ in SIDES.values():
        with pytest.raises(ValueError, match=message):
            quantize(torch.randn(1, 1, 64, 64), *arguments)
