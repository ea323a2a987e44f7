"""Static INT8: its rounding, its file, and caches that store it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import make_pair, relative_error, tokens
from transformers import DynamicCache, MistralConfig

import modules.models.attention  # noqa: F401 - registers "kivi"
from modules.codecs import static
from modules.codecs.static import ChannelScales, StaticParameters, model_facts
from modules.files import write_checked
from modules.kivi_cache_general import KIVICache, StaticInt8Cache, print_kivi_stats
from modules.options import KIVIOptions


def ranges(heads: int = 2, head_dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(200, heads, head_dim, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return states.amin(0), states.amax(0)


def parameters(layers: int = 3, skip: tuple[int, ...] = (0,)) -> StaticParameters:
    chosen = [index for index in range(layers) if index not in skip]
    seen = {index: (*ranges(seed=2 * index), *ranges(seed=2 * index + 1)) for index in chosen}
    return StaticParameters(
        layers={
            index: (ChannelScales.from_range(*r[:2], True), ChannelScales.from_range(*r[2:], False))
            for index, r in seen.items()
        },
        model={"model_type": "llama", "num_hidden_layers": layers, "num_key_value_heads": 2, "head_dim": 16},
        spec={"include": ["*"]},
        ranges=seen,
        tokens=200,
    )


def config(**changed) -> SimpleNamespace:
    facts = dict(
        model_type="llama_kivi", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64
    )
    made = SimpleNamespace(**{**facts, **changed})
    made.get_text_config = lambda decoder: made
    return made


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_lies_in_the_range_is_off_by_half_a_step_at_most(symmetric):
    low, high = ranges()
    scales = ChannelScales.from_range(low, high, symmetric)
    share = torch.linspace(0, 1, 301).view(1, -1, 1)
    states = (low.unsqueeze(1) + share * (high - low).unsqueeze(1)).unsqueeze(0)
    codes = scales.encode(states)
    assert codes.dtype == torch.int8 and codes.shape == states.shape
    assert codes.abs().max() == 126
    assert scales.saturated(codes) == 0
    error = (scales.decode(codes, torch.float32) - states).abs()
    assert (error <= scales.scale.unsqueeze(1) * 0.5001).all()
    assert torch.equal(scales.round(states), scales.decode(codes, torch.float32))


def test_what_lies_beyond_saturates():
    scales = ChannelScales.from_range(torch.tensor([[-1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), False)
    states = torch.tensor([[[[-5.0, 1.0], [2.001, 0.0], [-1.0, 0.0]]]])
    codes = scales.encode(states)
    assert codes.tolist() == [[[[-127, 127], [126, 0], [-126, 0]]]]
    assert scales.saturated(codes) == 2
    assert scales.round(states)[0, 0, 0].tolist() == pytest.approx([-1, 0], abs=0.02)
    beyond = torch.full((1, 2, 1, 16), torch.inf)
    assert ChannelScales.from_range(*ranges(), True).enter(beyond).isnan().all()


def test_long_states_are_rounded_in_slices(monkeypatch):
    scales = ChannelScales.from_range(*ranges(), True)
    states = torch.randn(2, 2, 50, 16, generator=torch.Generator().manual_seed(1))
    whole = scales.round(states)
    monkeypatch.setattr(static, "_SLICE_ELEMENTS", 2 * 2 * 16 * 7)
    assert torch.equal(scales.round(states), whole)


@pytest.mark.parametrize(
    "low, high, message",
    [
        ([[1.0]], [[0.0]], "not below"),
        ([[float("nan")]], [[0.0]], "NaN"),
        ([[float("inf")]], [[float("-inf")]], "at least one token"),
        ([[0.0]], [[0.0, 1.0]], "both alike"),
    ],
)
def test_a_range_that_is_none_is_refused(low, high, message):
    with pytest.raises(ValueError, match=message):
        ChannelScales.from_range(torch.tensor(low), torch.tensor(high), True)


def test_parameters_come_back_from_their_file(tmp_path):
    given = parameters()
    given.save(tmp_path / "made.safetensors")
    found = StaticParameters.load(tmp_path / "made.safetensors")
    assert list(found.layers) == [1, 2]
    assert (found.model, found.spec, found.tokens) == (given.model, given.spec, given.tokens)
    for index in given.layers:
        for old, new in zip(given.layers[index], found.layers[index]):
            assert torch.equal(old.scale, new.scale) and torch.equal(old.offset, new.offset)
        assert all(torch.equal(old, new) for old, new in zip(given.ranges[index], found.ranges[index]))


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    path = tmp_path / "made.safetensors"
    with pytest.raises(ValueError, match="no file"):
        StaticParameters.load(path)
    parameters().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or altered"):
        StaticParameters.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="was altered"):
        StaticParameters.load(path)
    write_checked(path, "something else", {"weight": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="is not a file of static INT8 parameters"):
        StaticParameters.load(path)
    write_checked(path, static.KIND, {"weight": torch.zeros(2)}, {"version": "9"})
    with pytest.raises(ValueError, match="has version 9"):
        StaticParameters.load(path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4 in the model and 3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"head_dim": 32}, "head_dim is 32 in the model and 16"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    ],
)
def test_a_model_that_does_not_fit_is_told_what_differs(changed, message):
    parameters().check_fits(config())
    with pytest.raises(ValueError, match=message):
        parameters().check_fits(config(**changed))


# --- caches -----------------------------------------------------------------------------------------------------------


class FakeQuantized(DynamicCache):
    """Rounds what it is given, and keeps it in full precision: what a static cache must equal."""

    def __init__(self, config, parameters: StaticParameters) -> None:
        super().__init__(config=config)
        self.parameters = parameters

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        sides = (key_states, value_states)
        if layer_idx in self.parameters.layers:
            sides = tuple(scales.round(side) for scales, side in zip(self.parameters.layers[layer_idx], sides))
        return super().update(*sides, layer_idx, *args, **kwargs)


def calibrated(model, symmetric: bool = True, skip: tuple[int, ...] = (0,)) -> StaticParameters:
    """Parameters from the states that a stock model gives for a few random tokens."""
    cache, ids = DynamicCache(config=model.config), tokens(4, 40, seed=9)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    seen = {
        index: tuple(end for t in (layer.keys, layer.values) for end in (t.amin((0, 2)), t.amax((0, 2))))
        for index, layer in enumerate(cache.layers)
        if index not in skip
    }
    layers = {
        index: (ChannelScales.from_range(*r[:2], symmetric), ChannelScales.from_range(*r[2:], symmetric))
        for index, r in seen.items()
    }
    return StaticParameters(layers, model_facts(model.config), {}, seen, ids.numel())


def logits_of(model, cache, ids, pieces, mask=None):
    """Of all tokens, fed in `pieces`."""
    out, start = [], 0
    with torch.no_grad():
        for size in pieces:
            more = {} if mask is None else {"attention_mask": mask[:, : start + size]}
            if mask is not None:
                more["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start : start + size]
            out.append(model(ids[:, start : start + size], past_key_values=cache, **more).logits)
            start += size
    return torch.cat(out, dim=1)


PIECES = (40, 1, 1, 13, 1, 30, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_cache_gives_the_logits_of_fake_quantization(each_pair, symmetric):
    """Prompt, single tokens and several at once; over codes, and in a stock model over decoded states and over codes."""
    stock, kivi = each_pair
    parameters, ids = calibrated(stock, symmetric), tokens(2, sum(PIECES), 1)
    expected = logits_of(stock, FakeQuantized(stock.config, parameters), ids, PIECES)
    assert relative_error(logits_of(stock, DynamicCache(), ids, PIECES), expected) > 1e-4
    cache = kivi.create_kivi_cache(static=parameters, backend="torch")
    assert relative_error(logits_of(kivi, cache, ids, PIECES), expected) < 1e-3
    rebuilt = StaticInt8Cache(stock.config, parameters, backend="torch")
    assert relative_error(logits_of(stock, rebuilt, ids, PIECES), expected) < 1e-3
    stock.set_attn_implementation("kivi")
    over_codes = StaticInt8Cache(stock.config, parameters, backend="torch")
    assert relative_error(logits_of(stock, over_codes, ids, PIECES), expected) < 1e-3
    assert cache.layers[1].store.key.codes.dtype == torch.int8
    assert cache.layers[0].store.key.codes.dtype == torch.float32
    kinds = {"prompt": (sum(PIECES),), "pieces": PIECES}
    cache = {name: kivi.create_kivi_cache(static=parameters, backend="torch") for name in kinds}
    whole, cut = (logits_of(kivi, cache[name], ids, pieces) for name, pieces in kinds.items())
    assert relative_error(cut, whole) < 1e-3


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_padded_batch_and_chunks(pair, backend):
    stock, kivi = pair
    parameters, ids = calibrated(stock, symmetric=False), tokens(3, sum(PIECES), 1)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :23] = 0, 0
    expected = logits_of(stock, FakeQuantized(stock.config, parameters), ids, PIECES, mask)
    kivi.prefill_chunk = 16
    cache = kivi.create_kivi_cache(static=parameters, backend=backend)
    found = logits_of(kivi, cache, ids, PIECES, mask)
    assert relative_error(found[mask.bool()], expected[mask.bool()]) < 1e-3
    assert cache.get_cache_info()["tokens"]["lengths"] == [87, 80, 64]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_bfloat16_on_the_cpu(pair, backend):
    """As close to fake quantization as rounding states to the dtype allows."""
    stock, kivi = (model.bfloat16() for model in pair)
    parameters, ids = calibrated(stock, skip=()), tokens(2, sum(PIECES), 1)
    expected = logits_of(stock, FakeQuantized(stock.config, parameters), ids, PIECES)
    cache = kivi.create_kivi_cache(static=parameters, backend=backend)
    assert relative_error(logits_of(kivi, cache, ids, PIECES), expected) < 2e-2


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_generating_is_as_with_fake_quantization(pair, how):
    """Greedily, by beams, and with drafts that are taken back; then another turn over what is stored."""
    stock, kivi = pair
    parameters = calibrated(stock)
    batch = 1 if "prompt_lookup_num_tokens" in how else 2
    ids = tokens(1, 12, 3).repeat(batch, 3)
    fake, real = FakeQuantized(stock.config, parameters), kivi.create_kivi_cache(static=parameters, backend="torch")
    for _ in range(1 if "num_beams" in how else 2):
        expected, found = (
            model.generate(
                ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                **(how if model is kivi or "num_beams" in how else {}),
            )
            for model, cache in ((stock, fake), (kivi, real))
        )  # fmt: skip
        assert torch.equal(found, expected)
        ids = torch.cat([expected, tokens(batch, 5, 4)], dim=1)


def test_what_is_stored_takes_half_of_float16(pair):
    stock, _ = pair
    cache = StaticInt8Cache(stock.config, calibrated(stock, skip=()), backend="torch")
    for length in (4000, *[1] * 96):
        states = [torch.zeros(1, 2, length, 32, dtype=torch.float16) for _ in "kv"]
        for index in range(3):
            cache.update(*states, index)
    size = cache.get_cache_info()["bytes"]
    assert cache.get_seq_length() == 4096 and size["dense"] == 3 * 2 * 2 * 4096 * 32 * 2
    assert size["total"] <= 0.51 * size["dense"]
    assert size["metadata"] == 0
    print_kivi_stats(cache)


def test_values_beyond_the_range_are_counted():
    """Of what is stored alone: padding does not count, nor what was cropped or failed."""
    stock, kivi = make_pair("llama")
    parameters = calibrated(stock)
    ids, mask = tokens(2, 30, 5), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    fake, cache = DynamicCache(config=stock.config), kivi.create_kivi_cache(static=parameters, backend="torch")
    for model, into in ((stock, fake), (kivi, cache)):
        logits_of(model, into, ids, (30,), mask)

    def beyond(layer: int, side: int, columns: int) -> int:
        scales = parameters.layers[layer][side]
        states = (cache.layers[layer].dense(cache.layers[layer].store.sides[side]))[:, :, :columns]
        return int((scales.encode(states).abs() == 127)[mask[:, None, :columns].bool().expand(-1, 2, -1)].sum())

    for columns in (30, 21):
        cache.crop(columns)
        keys, values = (sum(beyond(layer, side, columns) for layer in (1, 2)) for side in range(2))
        assert cache.get_cache_info()["saturated"] == {"keys": keys, "values": values, "total": keys + values}
        assert keys and values
    before = cache.get_cache_info()["saturated"]
    with pytest.raises(ValueError, match="reach nan"), torch.no_grad():
        kivi(inputs_embeds=torch.full((2, 1, 96), torch.inf), past_key_values=cache)
    assert cache.get_cache_info()["saturated"] == before
    first = parameters.layers[1][0]
    low, high = parameters.ranges[1][:2]
    assert not ChannelScales.saturated(first.encode(torch.stack([low, high], dim=1)))
    assert "saturated" not in kivi.create_kivi_cache().get_cache_info()


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_states_that_are_not_finite_are_refused(pair, backend, number):
    stock, _ = pair
    cache = StaticInt8Cache(stock.config, calibrated(stock, skip=()), backend=backend)
    for length in (1, 20):  # an empty cache, then one that holds tokens
        good = [torch.ones(1, 2, 20, 32) for _ in "kv"]
        bad = [torch.ones(1, 2, length, 32) for _ in "kv"]
        bad[0][0, 1, -1, 3] = number
        stored = cache.get_seq_length()
        with pytest.raises(ValueError, match="layer 0: keys reach (nan|inf)"):
            cache.update(*bad, 0)
        step = cache.new_step(None, 1, length)
        if stored:
            with pytest.raises(ValueError, match="keys reach (nan|inf)"), cache.step(step, over_codes=True):
                cache.attend(torch.ones(1, 6, length, 32), *bad, cache.layers[0], 0.1, step)
        assert cache.get_seq_length() == stored
        for index in range(3):
            cache.update(*good, index)


def test_the_file_of_a_config(pair, tmp_path):
    """Given by its path it is used wherever a cache is made, and stays with the checkpoint."""
    stock, kivi = pair
    path = str(tmp_path / "int8.safetensors")
    calibrated(stock).save(path)
    kivi.save_pretrained(tmp_path / "model")
    model = type(kivi).from_pretrained(tmp_path / "model", static=path, use_kivi_cache=True)
    model.save_pretrained(tmp_path / "again")
    model = type(kivi).from_pretrained(tmp_path / "again")
    assert model.static == path
    out = model(tokens(1, 9))
    assert out.past_key_values.static is not None
    assert model.create_kivi_cache(static=False).static is None
    assert KIVICache(model.config).get_cache_info()["options"]["k_bits"] == [16, 8, 8]
    assert "static" in repr(out.past_key_values)
    with pytest.raises(ValueError, match="k_bits cannot go with static"):
        model.create_kivi_cache(k_bits=4)
    assert model.create_kivi_cache(k_bits=4, static=False).options.k_bits == 4
    with pytest.raises(ValueError, match="path of a file"):
        type(kivi).from_pretrained(tmp_path / "model", static=calibrated(stock))
    model.static = None
    assert model.create_kivi_cache().static is None


def test_what_does_not_fit_is_refused_at_once(pair):
    stock, kivi = pair
    given = calibrated(stock)
    for options in ({"group_size": 32}, {"use_kivi": False}, {"options": KIVIOptions()}):
        with pytest.raises(ValueError, match="cannot go with static parameters"):
            KIVICache(stock.config, static=given, **options)
    with pytest.raises(ValueError, match="did you mean 'backend'"):
        KIVICache(stock.config, static=given, backends="torch")
    with pytest.raises(ValueError, match="must be calibrated parameters"):
        KIVICache(stock.config, static=8)
    with pytest.raises(ValueError, match="there is no file"):
        kivi.create_kivi_cache(static="nowhere.safetensors")
    with pytest.raises(ValueError, match="need the model's config"):
        KIVICache(static=given)
    other = dataclasses.replace(given, model={**given.model, "head_dim": 64})
    with pytest.raises(ValueError, match="head_dim is 32 in the model and 64"):
        kivi.create_kivi_cache(static=other)
    sliding = MistralConfig(
        num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=32, sliding_window=16
    )
    slides = dataclasses.replace(given, model=model_facts(sliding))
    with pytest.raises(ValueError, match="exclude them"):
        KIVICache(sliding, static=slides)
