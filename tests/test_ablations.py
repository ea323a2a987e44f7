"""Fake quantization of recorded states: it agrees with the cache's own codecs, and ranks what is known."""

import math

import pytest
import torch
from layers import random_states, relative_error

from modules.codecs.grouped import (
    choose_order,
    dequantize_values,
    dequantize_wide_keys,
    place_channels,
    quantize_keys,
    quantize_values,
)
from modules.codecs.metadata import EIGHT_BIT_KEYS, EIGHT_BIT_VALUES, FLOAT16
from modules.codecs.rotation import rotate
from modules.evaluation import variants
from modules.evaluation.ablations import measure
from modules.evaluation.variants import FIRST, States, key_variants, value_variants


@pytest.fixture(scope="module")
def states():
    key, value = random_states((1, 2, 644, 64), seed=5)
    query, _ = random_states((1, 4, 644, 64), seed=6)
    projection = torch.randn(2, 2, 64, 96, generator=torch.Generator().manual_seed(7))
    return States(query[0].unflatten(0, (2, 2)) / 8, key[0], value[0], projection)


def packed_part(states: States) -> States:
    part = slice(4, 644)
    return States(states.queries[:, :, part], states.keys[:, part], states.values[:, part], states.projection)


@pytest.mark.parametrize("metadata", [FLOAT16, EIGHT_BIT_KEYS], ids=["16", "8"])
@pytest.mark.parametrize("paired", [False, True])
def test_keys_are_rounded_as_the_codec_does(states, metadata, paired):
    part = packed_part(states)
    keys = part.keys[None]
    energy = part.first_queries().square().mean(1)[None]
    order = choose_order(keys[:, :, :FIRST], 16, 32, energy, 64 if paired else 0)
    placed = place_channels(keys, order)
    codec = dequantize_wide_keys(quantize_keys(placed, 2, 32, "lsq", metadata, 16), 2, order, 32)
    fake = variants.keys(variants.wide(0.25, paired), metadata=metadata)(part)
    errors = [(found - keys).norm() for found in (fake[None], codec)]
    assert abs(errors[0] / errors[1] - 1) < 0.01  # a fit may end elsewhere where its start is rounded otherwise
    assert relative_error(fake[None], codec) < 0.4 * relative_error(codec, keys)


@pytest.mark.parametrize("metadata", [FLOAT16, EIGHT_BIT_VALUES], ids=["16", "8"])
def test_values_are_rounded_as_the_codec_does(states, metadata):
    part = packed_part(states)
    codec = rotate(dequantize_values(quantize_values(rotate(part.values[None]), 2, 64, "clipped", metadata), 2, 64))
    assert relative_error(variants.values(metadata=metadata)(part)[None], codec) < 1e-3


def test_every_variant_is_measured_and_more_bits_help(states):
    for of_side in (key_variants(64), value_variants(64)):
        errors = {variant.name: measure(states, variant) for variant in of_side}
        assert len(errors) == len(of_side) and all(0 < error < 1 for error in errors.values())
        assert all(math.isfinite(variant.bits) and 2 < variant.bits < 6 for variant in of_side)
    errors = {variant.name: measure(states, variant) for variant in key_variants(64)}
    default = errors["pairs, scales of 8 bits, half wide (the default)"]
    assert errors["4 bits"] < default < errors["by range and query, no wide ones"]


def test_nothing_stored_is_no_error(states):
    same = variants.Variant("as it is", "keys", 16, lambda part: part.keys)
    assert measure(states, same) < 1e-10


def test_errors_fed_back_are_smaller_where_queries_are_alike(states):
    """Queries with one direction of their own: what they do not see may be wrong."""
    direction = torch.randn(64, generator=torch.Generator().manual_seed(8)) / 8
    alike = States(states.queries * 0.05 + direction, states.keys, states.values, states.projection)
    plain, fed = (
        measure(alike, variants.Variant("", "keys", 2, variants.keys(variants.wide(0.25, False), feedback=feedback)))
        for feedback in (False, True)
    )
    assert fed < 0.5 * plain


def test_a_trellis_has_less_error_than_four_levels():
    """The bound of 2 bits is an error of a 16th; four levels have 0.1175 (Max, 1960)."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(9))
    four, coded = ((levels(x) - x).square().mean().item() for levels in (variants.lloyd_max, variants.trellis))
    assert abs(four - 0.1175) < 0.01 and 1 / 16 < coded < 0.9 * four


def test_bits_by_cost_keep_to_their_mean():
    bits = variants._fill([float(2**number) for number in range(32)], 2.5, (1, 2, 3, 4, 5, 6))
    assert bits.mean() == 2.5 and (bits.diff() >= 0).all() and bits.max() > 3
