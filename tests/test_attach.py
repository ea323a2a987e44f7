"""A stock model with a KIVI cache put on and taken off: nothing of it stays behind, and what cannot have one says why."""

from __future__ import annotations

import copy
import filecmp
import pickle
import subprocess
import sys
import types

import pytest
import torch
from accelerate import dispatch_model
from conftest import SMALL, make_pair, relative_error, tokens
from decoders import decoder
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from modules import KIVICache, attach_kivi, detach_kivi

OPTIONS = {**SMALL, "backend": "torch"}
WANTED = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}


def values_of(thing, seen=None):
    """All that a model, its modules, configs and bound functions are made of: tensors by their memory, the rest by value."""
    seen = {} if seen is None else seen
    if isinstance(thing, types.MethodType):  # made anew whenever it is asked for
        return thing.__func__, values_of(thing.__self__, seen)
    if id(thing) in seen:
        return seen[id(thing)]
    seen[id(thing)] = f"the one seen as number {len(seen)}"
    if isinstance(thing, torch.Tensor):
        return thing.data_ptr(), tuple(thing.shape), thing.dtype
    if isinstance(thing, dict):
        return type(thing), {key: values_of(value, seen) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set):
        return type(thing), [values_of(value, seen) for value in thing]
    if hasattr(thing, "__dict__") and not isinstance(thing, type | types.FunctionType | types.ModuleType):
        return type(thing), values_of(vars(thing), seen)
    return thing


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gemma3_text"])
def test_attach_generate_detach(name):
    """The stock model's outputs are bit for bit what they were, and so is all that it is made of."""
    model, ids = decoder(name), tokens(2, 90)
    expected, tokens_before, before = model(ids).logits, model.generate(ids, **WANTED), values_of(model)

    assert attach_kivi(model, **OPTIONS) is model
    assert model.use_kivi_cache
    cache = model(ids).past_key_values
    assert type(cache) is KIVICache and cache.get_cache_info()["tokens"]["packed"]
    over_codes = model.generate(ids, **WANTED)
    model.use_kivi_cache, model.prefill_chunk = False, 32
    assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, expected)
    exact = model.generate(ids, past_key_values=model.create_kivi_cache(k_bits=16, v_bits=16), **WANTED)
    assert torch.equal(exact, tokens_before) and not torch.equal(over_codes, tokens_before)

    assert detach_kivi(model) is model
    assert values_of(model) == before
    assert torch.equal(model(ids).logits, expected) and torch.equal(model.generate(ids, **WANTED), tokens_before)


def test_as_a_model_of_a_family():
    stock, kivi = make_pair("llama", backend="torch")
    model, ids = attach_kivi(stock, **OPTIONS), tokens(2, 100)
    for options in ({}, {"k_bits": 4, "v_bits": 8, "sink_length": 0}):
        caches = [each.create_kivi_cache(**options) for each in (model, kivi)]
        assert torch.equal(*(each.generate(ids, past_key_values=c, **WANTED) for each, c in zip((model, kivi), caches)))
        assert caches[0].get_cache_info() == caches[1].get_cache_info()


