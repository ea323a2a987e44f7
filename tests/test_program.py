"""Decode steps compiled as one program on the CPU: the same tokens as the eager step, and never compiled again."""

import copy
import functools
import warnings

import pytest
import torch
from conftest import FAMILIES, make_pair, real_model_path, relative_error, tokens
from torch._dynamo.utils import counters

from modeling_llama_kivi import LlamaForCausalLM_KIVI
from modules.models.attach import attach_kivi, detach_kivi
from modules.models.program import DecodeProgram
from modules.models.rows import FewRows

GREEDY = {"max_new_tokens": 30, "do_sample": False}


@pytest.fixture
def traced(monkeypatch):
    """The compiler without its code generator: what is traced is run by torch's own kernels, and nothing waits for g++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def compiled():
    """How many programs have been compiled since."""
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


def left_padded(batch, length, padding):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


@pytest.fixture(params=[*FAMILIES, "attached"])
def model(request):
    if request.param == "attached":
        return attach_kivi(make_pair("qwen3")[0], group_size=16, residual_length=32)
    return make_pair(request.param)[1]


def test_the_tokens_are_those_of_the_eager_step(model, traced, compiled):
    """Two turns of a padded batch, over packings, and a second cache: one program."""
    ids, mask = left_padded(2, 60, 9)
    more = torch.cat([mask, torch.ones(2, 40, dtype=torch.long)], dim=1)
    turns = []
    for model.compile_decode in (False, True):
        for _ in range(2):
            cache = model.create_kivi_cache()
            first = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
            asked = torch.cat([first, tokens(2, 10, seed=3)], dim=1)
            turns.append(model.generate(asked, attention_mask=more, past_key_values=cache, **GREEDY))
            assert cache.get_cache_info()["tokens"]["packed"] > 0
        assert compiled() == model.compile_decode
    assert all(torch.equal(turn, turns[0]) for turn in turns[1:])


def test_logits_of_steps_on_a_cache_that_changes(traced, compiled):
    """What moves a cache's memory, or says that a step has padding, is nothing to the program."""
    model = make_pair("llama")[1]
    ids, mask = left_padded(2, 70, 5)
    logits = {}
    for model.compile_decode in (False, True):
        out, cache = [], model.create_kivi_cache()

        def step(column, mask, cache=cache, out=out):
            out.append(model(ids[:, column : column + 1], attention_mask=mask, past_key_values=cache).logits)

        with torch.inference_mode():
            model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
            step(60, mask[:, :61])
            cache.crop(-1)
            step(60, mask[:, :61])
        with torch.no_grad():
            cache.reorder_cache(torch.tensor([1, 0]))
            swapped = mask[[1, 0]]
            step(61, swapped[:, :62])
            swapped[1, 62] = 0  # a sequence that gets no token
            step(62, swapped[:, :63])
            step(63, swapped[:, :64])
            cache.reset()
            model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
            step(60, mask[:, :61])
        assert cache.ledger.lengths == [56, 61]
        logits[model.compile_decode] = torch.cat(out)
    assert compiled() == 1
    assert relative_error(logits[True], logits[False]) < 1e-6


def test_beams_and_batch_sizes_have_programs_of_their_own(traced, compiled):
    model = make_pair("llama")[1]
    ids, found = tokens(1, 40), []
    for model.compile_decode in (False, True):
        cache = model.create_kivi_cache()
        found.append(model.generate(ids, past_key_values=cache, num_beams=3, **GREEDY))
        model.use_kivi_cache = True
        found[-1] = torch.cat([found[-1], model.generate(ids, **GREEDY)])
    assert torch.equal(*found) and compiled() == 2
    model._decode_program._programs = dict.fromkeys(range(10, 18))
    with pytest.warns(UserWarning, match="for 8 other batch sizes already"):
        assert torch.equal(model.generate(ids, **GREEDY), found[0][1:])


def test_a_step_that_is_refused_leaves_the_cache_as_it_was(traced):
    model = make_pair("llama")[1]
    model.compile_decode = True
    cache, ids = model.create_kivi_cache(max_length=42), tokens(1, 44)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:41], past_key_values=cache)
        before = copy.deepcopy(cache)
        good = model.model.layers[1].self_attn.k_proj.weight.clone()
        model.model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="layer 1: .*finite"):
            model(ids[:, 41:42], past_key_values=cache)
        model.model.layers[1].self_attn.k_proj.weight.copy_(good)
        out = model(ids[:, 41:42], past_key_values=cache).logits
        assert torch.equal(out, model(ids[:, 41:42], past_key_values=before).logits)
        with pytest.raises(ValueError, match="max_length=42"):
            model(ids[:, 42:43], past_key_values=cache)
    assert cache.get_seq_length() == 42 and cache.ledger.lengths == [42]


