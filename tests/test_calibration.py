"""Static INT8 calibration: the YAML, what is observed of which layers, fake quantization, and what is refused."""

import json

import pytest
import torch
from conftest import FAMILIES, make_pair, real_model_path, relative_error, tokens
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BatchEncoding, DynamicCache, PreTrainedTokenizerFast

from modules.calibration import (
    ChannelScales,
    DynamicCacheQuantizer,
    FakeQuantDynamicCache,
    FakeQuantizedCache,
    StaticParameters,
    calibrate,
    deploy,
    load_spec,
)
from modules.calibration import __main__ as command
from modules.calibration.calibrate import spread
from modules.evaluation import int8
from modules.evaluation.candidates import fake_static, static
from modules.evaluation.plan import Int8Step
from modules.evaluation.quality import measure_quality
from modules.evaluation.results import save_result
from modules.evaluation.texts import encode, load_text, pieces
from modules.kivi_cache_general import KIVICache, StaticInt8Cache
from modules.models.families import load_any

ALL = [{"type": "dynamic_cache", "qconfig": {}}]
EXAMPLE = """
spec:
  process:
    - type: "dynamic_cache"
      qconfig:
        scope: "per_channel"    # 量化粒度：仅支持per_channel。
        dtype: "int8"          # 量化数据类型，目前支持int8。
        symmetric: true        # 是否使用对称量化，默认True。
        method: "minmax"       # 量化方法，目前支持minmax。
      include: [ "*" ]           # 包含的注意力层。
      exclude: [ "model.layers.0.self_attn" ] # 排除的注意力层。
"""
BARE = """
- type: "dynamic_cache" # 固定为 `dynamic_cache`，用于指定 Processor。
  qconfig: # 量化配置，支持 per_channel 量化
    scope: "per_channel" # 量化粒度：仅支持per_channel
    dtype: "int8" # 量化数据类型，目前支持 int8
    symmetric: True # 对称量化，默认 True
    method: "minmax" # 量化方法，目前支持 minmax
  include: # 字符串列表，参与量化的 attention 匹配模式（完整路径，支持 `*` 通配），默认全量。
    - "*"
  exclude: # 字符串列表，禁止量化的 attention 匹配模式（完整路径，支持 `*` 通配），默认为空。
    - "model.layers.0.self_attn"
"""
PATHS = [f"model.layers.{index}.self_attn" for index in range(12)]


def entry(**changes) -> dict:
    return {**ALL[0], **changes}


def run(model, spec, batches, **kwargs) -> StaticParameters:
    return calibrate(model, spec, batches, progress=False, **kwargs)


def same(one: StaticParameters, other: StaticParameters) -> bool:
    """To the last bit."""
    assert list(one.layers) == list(other.layers)
    pairs = [
        (a, b)
        for index in one.layers
        for mine, theirs in zip(one.layers[index], other.layers[index])
        for a, b in ((mine.scale, theirs.scale), (mine.offset, theirs.offset))
    ]
    pairs += [pair for index in one.ranges for pair in zip(one.ranges[index], other.ranges[index])]
    return all(torch.equal(a, b) for a, b in pairs) and one.tokens == other.tokens


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def llama():
    return make_pair("llama")[0]


# --- the spec ------------------------------------------------------------------


@pytest.mark.parametrize("text", [EXAMPLE, BARE])
def test_the_documents_yaml_is_read_as_it_stands(tmp_path, text):
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    spec = load_spec(path)
    (process,) = spec.process
    assert process.type == "dynamic_cache" and process.exclude == ["model.layers.0.self_attn"]
    assert process.qconfig.model_dump() == {
        "scope": "per_channel",
        "dtype": "int8",
        "symmetric": True,
        "method": "minmax",
    }
    assert list(spec.choose(PATHS)) == PATHS[1:]
    assert load_spec(spec.as_data()) == spec == load_spec(str(path)) == load_spec(spec)


def test_defaults_are_those_of_the_document():
    (process,) = load_spec(ALL).process
    assert process.model_dump() == {
        "type": "dynamic_cache",
        "qconfig": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
        "include": ["*"],
        "exclude": [],
    }
    assert load_spec(ALL[0]) == load_spec({"spec": {"process": ALL}}) == load_spec(ALL)


def test_globs_are_over_whole_paths_and_exclude_wins():
    spec = load_spec(entry(include=["*layers.1*", PATHS[3]], exclude=["*.11.*"]))
    assert list(spec.choose(PATHS)) == [PATHS[1], PATHS[3], PATHS[10]]


