"""Every family of Qwen, small and random, through `load_qwen_kivi()`: exact, packed as it says, with images in the prompt."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SMALL, relative_error
from decoders import WITH_IMAGES, decoder, prompt
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DynamicCache, PreTrainedTokenizerFast

import modeling_qwen_kivi
from modeling_llama_kivi import load_llama_kivi
from modeling_qwen_kivi import load_qwen_kivi
from modules import attach_kivi
from modules.models.families import FAMILIES, classes_of

QWEN = [name for name, family in FAMILIES.items() if family.module == "modeling_qwen_kivi"]
OLD = ("qwen2", "qwen3")  # tests/test_models.py is about them
RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe")
OPTIONS = {**SMALL, "backend": "torch"}


@pytest.fixture(scope="module", params=[name for name in QWEN if name not in OLD])
def loaded(request, tmp_path_factory):
    """(model type, stock model, KIVI model loaded from what the stock one saved, folder)."""
    folder, stock = tmp_path_factory.mktemp(request.param), decoder(request.param)
    stock.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    model, tokenizer = load_qwen_kivi(str(folder), **OPTIONS)
    assert tokenizer.vocab_size == 131
    return request.param, stock, model, folder


def run(model, cache, inputs, later):
    """Logits of a prompt and of the tokens after it, one by one."""
    with torch.no_grad():
        out = [model(**inputs, past_key_values=cache).logits]
        out += [model(input_ids=token, past_key_values=cache).logits for token in later.split(1, dim=1)]
    return torch.cat(out, dim=1)


def tokens(batch, length, seed=0):
    return torch.randint(3, 110, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_classes_and_names(loaded):
    name, stock, model, _ = loaded
    assert type(model).__name__ == f"{type(stock).__name__}_KIVI"
    assert getattr(modeling_qwen_kivi, type(model).__name__) is type(model)
    classes = classes_of(name)
    assert type(model.get_decoder()) is classes.model and type(model.config) is classes.config
    assert all(type(layer) is classes.decoder_layer for layer in model.get_decoder().layers)
    assert model.config.k_bits == 2 and model.config.get_text_config().group_size == 16


def test_exact_at_sixteen_bits(loaded):
    """All weights are there, experts included, and nothing else differs."""
    name, stock, model, _ = loaded
    inputs, later = prompt(name, 70), tokens(1, 40)
    expected = run(stock, DynamicCache(config=stock.config), inputs, later)
    cache = model.create_kivi_cache(use_kivi=False)
    assert relative_error(run(model, cache, inputs, later), expected) < 1e-5
    assert relative_error(run(model, DynamicCache(config=model.config), inputs, later), expected) < 1e-6


def test_equal_to_attention_over_rebuilt_states(loaded):
    """At 2 bits, past two flushes, and by itself in pieces of a prompt with images."""
    name, stock, model, _ = loaded
    for seed in range(5):  # a state halfway between two codes may be rounded to the other one in one of the two
        inputs, later = prompt(name, 70, seed), tokens(1, 40, seed)
        logits = []
        for implementation in ("sdpa", "eager"):  # the latter attends over what the cache dequantizes
            model.set_attn_implementation(implementation)
            cache = model.create_kivi_cache()
            logits.append(run(model, cache, inputs, later))
        if relative_error(*logits) < 1e-5:
            break
    else:
        pytest.fail(f"relative error {relative_error(*logits):.1e}")
    model.set_attn_implementation("sdpa")
    assert cache.get_cache_info()["tokens"]["packed"] >= 64
    assert 1e-4 < relative_error(logits[0], run(stock, DynamicCache(config=stock.config), inputs, later)) < 1


def test_a_prompt_in_pieces(loaded):
    name, _, model, _ = loaded
    inputs, later = prompt(name, 100), tokens(1, 5)
    whole = run(model, model.create_kivi_cache(use_kivi=False), inputs, later)
    model.prefill_chunk = 17
    try:
        assert relative_error(run(model, model.create_kivi_cache(use_kivi=False), inputs, later), whole) < 1e-5
    finally:
        model.prefill_chunk = None


@pytest.mark.parametrize("chunk", [None, 16])
def test_padded_batches(loaded, chunk):
    """Each sequence of a left-padded batch as alone, images in both."""
    name, _, model, _ = loaded
    rows = [prompt(name, length, seed=length) for length in (60, 90)]
    ids, mask = torch.zeros(2, 90, dtype=torch.long), torch.zeros(2, 90, dtype=torch.long)
    for row, one in enumerate(rows):
        ids[row, -one["input_ids"].shape[1] :], mask[row, -one["input_ids"].shape[1] :] = one["input_ids"][0], 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if name in WITH_IMAGES:
        batch |= {key: torch.cat([one[key] for one in rows]) for key in ("pixel_values", "image_grid_thw")}
        batch["mm_token_type_ids"] = (ids == 120).int()
    wanted = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    model.prefill_chunk = chunk
    try:
        options = {"k_bits": 16, "v_bits": 16} if chunk else {}  # a padded prompt is cut elsewhere, so packed earlier
        together = model.generate(**batch, past_key_values=model.create_kivi_cache(**options), **wanted)
        for row, one in enumerate(rows):
            alone = model.generate(**one, past_key_values=model.create_kivi_cache(**options), **wanted)
            assert torch.equal(together[row, 90:], alone[0, one["input_ids"].shape[1] :])
    finally:
        model.prefill_chunk = None


def test_several_turns(loaded):
    """A second question over the same cache, which gets the new tokens alone; images stay in the cache."""
    name, stock, model, _ = loaded
    inputs, wanted = prompt(name, 70), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    rows = []
    for each in (stock, model):
        cache = model.create_kivi_cache(use_kivi=False) if each is model else DynamicCache(config=stock.config)
        ids = each.generate(**inputs, past_key_values=cache, **wanted)
        ids = torch.cat([ids, tokens(1, 12, seed=9)], dim=1)
        mask = torch.ones_like(ids)
        rows.append(each.generate(ids, attention_mask=mask, past_key_values=cache, **wanted))
    assert torch.equal(*rows) and cache.get_seq_length() == rows[1].shape[1] - 1


def test_a_failed_step_restores_recurrent_states(loaded):
    name, _, model, _ = loaded
    if name not in RECURRENT:
        pytest.skip("the family has no recurrent layers")
    caches = [model.create_kivi_cache() for _ in range(2)]
    for cache in caches:
        run(model, cache, prompt(name, 70), tokens(1, 3))

    def stop(*_):
        raise InterruptedError

    hook = model.get_decoder().layers[2].register_forward_hook(stop)
    later = tokens(1, 20, seed=4)
    for piece in (later[:, :1], later):
        with pytest.raises(InterruptedError):
            run(model, caches[0], {"input_ids": piece}, later[:, :0])
    hook.remove()
    assert torch.equal(*(run(model, cache, {"input_ids": later}, later) for cache in caches))


def test_saved_and_loaded_again(loaded, tmp_path):
    name, _, model, folder = loaded
    model.save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    again, _ = load_qwen_kivi(str(tmp_path), k_bits=4)
    assert again.config.k_bits == 4 and again.config.group_size == 16 and model.config.k_bits == 2
    logits = [each(**prompt(name, 70)).logits for each in (model, again)]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match=r"Use load_qwen_kivi\(\)"):
        load_llama_kivi(str(tmp_path))


def test_attached_to_the_stock_model(loaded):
    name, stock, model, _ = loaded
    inputs, wanted = prompt(name, 70), {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    attached = attach_kivi(decoder(name), **OPTIONS)
    assert torch.equal(
        attached.generate(**inputs, **wanted),
        model.generate(**inputs, past_key_values=model.create_kivi_cache(), **wanted),
    )


def test_options_of_a_composite_config_are_checked():
    config_class = modeling_qwen_kivi.Qwen3VLKIVIConfig
    assert config_class(k_bits=4).text_config.k_bits == 4
    with pytest.raises(ValueError, match="k_bits must be one of"):
        config_class(k_bits=3)


def test_a_checkpoint_as_the_hub_has_it(tmp_path):
    """Qwen2-VL as it was published: the decoder's config flat in the whole one, weights under their first names."""
    stock = decoder("qwen2_vl")
    config = stock.config.to_dict()
    config |= {name: value for name, value in config.pop("text_config").items() if name not in config}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": config.pop("rope_parameters")["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight.clone()
        for name, weight in stock.state_dict().items()
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = modeling_qwen_kivi.Qwen2VLForConditionalGeneration_KIVI.from_pretrained(tmp_path, k_bits=4, **OPTIONS)
    assert model.config.k_bits == 4
    assert relative_error(model(**prompt("qwen2_vl", 70)).logits, stock(**prompt("qwen2_vl", 70)).logits) < 1e-6


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text"])
def test_a_decoder_alone_gets_its_experts(name, tmp_path):
    stock = decoder(name)
    stock.save_pretrained(tmp_path)
    model, ids = classes_of(name).model.from_pretrained(tmp_path), tokens(1, 20)
    assert relative_error(model(ids).last_hidden_state, stock.model(ids).last_hidden_state) < 1e-6