def test_saved_as_the_stock_model_is(tmp_path):
    model = decoder("qwen3_moe")
    model.save_pretrained(tmp_path / "stock")
    attach_kivi(model, **OPTIONS).save_pretrained(tmp_path / "attached")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "attached").iterdir()) and len(names) >= 2
    assert filecmp.cmpfiles(tmp_path / "stock", tmp_path / "attached", names, shallow=False)[0] == names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert type(loaded) is type(decoder("qwen3_moe")) and torch.equal(
        loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_attached_and_apart(copied):
    model, ids = attach_kivi(decoder("llama"), **OPTIONS), tokens(1, 90)
    expected = model.generate(ids, **WANTED)
    twin = copied(model)
    detach_kivi(model)
    assert type(twin(ids).past_key_values) is KIVICache and twin.config is not model.config
    assert torch.equal(twin.generate(ids, **WANTED), expected)
    assert torch.equal(detach_kivi(twin)(ids).logits, model(ids).logits)


def test_hooks_of_accelerate_call_the_attached_forward():
    """As they are on a model that was loaded with device_map."""
    model, ids = decoder("llama"), tokens(1, 90)
    expected = attach_kivi(decoder("llama"), **OPTIONS).generate(ids, **WANTED)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    stock, before = model.generate(ids, **WANTED), values_of(model)
    assert torch.equal(attach_kivi(model, **OPTIONS).generate(ids, **WANTED), expected)
    assert values_of(detach_kivi(model)) == before and torch.equal(model.generate(ids, **WANTED), stock)


def test_torch_compile():
    model = attach_kivi(decoder("llama"), **OPTIONS)
    pieces = tokens(1, 90).split((60, *[1] * 30), dim=1)
    compiled = torch.compile(model, backend="eager")
    out = []
    for each in (model, compiled):
        cache = model.create_kivi_cache()
        with torch.no_grad():
            out.append(torch.cat([each(piece, past_key_values=cache).logits for piece in pieces], dim=1))
    assert relative_error(*out) < 1e-5


def test_arguments_in_the_order_of_the_stock_forward():
    model, ids = attach_kivi(decoder("llama"), **OPTIONS), tokens(1, 60)
    mask, cache = torch.ones_like(ids), model.create_kivi_cache()
    assert (
        torch.equal(model(ids, mask, None, cache).logits, model(input_ids=ids).logits) and cache.get_seq_length() == 60
    )
    with pytest.raises(TypeError, match="several values for attention_mask"):
        model(ids, mask, attention_mask=mask)


REFUSED = {
    "a soft cap on attention logits": ("gemma2", {"query_pre_attn_scalar": 32}),
    "attention sinks as logits": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "multi-head latent attention": (
        "deepseek_v3",
        {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "none of its layers attends to all tokens": ("mistral", {"sliding_window": 32}),
    "not among transformers' attention functions": ("bloom", {"n_layer": 2}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_attend_over_codes_says_so(why):
    name, changes = REFUSED[why]
    model = decoder(name, **changes)
    before = values_of(model)
    with pytest.raises(ValueError, match=why):
        attach_kivi(model)
    assert values_of(model) == before


def test_recurrent_models_encoders_and_heads():
    for name, why in (
        ("mamba2", "none of its layers|not among|takes no|not a model"),
        ("t5", "an encoder and a decoder"),
    ):
        sizes = {
            "num_heads": 4,
            "head_dim": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "n_groups": 1,
            "state_size": 8,
        }
        config = AutoConfig.for_model(name, **({"d_model": 32, "num_layers": 1, "d_ff": 32} if name == "t5" else sizes))
        model_class = AutoModel if name == "t5" else AutoModelForCausalLM
        with pytest.raises(ValueError, match=why):
            attach_kivi(model_class.from_config(config))
    with pytest.raises(ValueError, match="does not generate"):
        attach_kivi(decoder("llama").model)


def test_wrappers_and_what_is_there_already():
    model = decoder("llama")

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = model

    with pytest.raises(ValueError, match="attach to the model within"):
        attach_kivi(Wrapped())
    with pytest.raises(ValueError, match="nothing to detach"):
        detach_kivi(model)
    attach_kivi(model)
    with pytest.raises(ValueError, match="has one already"):
        attach_kivi(model)
    with pytest.raises(ValueError, match="same config object"):
        attach_kivi(type(decoder("llama"))(model.config))
    detach_kivi(model).forward = model.forward
    with pytest.raises(ValueError, match="was replaced"):
        attach_kivi(model)
    with pytest.raises(ValueError, match="has one already"):
        attach_kivi(make_pair("llama")[1])


def test_wrong_options_change_nothing():
    model = decoder("llama")
    before = values_of(model)
    for options, why in (
        ({"k_bit": 2}, "did you mean 'k_bits'"),
        ({"k_bits": 3}, "k_bits must be one of"),
        ({"group_size": 24, "residual_length": 48}, "must divide head_dim"),
        ({"k_bits": [2, 2]}, "2 entries for 3 layers"),
        ({"prefill_chunk": 0}, "prefill_chunk must be"),
    ):
        with pytest.raises(ValueError, match=why):
            attach_kivi(model, **options)
    assert values_of(model) == before


def test_a_field_that_is_called_as_an_option_is_not_written_over():
    model = decoder("llama")
    model.config.group_size = 4
    with pytest.raises(ValueError, match="field 'group_size' of its own"):
        attach_kivi(model)
    assert model.config.group_size == 4 and isinstance(model.config, PreTrainedConfig)


def test_options_alone_import_neither_torch_nor_transformers():
    code = "import sys, modules.options; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