def test_entries_add_their_layers():
    first = entry(include=["*"], exclude=[PATHS[0], PATHS[1]])
    second = entry(qconfig={"symmetric": False}, include=[PATHS[0]])
    chosen = load_spec([first, second]).choose(PATHS)
    assert list(chosen) == [PATHS[0], *PATHS[2:]]
    assert [config.symmetric for config in chosen.values()] == [False] + [True] * 10
    assert list(load_spec([first, first]).choose(PATHS)) == PATHS[2:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"spec": {"process": [entry(qconfig={"dtype": "int4"})]}}, r"spec.process\[0\].qconfig.dtype must be 'int8'"),
        (
            {"spec": {"process": [*ALL, entry(qconfig={"scope": 1})]}},
            r"process\[1\].qconfig.scope must be 'per_channel'",
        ),
        ([entry(qconfig={"method": "mse"})], r"^\[0\].qconfig.method must be 'minmax'; got 'mse'"),
        (entry(qconfig={"symmetric": "yes"}), r"^qconfig.symmetric must be true or false; got 'yes'"),
        (
            entry(qconfig={"symetric": True}),
            r"qconfig.symetric is not known \(did you mean 'symmetric'\?\); allowed here",
        ),
        (entry(includes=["*"]), r"^includes is not known .*type, qconfig, include, exclude"),
        ({"spec": {"process": ALL}, "save": 1}, "^save is not known; allowed here: spec"),
        ({"spec": {"process": ALL, "x": 1}}, "^spec.x is not known; allowed here: process"),
        ({"spec": {}}, "spec.process is missing"),
        ({"spec": None}, "spec must be a mapping; got None"),
        ({"spec": {"process": []}}, "spec.process must not be empty"),
        ({"spec": {"process": ALL[0]}}, "spec.process must be a list"),
        ({"type": "dynamic_cache"}, "qconfig is missing"),
        (entry(type="linear_quant"), "type must be 'dynamic_cache'; got 'linear_quant'"),
        (entry(qconfig=None), "qconfig must be a mapping"),
        (entry(include=[]), "include must not be empty"),
        (entry(include="*"), r"include must be a list; got '\*'"),
        (entry(exclude=[3]), r"exclude\[0\] must be a string; got 3"),
        (["dynamic_cache"], r"^\[0\] must be a mapping"),
        ({"process": ALL}, "a spec is a mapping with the key 'spec'"),
        (None, "got None"),
    ],
)
def test_mistakes_name_the_path_of_the_key(data, message):
    with pytest.raises(ValueError, match=message):
        load_spec(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"include": [PATHS[0], "*mlp*"]},
            r"spec.process\[0\].include\[1\] is '\*mlp\*', which matches no attention module",
        ),
        ({"exclude": ["model.layers.0"]}, r"exclude\[0\] is 'model.layers.0', .*model.layers.0.self_attn.* and 8 more"),
        ({"exclude": ["*"]}, "leaves no layer to quantize"),
    ],
)
def test_patterns_that_choose_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        load_spec(entry(**changes)).choose(PATHS)


