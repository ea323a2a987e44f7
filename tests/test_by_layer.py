"""Options by layer: costs that are predicted against costs that are measured, and what is chosen by them."""

import dataclasses
import itertools

import pytest
import torch
from conftest import make_pair, tokens

from modules import evaluation
from modules.evaluation import __main__ as command
from modules.evaluation import by_layer, candidates, layers
from modules.evaluation.layers import LayerCosts, SideCosts
from modules.kivi_cache_general import KIVICache
from modules.options import KIVIOptions

SHARED = {"group_size": 32, "residual_length": 32}
SKIP, LENGTH = 200, 600


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request):
    """With queries large enough that attention looks somewhere."""
    model = make_pair(request.param)[1]
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(20)
    return model


@pytest.fixture(scope="module")
def states(model):
    head_dim = model.model.layers[0].self_attn.head_dim
    return evaluation.record_layers(model, tokens(1, LENGTH), head_dim, skip=SKIP, probes=24)


def log_probs(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, SKIP:].double().log_softmax(-1)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_cost_of_noise_is_its_divergence(model, states, layer):
    """Noise added to what a layer attended, by a hook: the KL divergence of a forward with it."""
    shape = states[layer].queries.shape
    noise = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = log_probs(model, tokens(1, LENGTH))
    flat = noise.flatten(0, 1).transpose(0, 1).flatten(1)  # as the output projection has it, [T, heads * D]
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _, given: (given[0] + flat,))
    noisy = log_probs(model, tokens(1, LENGTH))
    hook.remove()
    kl = torch.nn.functional.kl_div(noisy, exact, log_target=True, reduction="batchmean").item()
    assert kl > 1e-9 and states[layer].cost(noise) == pytest.approx(kl, rel=0.2)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_predicted_costs_are_near_those_of_a_cache(model, states, side, without_numba):
    """One side of the last layer stored and all else in full precision: weights without a pattern let errors of one token go on
    to all later ones in the layers behind. A window that is longer at times costs less."""
    costs = getattr(evaluation.measure_layers(states, SHARED), side)
    name = {"keys": "k_bits", "values": "v_bits"}[side]
    caches = {
        str(number): {**SHARED, **choice, "k_bits": 16, "v_bits": 16, name: [16, 16, choice[name]]}
        for number, choice in enumerate(costs.choices)
    }
    rows = evaluation.measure_quality(model, tokens(1, LENGTH), caches, chunk=16, skip=SKIP).rows[1:]
    *told, (eight, lost_by_eight) = zip(rows, costs.kl[2])
    for row, predicted in told:
        assert 0.5 < predicted / row.kl < 2, row.name
    assert 0 < lost_by_eight < told[0][1] / 1000 and abs(eight.kl) < 1e-7  # which is what float32 rounds


def test_more_bits_cost_less(states):
    costs = evaluation.measure_layers(states, SHARED)
    for side in (costs.keys, costs.values):
        assert list(side.bits) == sorted(side.bits)
        for of_layer in side.kl:
            assert 0 < of_layer[-1] < of_layer[0] / 4


def test_full_precision_costs_nothing(states, monkeypatch):
    monkeypatch.setattr(layers, "KEYS", ({"k_bits": 16, "wide_channels": 0.0},))
    monkeypatch.setattr(layers, "VALUES", ({"v_bits": 16},))
    costs = evaluation.measure_layers(states, SHARED)
    assert all(kl < 1e-9 for side in (costs.keys, costs.values) for of_layer in side.kl for kl in of_layer)


# --- the choice --------------------------------------------------------------


def costs_of(keys, values, options=None):
    """Keys with 2, 3 or 5 bits, values with 2 or 4."""
    return LayerCosts(
        options or {},
        SideCosts(({"k_bits": 2}, {"k_bits": 3}, {"k_bits": 5}), (2.0, 3.0, 5.0), keys),
        SideCosts(({"v_bits": 2}, {"v_bits": 4}), (2.0, 4.0), values),
    )


def test_bits_go_where_they_save_most():
    costs = costs_of(((8.0, 4.0, 1.0), (2.0, 1.5, 1.0)), ((9.0, 1.0), (0.5, 0.4)))
    for bits, expected in (
        (2.0, ([2, 2], [2, 2])),
        (2.25, ([3, 2], [2, 2])),
        (2.75, ([3, 2], [4, 2])),
        (3.25, ([5, 2], [4, 2])),
        (9.0, ([5, 5], [4, 4])),
    ):
        choice = evaluation.choose([costs], bits)
        assert (choice.options["k_bits"], choice.options["v_bits"]) == expected
        spent = sum(sum(of_side) for of_side in expected) / 4
        assert choice.bits == spent <= bits
        assert choice.kl == pytest.approx(sum(choice.keys) + sum(choice.values))


