"""What only a real model shows: the text of full precision, its logits, and the quality of two bits."""

import copy

import pytest
import torch
from common import offline_text, small_gguf
from conftest import real_model_path, relative_error
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_llama_kivi import LlamaForCausalLM_KIVI, load_llama_kivi
from modeling_qwen_kivi import load_qwen_kivi
from modules import evaluation
from modules.cli.folder import GEMMA, models_folder
from modules.evaluation.candidates import short_candidates
from modules.models.families import load_any

pytestmark = pytest.mark.real_model
GREEDY = {"do_sample": False, "max_new_tokens": 30}


def long_text() -> str:
    return offline_text("compound", "types", "execmodel")


LOAD = {"llama": load_llama_kivi, "qwen2": load_qwen_kivi}
LOSES = {
    "llama": (0.03, 8, 0.001),
    "qwen2": (0.05, 4, 0.001),
}  # KL at most, of the paper's at most 1 / …, 4 bits at most


@pytest.fixture(scope="module", params=list(LOAD))
def real(request):
    """(stock, KIVI, tokenizer, ids of a long text) of SmolLM2 and of Qwen2.5-Coder."""
    path = real_model_path(request.param)
    kivi, tokenizer = LOAD[request.param](path, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return stock, kivi, tokenizer, tokenizer(long_text(), return_tensors="pt").input_ids


def stream(model, cache, pieces):
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def test_sixteen_bits_are_exact(real):
    stock, kivi, _, ids = real
    pieces = [ids[:, :400], ids[:, 400:464], *ids[:, 464:764].split(1, dim=1), ids[:, 764:900]]
    out = stream(kivi, kivi.create_kivi_cache(k_bits=16, v_bits=16), pieces)
    assert relative_error(out, stream(stock, None, [ids[:, :900]])) < 1e-4


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True, "top_k": 30},
        {"num_beams": 4, "max_new_tokens": 12},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": True, "max_new_tokens": 12},
    ],
)
def test_sixteen_bits_give_the_same_text(real, mode):
    stock, kivi, _, ids = real
    mode = {name: stock if name == "assistant_model" else value for name, value in mode.items()}
    outputs = []
    for model, cache in ((kivi, kivi.create_kivi_cache(k_bits=16, v_bits=16)), (stock, DynamicCache())):
        torch.manual_seed(1)
        outputs.append(model.generate(ids[:, :300], past_key_values=cache, **{**GREEDY, **mode}))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_get_the_logits_they_get_alone(real, side):
    _, kivi, _, ids = real
    prompts = [ids[0, :50], ids[0, 100:400]]
    batch, mask = torch.zeros(2, 300, dtype=torch.long), torch.zeros(2, 300, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(300 - len(prompt), None) if side == "left" else slice(0, len(prompt))
        batch[row, place], mask[row, place] = prompt, 1
    exact = {"exact_products": True}  # bytes magnify what another order of sums changes
    cache, later = kivi.create_kivi_cache(**exact), ids[:, 500:540]
    with torch.no_grad():
        kivi(batch, attention_mask=mask, past_key_values=cache)
        together = stream(kivi, cache, later.expand(2, -1).split(1, dim=1))
    for row, prompt in enumerate(prompts):
        cache = kivi.create_kivi_cache(**exact)
        stream(kivi, cache, [prompt[None]])
        assert relative_error(together[row], stream(kivi, cache, later.split(1, dim=1))[0]) < 1e-4


def test_two_bits_lose_little(real):
    _, kivi, _, ids = real
    default, small, paper, four_two, four = evaluation.measure_quality(kivi, ids[:, :1536], short_candidates()).rows[1:]
    most, ratio, most_of_four = LOSES[kivi.config.model_type.removesuffix("_kivi")]
    assert default.kl < most and default.kl < paper.kl / ratio and default.top1 > 0.9
    assert default.kl < small.kl < 2 * most and four_two.kl < most and four.kl < most_of_four
    bits = [row.stored_bits for row in (default, small, paper, four_two, four)]
    assert bits == pytest.approx([3, 2.46875, 3, 3.75, 4.875])


def test_a_prompt_shared_by_four_continuations(real):
    _, kivi, tokenizer, ids = real
    shared = kivi.create_kivi_cache()
    stream(kivi, shared, [ids[:, :500]])
    texts = []
    for question in ("What", "Where", "When", "Who"):
        more = torch.cat([ids[:, :500], tokenizer(question, return_tensors="pt").input_ids], dim=1)
        texts.append(kivi.generate(more, past_key_values=copy.deepcopy(shared), **{**GREEDY, "max_new_tokens": 5}))
        assert shared.get_seq_length() == 500
        own = kivi.create_kivi_cache()
        stream(kivi, own, [ids[:, :500]])
        assert torch.equal(texts[-1], kivi.generate(more, past_key_values=own, **{**GREEDY, "max_new_tokens": 5}))
    assert all(text.shape[1] == 506 for text in texts)


def test_a_gguf_file_loads():
    gguf = small_gguf("smollm2")
    model, tokenizer = load_llama_kivi(gguf.parent, gguf_file=gguf.name, k_bits=4, v_bits=2, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM_KIVI) and model.create_kivi_cache().options.k_bits == 4
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, past_key_values=model.create_kivi_cache(), **GREEDY)[0])


def test_without_kivi_a_cache_is_exact(real):
    stock, kivi, _, ids = real
    pieces = [ids[:, :200], *ids[:, 200:220].split(1, dim=1), ids[:, 220:300]]
    out = stream(kivi, kivi.create_kivi_cache(use_kivi=False), pieces)
    assert relative_error(out, stream(stock, DynamicCache(), pieces)) < 1e-4


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="load_llama_kivi"):
        load_qwen_kivi(real_model_path("llama"))


def test_a_stock_model_uses_the_cache(real):
    from modules.kivi_cache_general import KIVICache

    stock, _, _, ids = real
    cache = KIVICache(stock.config, k_bits=8, v_bits=8)
    out = stock.generate(ids[:, :300], past_key_values=cache, **GREEDY)
    assert torch.equal(out, stock.generate(ids[:, :300], **GREEDY))


def test_gemma_with_its_full_layers_packed():
    """A model that is neither Llama nor Qwen: `load_any` attaches to the stock one; docs/models.md has 3,072 tokens."""
    path = models_folder() / GEMMA
    if not path.exists():
        pytest.skip(f"no {path}; `python examples/common.py gemma3` fetches it")
    model, tokenizer = load_any(str(path), dtype=torch.float32)
    ids = tokenizer(long_text(), return_tensors="pt").input_ids[:, :768]
    caches = {"2 bits": {}, "4 bits": {"k_bits": 4, "v_bits": 4}}
    rows = {row.name: row for row in evaluation.measure_quality(model, ids, caches, skip=512).rows}
    assert 1e-5 < rows["4 bits"].kl < rows["2 bits"].kl / 3 and rows["2 bits"].kl < 0.02
