"""References of other methods: errors fall with bits, are zero where they must be, and bits are counted right."""

import importlib.util
import math

import pytest
import torch
from conftest import make_pair, relative_error, tokens
from transformers import Gemma3TextConfig

from modules import evaluation
from modules.evaluation import candidates as named
from modules.evaluation import kvarn, references, rounded, turboquant


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def uneven():
    """Keys with wide channels and loud tokens, as attention has them; `[1, 2, TILE, 64]`."""
    wide = torch.linspace(0.5, 3, 64).exp() * torch.linspace(1, 1.5, kvarn.TILE)[:, None]
    return states(1, 2, kvarn.TILE, 64) * wide


# --- KVarN -------------------------------------------------------------------


def test_kvarn_balances_both_axes(uneven):
    columns, rows = kvarn.balance(uneven)
    even = uneven / columns / rows
    assert (kvarn.spread(even) < 0.5 * kvarn.spread(uneven)).all()
    for dim in (-2, -1):
        assert even.std(dim).amax() / even.std(dim).amin() < 1.3


@pytest.mark.parametrize("how", [kvarn.round_keys, kvarn.round_values])
def test_kvarn_errors_fall_with_bits(how, uneven):
    errors = [relative_error(how(uneven, bits), uneven) for bits in (2, 4, 8)]
    assert 0.5 > errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_kvarn_rounds_nothing_that_has_few_levels():
    """A checkerboard comes back as it is, but for the 16 bits of scales."""
    tile = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(kvarn.TILE))[None]
    assert relative_error(kvarn.round_rows(tile, 2), tile) < 2e-3


def test_kvarn_gains_by_its_scales(uneven, monkeypatch):
    ours = relative_error(kvarn.round_values(uneven, 2), uneven)
    monkeypatch.setattr(kvarn, "balance", lambda tile: (torch.ones(1, 1), torch.ones(1, 1)))
    assert ours < relative_error(kvarn.round_values(uneven, 2), uneven)


def test_kvarn_bits_are_the_papers():
    assert kvarn.stored_bits(128, 2, 2) == 2.375 and kvarn.stored_bits(128, 4, 2) == 3.375
    assert kvarn.stored_bits(64, 2, 2) == pytest.approx(2 + 16 * (3 * 64 + 3 * 128) / (2 * 64 * 128))


# --- TurboQuant --------------------------------------------------------------


def test_codebooks_are_those_of_a_gaussian_in_many_dimensions():
    """Max's levels for a normal distribution (1960): ±0.7979; ±0.4528, ±1.5104."""
    one, two = (turboquant.codebook(4096, bits) * math.sqrt(4096) for bits in (1, 2))
    torch.testing.assert_close(one, torch.tensor([-0.7979, 0.7979]), rtol=5e-3, atol=0)
    torch.testing.assert_close(two, torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104]), rtol=5e-3, atol=0)


def test_turboquant_errors_are_the_papers():
    """Mean squared errors of unit vectors, theorem 1: about 0.36, 0.117, 0.03 and 0.009 for 1 to 4 bits."""
    points = torch.nn.functional.normalize(states(2000, 128), dim=-1)
    for bits, expected in ((1, 0.36), (2, 0.117), (3, 0.034), (4, 0.0095)):
        error = (turboquant.round_states(points, bits) - points).square().sum(-1).mean().item()
        assert error == pytest.approx(expected, rel=0.06)


def test_rotations_are_orthogonal_and_norms_stay():
    turn = turboquant.rotation(64)
    torch.testing.assert_close(turn @ turn.T, torch.eye(64), rtol=0, atol=1e-5)
    assert torch.equal(turboquant.round_states(torch.zeros(3, 64), 2), torch.zeros(3, 64))
    one, ten = (turboquant.round_states(scale * states(5, 64), 2) for scale in (1, 8))
    torch.testing.assert_close(8 * one, ten, rtol=1e-3, atol=1e-5)


def test_signs_take_the_bias_from_inner_products(monkeypatch):
    """One bit alone shrinks a vector; its signs, over projections, do not."""
    point = torch.nn.functional.normalize(states(1, 64), dim=-1)
    seen = []
    for seed in range(300):
        monkeypatch.setattr(turboquant, "projection", lambda size, seed=seed: states(size, size, seed=seed))
        seen.append((turboquant.round_with_signs(point, 2) @ point.T).item())
    plain = (turboquant.round_states(point, 1) @ point.T).item()
    assert plain < 0.75 and sum(seen) / len(seen) == pytest.approx(1, abs=0.03)


def test_turboquant_bits():
    assert turboquant.stored_bits(64, 3) == 3.25 and turboquant.stored_bits(64, 3, signs=True) == 3.375


# --- their caches ------------------------------------------------------------


def double(part):
    return 2 * part


def test_whole_groups_are_rounded_after_their_forward():
    layer = rounded.RoundedLayer(rounded.Scheme(double, double, 3.0, group=4, sinks=2))
    given = states(1, 2, 21, 8)
    seen, _ = layer.update(given[:, :, :9], given[:, :, :9])
    assert torch.equal(seen, given[:, :, :9])  # in its own forward as it was
    expected = torch.cat([given[:, :, :2], 2 * given[:, :, 2:6], given[:, :, 6:9]], 2)
    assert torch.equal(layer.keys, expected) and torch.equal(layer.values, expected)
    for token in range(9, 21):
        layer.update(given[:, :, token : token + 1], given[:, :, token : token + 1])
    assert torch.equal(layer.keys, torch.cat([given[:, :, :2], 2 * given[:, :, 2:18], given[:, :, 18:]], 2))
    layer.crop(-3)
    assert layer.get_seq_length() == 18
    with pytest.raises(ValueError, match="5 tokens cannot be removed"):
        layer.crop(-5)


def test_references_are_measured_beside_ours():
    model = make_pair("qwen3")[1]
    result = evaluation.measure_quality(model, tokens(1, 420), references.references(), chunk=32, skip=300)
    rows = {row.name: row for row in result.rows}
    two, three, four = (rows[f"TurboQuant, {bits} bits"] for bits in (2, 3, 4))
    assert two.kl > 2 * three.kl > 4 * four.kl > 0 and two.stored_bits == 2.25
    low, high = rows["KVarN, K 2 bits, V 2 bits"], rows["KVarN, K 4 bits, V 2 bits"]
    assert low.kl > high.kl > 0 and low.stored_bits == kvarn.stored_bits(64, 2, 2)
    assert len(named.as_candidates([*named.peers(), *references.references(), *references.packages()])) == 13


def test_models_with_windows_are_refused():
    config = Gemma3TextConfig(num_hidden_layers=6)
    with pytest.raises(ValueError, match="full attention alone; this one has sliding_attention"):
        kvarn.kvarn_cache(config, 2, 2)


def test_packages_run_or_say_that_they_are_missing():
    model = make_pair("llama")[1]
    result = evaluation.measure_quality(model, tokens(1, 420), references.packages(), chunk=64, skip=300)
    for row in result.rows[1:]:
        if importlib.util.find_spec("tiny_turboquant") is None:
            assert "tiny_turboquant" in row.note and row.kl is None
        else:
            assert row.kl > 0 and 3 < row.stored_bits < 6