def test_entries_that_differ_on_a_layer():
    with pytest.raises(ValueError, match=r"process\[1\].qconfig and spec.process\[0\].qconfig differ.*layers.0"):
        load_spec([*ALL, entry(qconfig={"symmetric": False}, include=[PATHS[0]])]).choose(PATHS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec: [", "no YAML"),
        ("- type: dynamic_cache\n  qconfig: {}\n  include:\n    - *\n", r'Patterns need quotes: include: \["\*"\]'),
        ("- type: dynamic_cache\n  qconfig: {}\n  exclude: []\n  exclude: ['*']\n", "'exclude' stands twice"),
        ("- !!python/object/apply:os.getcwd []\n", "no YAML"),
        ("", "got None"),
        (
            "spec:\n  process:\n  - {type: dynamic_cache, qconfig: {dtype: fp8}}\n",
            r"s.yaml: spec.process\[0\].qconfig.dtype",
        ),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_spec(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("- größe".encode("latin-1"))
    with pytest.raises(ValueError, match="no UTF-8"):
        load_spec(tmp_path / "latin.yaml")


# --- what is observed ----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["stock", "KIVI"])
def test_ranges_are_those_of_the_states_in_the_cache(family, kind):
    """Of a `DynamicCache` that the same tokens went through, of the KIVI classes as of the stock ones."""
    model = make_pair(family)[kind == "KIVI"]
    ids = tokens(3, 40)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    parameters = run(model, ALL, [ids], context=0)
    assert list(parameters.layers) == [0, 1, 2] and parameters.tokens == 120
    for index, ranges in parameters.ranges.items():
        layer = cache.layers[index]
        expected = [
            bound for states in (layer.keys, layer.values) for bound in (states.amin((0, 2)), states.amax((0, 2)))
        ]
        for bound, other in zip(ranges, expected):
            torch.testing.assert_close(bound, other, rtol=1e-4, atol=1e-5)
        for scales, (low, high) in zip(parameters.layers[index], (ranges[:2], ranges[2:])):
            assert torch.equal(scales.scale, ChannelScales.from_range(low, high, True).scale)
    assert parameters.model["model_type"] == family and parameters.spec == load_spec(ALL).as_data()


def test_one_batch_or_ten_in_any_order_padded_or_not(llama):
    texts = [tokens(1, length, seed) for seed, length in enumerate((30, 44, 44, 7, 51, 30, 9, 44, 12, 60))]
    width = max(text.shape[1] for text in texts)

    def padded(rows: list[torch.Tensor], left: bool) -> dict:
        def pad(row: torch.Tensor) -> torch.Tensor:
            missing = width - row.shape[1]
            return nn.functional.pad(row, (missing, 0) if left else (0, missing))

        return {
            "input_ids": torch.cat([pad(row) for row in rows]),
            "attention_mask": torch.cat([pad(torch.ones_like(row)) for row in rows]),
        }

    expected = run(llama, ALL, texts)
    for batches in (
        texts[::-1],
        [padded(texts, left=True)],
        (padded(part, left=False) for part in (texts[7:], texts[:7])),
    ):
        assert same(run(llama, ALL, batches), expected)
    assert not same(run(llama, ALL, texts[:5]), expected)


def test_batches_of_a_tokenizer(llama):
    ids = tokens(2, 20)
    batch = BatchEncoding({"input_ids": ids, "token_type_ids": ids * 0, "attention_mask": torch.ones_like(ids)})
    assert same(run(llama, ALL, [batch]), run(llama, ALL, [ids]))


def test_asymmetric_ranges_and_layers_left_out(llama):
    symmetric = run(llama, ALL, [tokens(2, 40)])
    spec = [entry(qconfig={"symmetric": False}, include=["*.1.*", "*.2.*"], exclude=["model.layers.1.self_attn"])]
    parameters = run(llama, spec, [tokens(2, 40)])
    assert list(parameters.layers) == [2] == list(parameters.ranges)
    for one, other in zip(parameters.layers[2], symmetric.layers[2]):
        assert not other.offset.any() and one.offset.any() and (one.scale <= other.scale).all()


class Recorder:
    """A cache of no library: states by layer, in an `update` that calls another cache's and its own."""

    def __init__(self, depth: int = 1) -> None:
        self.inner, self.depth, self.calls = DynamicCache(), depth, 0

    def update(self, key_states, value_states, layer_idx):
        self.calls += 1
        if self.depth:
            self.depth -= 1
            states = self.update(key_states * 1, value_states * 1, layer_idx=layer_idx)
            self.depth += 1
            return states
        return self.inner.update(key_states, value_states, layer_idx)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_custom_cache_whose_update_calls_others_is_observed_once(llama, depth, monkeypatch):
    seen = []
    observe = DynamicCacheQuantizer.observe
    monkeypatch.setattr(DynamicCacheQuantizer, "observe", lambda self, x: (seen.append(x.shape), observe(self, x)))
    caches = []

    def make() -> Recorder:
        caches.append(Recorder(depth))
        return caches[-1]

    parameters = run(llama, ALL, [tokens(2, 20)], make_cache=make)
    assert len(caches) == 2 and all(cache.calls == 3 * (depth + 1) for cache in caches)
    assert seen == [(1, 2, 20, 32)] * 12  # keys and values of 3 layers, two sequences
    assert same(parameters, run(llama, ALL, [tokens(2, 20)]))


class Attention(nn.Module):
    def __init__(self, layer_idx: int, calls: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.projection, self.calls = nn.Linear(8, 8), calls
        self.layer_idx = 0 if shared else layer_idx

    def forward(self, x: torch.Tensor, cache=None) -> torch.Tensor:
        states = self.projection(x).unflatten(-1, (2, 4)).transpose(1, 2)
        if cache is not None and self.calls:
            states, _ = cache.update(states, states, self.layer_idx)
        return x + states.transpose(1, 2).flatten(2)


class Toy(nn.Module):
    """A decoder of no library, which makes its own cache and passes it by position."""

    def __init__(self, cache=DynamicCache, passes: bool = True, **options) -> None:
        super().__init__()
        self.config = make_pair("llama")[0].config
        self.embedding = nn.Embedding(131, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention(i, **options)}) for i in range(2))
        self.cache, self.passes = cache, passes

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x, cache = self.embedding(input_ids), self.cache()
        for layer in self.layers:
            x = layer["self_attn"](x, *([cache] if self.passes else []))
        return x


class KeepsNothing:
    """No `update`."""


class GivesNothing:
    def update(self, key_states, value_states, layer_idx):
        return None


def test_a_model_of_no_library():
    parameters = run(Toy(), {"spec": {"process": [entry(exclude=["layers.0.self_attn"])]}}, [tokens(1, 5)])
    assert list(parameters.layers) == [1] and parameters.layers[1][0].scale.shape == (2, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Toy(passes=False),
            "never updated by 2 of 2 attention modules: layers.0.self_attn was handed no cache.*calls update",
        ),
        (Toy(calls=False), "was handed a cache and did not call its update.*or exclude the layer"),
        (
            Toy(cache=KeepsNothing),
            r"handed a KeepsNothing as cache, which has no update\(\).*key_states, value_states, layer_idx",
        ),
        (Toy(cache=dict), "handed a dict as cache"),
        (Toy(cache=GivesNothing), "returned NoneType, not a pair of keys and values"),
        (Toy(shared=True), "layers.0.self_attn and layers.1.self_attn both update the layer 0"),
        (nn.Linear(2, 2), r"no attention module: none of its modules is named \*self_attn\*"),
    ],
)
def test_caches_that_are_not_updated_say_what_to_do(model, message):
    with pytest.raises(ValueError, match=message):
        run(model, ALL, [tokens(1, 5)])
    assert not hooks(model)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches"),
        ([torch.zeros(0, 8, dtype=torch.long)], "batch 0 has no token"),
        ([tokens(1, 4), torch.zeros(2, 0, dtype=torch.long)], "batch 1 has no token"),
        ([{"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4)}], "batch 0 has no token.*all are padding"),
        ([{"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 5)}], r"attention_mask of batch 0.*\(1, 4\)"),
        ([{"ids": tokens(1, 4)}], "mapping with input_ids.*got the keys ids"),
        ([{"input_ids": tokens(1, 4), "labels": tokens(1, 4)}], "got the keys input_ids, labels"),
        ([tokens(1, 4)[0]], r"batch 0 must be ids \[batch, tokens\].*\(4,\)"),
        ([torch.rand(1, 4)], "whole numbers"),
        (["a text"], 'return_tensors="pt"'),
        (tokens(2, 4), "Put it in a list"),
        ({"input_ids": tokens(1, 4)}, "Put it in a list"),
    ],
)
def test_batches_that_hold_no_tokens(llama, batches, message):
    with pytest.raises(ValueError, match=message):
        run(llama, ALL, batches)
    assert not hooks(llama)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite(bad):
    model = make_pair("llama")[0]
    model.model.layers[1].self_attn.v_proj.weight.data[3, 5] = bad
    with pytest.raises(ValueError, match="the values of model.layers.1.self_attn: states must be finite"):
        run(model, ALL, [tokens(1, 8)])
    assert not hooks(model)


def test_an_interruption_leaves_the_model_as_it_was(llama):
    def interrupted():
        assert hooks(llama) == 3
        raise KeyboardInterrupt

    before = llama(tokens(1, 8)).logits
    llama.train()
    with pytest.raises(KeyboardInterrupt):
        run(llama, ALL, [tokens(1, 8)], make_cache=interrupted)
    assert llama.training and not hooks(llama)
    assert torch.equal(llama.eval()(tokens(1, 8)).logits, before)


def test_texts_are_spread_over_the_context():
    """Keys of all positions are within the range, those of slow channels too; values do not know positions."""
    model = make_pair("qwen2")[0]  # its biases give every key a direction, which positions turn
    texts, other = [tokens(1, 40, seed) for seed in range(8)], tokens(1, 600)
    assert [first for _, first in spread(texts, 740)] == [0, 100, 200, 300, 400, 500, 600, 700]
    assert [first for _, first in spread(texts[:1], 740)] == [0] and {first for _, first in spread(texts, 0)} == {0}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(other, past_key_values=cache)
    near, far = (run(model, ALL, texts, context=context) for context in (0, 740))
    assert same(run(model, ALL, texts), run(model, ALL, texts, context=2048))

    def beyond(parameters: StaticParameters) -> int:
        counts = [
            parameters.layers[i][0].saturated(parameters.layers[i][0].encode(cache.layers[i].keys)) for i in range(3)
        ]
        return int(sum(counts))

    assert beyond(near) > 3 * beyond(far) > 0
    for index in range(3):
        for one, two in zip(near.ranges[index][2:], far.ranges[index][2:]):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="context"):
        run(model, ALL, texts, context=-1)


# --- the quantizers ------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_quantizers_of_the_document(symmetric):
    """As its code: heads and channels side by side, one range each, over all tokens that have been seen."""
    x = torch.randn(2, 3, 5, 4) * torch.logspace(-2, 1, 12).view(3, 1, 4) + 0.3
    quantizer = DynamicCacheQuantizer(symmetric)
    first = quantizer(x)
    channels = x.transpose(-2, -3).reshape(-1, 12)
    assert torch.equal(quantizer.low.flatten(), channels.amin(0)) and torch.equal(
        quantizer.high.flatten(), channels.amax(0)
    )
    assert first.shape == x.shape and 0 < relative_error(first, x) < 0.01

    low, high = channels.amin(0), channels.amax(0)
    scale = torch.maximum(-low, high) / 126 if symmetric else (high - low) / 252  # 127 is for what lies beyond
    zero = torch.zeros(12) if symmetric else (low + high) / 2
    expected = ((channels - zero) / scale).round() * scale + zero
    torch.testing.assert_close(first.transpose(-2, -3).reshape(-1, 12), expected)
    fixed = FakeQuantDynamicCache(quantizer.scales())
    assert torch.equal(fixed(x), first) and torch.equal(fixed(x), quantizer.scales().round(x))

    quantizer(2 * x)
    assert torch.equal(quantizer.high.flatten(), torch.maximum(high, 2 * high))
    wide = fixed(10 * x)  # beyond the range: saturates
    assert (wide.abs().amax((0, 2)).flatten() <= 127 * scale + zero.abs() + 1e-5).all()
    assert fixed(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert not fixed(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.zeros(1, 2, 0, 4), "of one token at least"),
        (torch.zeros(2, 3, 4), r"\[batch, heads, tokens, head_dim\]"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.long), "floating point"),
        (torch.full((1, 2, 3, 4), float("nan")), "must be finite"),
        (torch.zeros(1, 3, 3, 4), r"\(2, 4\) so far; now \(3, 4\)"),
    ],
)
def test_states_that_a_quantizer_refuses(states, message):
    quantizer = DynamicCacheQuantizer()
    with pytest.raises(ValueError, match="nothing was observed"):
        quantizer.scales()
    quantizer.observe(torch.ones(1, 2, 3, 4))
    with pytest.raises(ValueError, match=message):
        quantizer.observe(states)
    assert quantizer.high.eq(1).all()


# --- deployment ----------------------------------------------------------------


def decode(model, ids, cache) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([40, 1, 1, 9], dim=1)], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["stock", "KIVI"])
def test_a_deployed_model_keeps_rounded_states(family, kind):
    model = make_pair(family)[kind == "KIVI"]
    parameters = run(model, [entry(exclude=["model.layers.0.self_attn"])], [tokens(4, 51, seed=1)])
    ids, plain, kept = tokens(2, 51), DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = decode(model, ids, plain)
    with deploy(model, parameters) as deployed:
        logits = decode(model, ids, kept)
    assert not hooks(model) and deployed.got_cache == set(PATHS[:3])
    assert 1e-5 < relative_error(logits, expected) < 0.05
    assert torch.equal(decode(model, ids, DynamicCache(config=model.config)), expected)  # gone again

    assert torch.equal(kept.layers[0].keys, plain.layers[0].keys)  # left out by the spec
    for scales, states, exact in zip(
        parameters.layers[1],
        (kept.layers[1].keys, kept.layers[1].values),
        (plain.layers[1].keys, plain.layers[1].values),
    ):
        assert torch.equal(states, scales.round(exact))  # layer 0 gives it the same input
        assert not torch.equal(states, exact)
    assert torch.equal(decode(model, ids, FakeQuantizedCache(model.config, parameters)), logits)