def test_a_choice_is_near_the_best_of_all():
    """Every choice of four layers tried."""
    draw = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)).mul(4).exp().tolist()
    costs = costs_of(tuple((a, a / 4, a / 30) for a, *_ in draw), tuple((b, b / 20) for _, b, *_ in draw))
    best = min(
        sum(costs.keys.kl[layer][k] + costs.values.kl[layer][v] for layer, (k, v) in enumerate(zip(*sides)))
        for sides in itertools.product(itertools.product(range(3), repeat=4), itertools.product(range(2), repeat=4))
        if sum(costs.keys.bits[k] for k in sides[0]) + sum(costs.values.bits[v] for v in sides[1]) <= 8 * 3.0
    )
    assert best <= evaluation.choose([costs], 3.0).kl < 1.1 * best


def test_the_better_options_for_all_layers():
    better, worse = (
        costs_of(((kl, kl, kl),), ((1.0, 1.0),), {"group_size": size}) for kl, size in ((1.0, 64), (2.0, 32))
    )
    assert evaluation.choose([worse, better], 2.0).options["group_size"] == 64
    with pytest.raises(ValueError, match=r"bits must be at least 2 with these options; got 1.9"):
        evaluation.choose([worse, better], 1.9)


# --- from a text to a cache --------------------------------------------------


def test_what_is_chosen_makes_a_cache_of_so_many_bits(model, tmp_path, without_numba):
    more, result = by_layer.choose_by_layer(model, tokens(1, LENGTH), bits=[3.5, 3.0], options={"residual_length": 64})
    assert (
        more.settings["kl"] < result.settings["kl"] and 3.0 < more.settings["bits"] <= more.settings["at_most"] == 3.5
    )
    options = result.settings["options"]
    assert len(result.rows) == 3 == len(options["wide_channels"]) and options["metadata_bits"] == 8
    evaluation.save_result(result, tmp_path / "layers.json")
    candidate = candidates.by_layer(evaluation.load_result(tmp_path / "layers.json"))
    row = evaluation.measure_quality(model, tokens(1, LENGTH), [candidate], skip=SKIP).rows[1]
    assert row.stored_bits == pytest.approx(result.settings["bits"]) and 2.8 < row.stored_bits <= 3.0
    cache = KIVICache(model.config, **options)
    assert [layer.bits for layer in cache.layers] == [(row["k_bits"], row["v_bits"]) for row in result.rows]
    with pytest.raises(ValueError, match="are made from a result of `python -m modules.evaluation layers`"):
        candidates.by_layer(dataclasses.replace(result, settings={}))


def test_layers_command(model, tmp_path, capsys, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "layers.json"
    flags = [
        "--tokens",
        "300",
        "--bits",
        "3.5",
        "--scale-bits",
        "16",
        "--device",
        "cpu",
        "--sink-length",
        "8",
        "--output",
        str(output),
    ]
    assert command.main(["layers", "--model", str(tmp_path / "model"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = evaluation.load_result(output).settings["options"]
    assert (options["sink_length"], options["group_size"], options["metadata_bits"]) == (8, 32, 16)
    passed = eval(f"dict({lines[lines.index('in Python:') + 1]})")
    typed = candidates.parse_options(lines[lines.index("for --options:") + 1]).options
    assert candidates.parse_options(str(output)).options == options
    with pytest.raises(ValueError, match="there is no file 'nothing.json'"):
        candidates.parse_options("nothing.json")
    assert passed == options == typed and f"--k-bits {' '.join(map(str, options['k_bits']))}" in " ".join(lines)
    KIVIOptions(**options).of_layer(0, 3)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (133, {}, "133 tokens leave nothing to store; give more than 133"),
        (300, {"residual_length": 48}, "groups of 32, 64, 128 do not fit"),
        (300, {"sink_lenght": 4}, "did you mean 'sink_length'"),
    ],
)
def test_mistakes_are_named(model, length, options, message):
    with pytest.raises(ValueError, match=message):
        by_layer.choose_by_layer(model, tokens(1, length), options=options)