def one_step(model):
    """Logits of a step, and the warnings it gave, each once however many steps there were."""
    cache, ids = model.create_kivi_cache(), tokens(1, 42)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(ids[:, :40], past_key_values=cache)
        out = [model(ids[:, i : i + 1], past_key_values=cache).logits.detach() for i in (40, 41)]
    return torch.cat(out), [str(w.message) for w in caught if "compile_decode" in str(w.message)]


@pytest.mark.parametrize(
    "why, no_grad, change",
    [
        ("gradients are on", False, lambda model: None),
        ("training mode", True, lambda model: model.train()),
        ("attn_implementation='eager' is not compiled", True, lambda model: model.set_attn_implementation("eager")),
    ],
)
def test_what_is_not_compiled_runs_eagerly_after_one_warning(why, no_grad, change, traced, compiled):
    model = make_pair("llama")[1]
    change(model)
    with torch.set_grad_enabled(not no_grad):
        expected, _ = one_step(model)
        model.compile_decode = True
        out, said = one_step(model)
    assert torch.equal(out, expected) and compiled() == 0
    assert len(said) == 1 and why in said[0]


def test_a_compiler_that_fails_is_not_asked_again(monkeypatch):
    """As where there is no C++ compiler."""
    asked = []

    def fails(graph, inputs):
        asked.append(graph)
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fails))
    model = make_pair("llama")[1]
    with torch.no_grad():
        expected, _ = one_step(model)
        model.compile_decode = True
        out, said = one_step(model)
    assert torch.equal(out, expected) and len(asked) == 1
    assert len(said) == 1 and "no g++" in said[0]


def test_programs_stay_with_their_model():
    model = make_pair("llama")[1]
    program = model._decode_program
    assert isinstance(program, DecodeProgram) and copy.deepcopy(model)._decode_program is not program
    stock = make_pair("llama")[0]
    attach_kivi(stock, compile_decode=True)
    assert stock.compile_decode
    detach_kivi(stock)
    assert "_decode_program" not in vars(stock) and not hasattr(stock, "compile_decode")
    with pytest.raises(ValueError, match="compile_decode must be True or False; got 1"):
        model.compile_decode = 1


def test_generated_code_gives_the_logits_of_the_eager_step():
    """Code for the CPU, compiled by its C++ compiler, with states of a layout of its own."""
    torch._dynamo.reset()
    model = make_pair("llama")[1]
    logits, ids = [], tokens(2, 75)
    with torch.no_grad():
        for model.compile_decode in (False, True):
            cache = model.create_kivi_cache()
            model(ids[:, :60], past_key_values=cache)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(60, 75)]
            logits.append(torch.cat(steps))
    assert model._decode_program.refused is None and model._decode_program._programs
    assert 0 < relative_error(logits[1], logits[0]) < 1e-5


def test_int8_weights_are_read_as_they_are(traced):
    """One row and several at once; more rows than are multiplied that way; over the weights' own product."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = make_pair("qwen2")[1]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for batch in (1, 3, 6):
        logits, ids = [], tokens(batch, 50)
        with torch.no_grad():
            for model.compile_decode in (False, True):
                cache = model.create_kivi_cache()
                model(ids[:, :40], past_key_values=cache)
                steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 50)]
                logits.append(torch.cat(steps))
        assert relative_error(logits[1], logits[0]) < 1e-5
    assert model._decode_program.refused is None and len(model._decode_program._programs) == 3


class _Quantized(torch.Tensor):
    """Weights that stand for other ones, as those of torchao do."""

    def dequantize(self):
        return 2 * self.as_subclass(torch.Tensor)


class _Opaque(torch.Tensor):
    """Weights that only their own product can read."""


@pytest.mark.parametrize("kind, factor", [(torch.Tensor, 1), (_Quantized, 2), (_Opaque, 1)])
def test_few_rows_meet_weights_by_what_they_say_they_are(kind, factor):
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(size, generator=generator) for size in ((1, 2, 64), (32, 64), (32,)))
    expected = torch.nn.functional.linear(rows, factor * weight, bias)
    with FewRows():
        out = torch.nn.functional.linear(rows, weight.as_subclass(kind), bias)
    assert relative_error(out.as_subclass(torch.Tensor), expected) < 1e-6


@pytest.mark.real_model
def test_a_real_model_writes_the_same_text(traced):
    model = LlamaForCausalLM_KIVI.from_pretrained(real_model_path("llama"), dtype=torch.float32, use_kivi_cache=True)
    ids = torch.randint(5, 40_000, (1, 300), generator=torch.Generator().manual_seed(0))
    texts = []
    for model.compile_decode in (False, True):
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY))
    assert model._decode_program.refused is None and model._decode_program._programs
    assert torch.equal(*texts)