def test_deployment_by_file_and_by_hand(llama, tmp_path):
    parameters = run(llama, ALL, [tokens(2, 30)])
    parameters.save(tmp_path / "int8.safetensors")
    ids = tokens(1, 51)
    expected = decode(llama, ids, FakeQuantizedCache(llama.config, parameters))
    deployed = deploy(llama, tmp_path / "int8.safetensors")
    assert torch.equal(decode(llama, ids, Recorder(depth=0)), expected)
    generated = llama.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    deployed.remove()
    assert type(generated.past_key_values) is DynamicCache
    layer = generated.past_key_values.layers[0]
    assert torch.equal(layer.keys, parameters.layers[0][0].round(layer.keys))
    assert same(StaticParameters.load(tmp_path / "int8.safetensors"), parameters)


def test_parameters_of_another_model_are_refused(llama):
    parameters = run(llama, ALL, [tokens(1, 30)])
    other = make_pair("qwen3")[0]
    with pytest.raises(ValueError, match="model_type is 'qwen3'.*head_dim is 64"):
        deploy(other, parameters)
    with pytest.raises(ValueError, match="another model"):
        FakeQuantizedCache(other.config, parameters)
    assert not hooks(other)


def test_a_kivi_cache_can_be_deployed_upon(pair):
    """Whatever the cache, and upper layers know nothing of it."""
    _, model = pair
    parameters = run(model, ALL, [tokens(2, 60)])
    full = {"k_bits": 16, "v_bits": 16, "backend": "torch"}
    with deploy(model, parameters):
        logits = decode(model, tokens(1, 51), KIVICache(model.config, **full))
    assert relative_error(logits, decode(model, tokens(1, 51), FakeQuantizedCache(model.config, parameters))) < 1e-3


