"""Static INT8: its rounding, its file, and caches that store it."""

from types import SimpleNamespace

import pytest
import torch

from modules.codecs import static
from modules.codecs.static import ChannelScales, StaticParameters


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


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "made.safetensors"
    parameters().save(path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(static.os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        parameters(skip=()).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["made.safetensors"]


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    path = tmp_path / "made.safetensors"
    with pytest.raises(ValueError, match="cannot be read"):
        StaticParameters.load(path)
    parameters().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        StaticParameters.load(path)
    path.write_bytes(static.save({"weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="not one of static parameters"):
        StaticParameters.load(path)
    about = {"format": static.FORMAT, "version": "9"}
    path.write_bytes(static.save({"weight": torch.zeros(2)}, about))
    with pytest.raises(ValueError, match="version '9'"):
        StaticParameters.load(path)
    about["version"] = str(static.FORMAT_VERSION)
    path.write_bytes(static.save({"weight": torch.zeros(2)}, about))
    with pytest.raises(ValueError, match="damaged"):
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