# --- the real cache ------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_real_cache_gives_what_the_fake_one_does(family, symmetric, tmp_path):
    """Over stored codes, layer 0 left out; prefill, single tokens and several at once."""
    _, model = make_pair(family, backend="torch")
    spec = entry(qconfig={"symmetric": symmetric}, exclude=["model.layers.0.self_attn"])
    parameters = run(model, spec, [tokens(4, 51, seed=1)])
    parameters.save(tmp_path / "int8.safetensors")
    ids = tokens(2, 51)
    cache = model.create_kivi_cache(static=tmp_path / "int8.safetensors")
    logits = decode(model, ids, cache)
    assert relative_error(logits, decode(model, ids, FakeQuantizedCache(model.config, parameters))) < 1e-3
    assert relative_error(logits, decode(model, ids, DynamicCache(config=model.config))) > 1e-5


# --- the command ---------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small model with a tokenizer of one token a character, and a spec and a text beside it."""
    model = make_pair("qwen2")[0]
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "spec.yaml").write_text(EXAMPLE, encoding="utf-8")
    (tmp_path / "text.txt").write_text("Some words to read. " * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ["model", "--spec", "spec.yaml", "--texts", "text.txt", "--count", "2", "--tokens", "40", "--out", "out"]


def test_the_command_writes_parameters_a_table_and_a_plot(folder, capsys):
    assert command.main([*FLAGS, "--plot", "ranges.svg"]) == 0
    shown = capsys.readouterr().out
    assert "ranges of 2 layers, 80 tokens" in shown and "written: ranges.svg" in shown
    parameters = StaticParameters.load("out")
    assert list(parameters.layers) == [1, 2] and parameters.spec == load_spec("spec.yaml").as_data()
    assert (folder / "ranges.svg").read_bytes().startswith(b"<?xml")

    assert command.main([*FLAGS, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in data["ranges"]] == [1, 2] and data["tokens"] == 80 and data["written"] == ["out"]
    low, high = parameters.ranges[1][:2]
    assert data["ranges"][0]["keys from"] == pytest.approx(low.min().item())
    widest = torch.maximum(low.abs(), high.abs())
    assert data["ranges"][0]["keys, widest / median"] == pytest.approx((widest.max() / widest.median()).item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--spec": "none.yaml"}, "none.yaml cannot be read"),
        ({"--texts": "none.txt"}, "there is no text 'none.txt'"),
        ({"--tokens": "4000"}, "320 tokens; 8000 are wanted"),
        ({"--out": "nowhere/out"}, "nowhere is no folder"),
        ({"model": "."}, "Unrecognized model"),
    ],
)
def test_a_mistake_writes_no_file(folder, capsys, change, message):
    flags = list(FLAGS)
    for name, value in change.items():
        place = flags.index(name)
        flags[place + (name in change and name.startswith("--"))] = value
    (folder / "out").write_text("as it was")
    assert command.main(flags) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert (folder / "out").read_text() == "as it was"


def test_the_page_is_made_of_what_was_measured(folder, monkeypatch):
    monkeypatch.setattr(int8, "eight_bit_peers", lambda: [])
    _, model = make_pair("qwen2", backend="torch")
    tokenizer = PreTrainedTokenizerFast.from_pretrained("model")
    (folder / "long.txt").write_text("A longer text, of which the end is measured. " * 20)
    step = Int8Step("small", "small-model", ("long.txt",), 640, ("text.txt", "long.txt@200"), 3, 64)
    seen = []
    results = int8.measure_int8(model, tokenizer, step, folder / "page.md", seen.append)
    assert set(results) == {"int8-small-ranges.json", "int8-small-long.txt.json"} and len(seen) == 3 + 5 * 6
    measured = results["int8-small-long.txt.json"]
    rows = {row.name: row for row in measured.rows}
    assert [rows[name].stored_bits for name in (int8.ALL_LAYERS, int8.EXAMPLE, int8.FAKE)] == pytest.approx(
        [8, (8 + 8 + 16) / 3, 16]
    )
    stored, fake = (rows[name].perplexity for name in (int8.ALL_LAYERS, int8.FAKE))
    assert stored == pytest.approx(fake, rel=1e-5) and stored != measured.rows[0].perplexity
    for file, result in results.items():
        save_result(result, folder / "results" / file)
    assert int8.write_int8_report("results", folder / "page.md") == [folder / "page.md"]
    page = (folder / "page.md").read_text()
    assert f"{rows[int8.ALL_LAYERS].top1:.3f}" in page and "page-small-model.svg" in page and "long.txt@200" in page
    assert (folder / "page-small-model.svg").exists() and measured.environment.date in page
    with pytest.raises(ValueError, match="measure first"):
        int8.write_int8_report(folder / "model", folder / "page.md")


# --- real models ---------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.parametrize("family", ["llama"])
def test_a_real_model_is_hardly_changed(family):
    """KL below 0.01 on another text, at positions beyond those of any calibration text alone."""
    model, tokenizer = load_any(str(real_model_path(family)), dtype=torch.float32)
    texts = pieces(tokenizer, ["prose@200000", "code@200000"], 8, 256)
    parameters = run(model.eval(), ALL, texts, context=2048)
    ids = encode(tokenizer, load_text("prose"), 768)
    caches = [static("stored", parameters), fake_static("fake", parameters)]
    result = measure_quality(model, ids, caches, skip=512, chunk=64)
    stored, fake = result.row("stored"), result.row("fake")
    assert 0 < stored.kl < 0.01 and stored.kl == pytest.approx(
        fake.kl, rel=0.5
    )  # float noise turns codes at their edges
    assert stored.stored_bits == 8


@pytest.mark.real_model
@torch.no_grad()
def test_a_decode_step_of_a_real_model_is_that_of_fake_quantization():
    """Over the codes of a prompt, and over what `FakeQuantDynamicCache` makes of its states; full precision is neither."""
    model, tokenizer = load_any(str(real_model_path("llama")), dtype=torch.float32)
    parameters = run(model.eval(), ALL, pieces(tokenizer, ["prose@200000"], 4, 256), context=2048)
    ids = encode(tokenizer, load_text("prose"), 97)
    cache = StaticInt8Cache(model.config, parameters)
    fake, dense = DynamicCache(config=model.config), DynamicCache(config=model.config)

    def step(cache):
        model(ids[:, :-1], past_key_values=cache)
        return model(ids[:, -1:], past_key_values=cache).logits

    stored, exact = step(cache), step(dense)
    with deploy(model, parameters):
        expected = step(fake)
    assert cache.get_cache_info()["tokens"]["packed"] == fake.get_seq_length() == 97
    assert relative_error(stored, expected) < 1e-3 < relative_error(stored, exact)
