"""Long prompts: they go through in pieces by themselves, short ones do not, and what they take stays small."""

from __future__ import annotations

import prefill_cpu
import pytest
import torch
from conftest import FAMILIES, SIZES, make_pair, relative_error, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from modules import attach_kivi
from modules.cache.plan import planned_cache
from modules.cli.command import parse
from modules.models import pieces
from modules.models.config import FIELD_DEFAULTS


@pytest.fixture
def pair():
    """(stock, KIVI) with the same weights; nothing is compiled."""
    return make_pair("llama", backend="torch")


@pytest.fixture
def short(monkeypatch):
    """What is long starts at 65 tokens; pieces are of 32."""
    monkeypatch.setattr(pieces, "WHOLE", 64)
    monkeypatch.setattr(pieces, "piece_of", lambda config: 32)


def filled(model, ids, **kwargs):
    """Output of a forward over a new cache, and the cache."""
    cache = model.create_kivi_cache()
    with torch.no_grad():
        return model(ids, past_key_values=cache, **kwargs), cache


def stored(cache):
    """Copies of all that the layers hold."""
    return [{name: t.clone() for name, t in layer.store.tensors().items()} for layer in cache.kivi_layers]


def same(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(stored(one), stored(other), strict=True) for name in a)


# when they are cut


def test_long_prompts_are_cut_as_by_hand_and_short_ones_are_whole(pair, short):
    _, kivi = pair
    assert kivi.prefill_chunk == "auto"
    for length, by_hand in ((64, None), (65, 32), (150, 32)):
        ids = tokens(2, length)
        kivi.prefill_chunk = "auto"
        out, cache = filled(kivi, ids)
        kivi.prefill_chunk = by_hand
        expected, other = filled(kivi, ids)
        assert torch.equal(out.logits, expected.logits) and same(cache, other), length


def test_a_length_of_the_user_is_kept(pair, short):
    _, kivi = pair
    ids = tokens(1, 150)
    whole = {}
    for chunk in (None, 48, "auto"):
        kivi.prefill_chunk = chunk
        whole[chunk], _ = filled(kivi, ids)
    assert relative_error(whole[48].logits, whole["auto"].logits) > 1e-3
    assert relative_error(whole[None].logits, whole["auto"].logits) > 1e-3
    with pytest.raises(ValueError, match="prefill_chunk must be a whole number of tokens.*'auto'.*None"):
        kivi.prefill_chunk = "long"
    assert kivi.prefill_chunk == "auto"


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_and_attached_models_cut_as_well(family, short):
    stock, kivi = make_pair(family, backend="torch")
    ids = tokens(1, 150)
    options = {name: getattr(kivi.config, name) for name in ("group_size", "residual_length", "backend")}
    attach_kivi(stock, **options)
    texts = []
    for model, chunk in ((kivi, "auto"), (stock, "auto"), (kivi, 32), (kivi, None)):
        model.prefill_chunk = chunk
        cache = model.create_kivi_cache()
        out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
        texts.append((out.sequences.tolist(), torch.cat(out.logits)))
    assert texts[0][0] == texts[1][0] == texts[2][0]
    assert torch.equal(texts[0][1], texts[2][1]) and relative_error(texts[1][1], texts[0][1]) < 1e-5
    assert relative_error(texts[3][1], texts[0][1]) > 1e-3


def test_gradients_and_attention_weights_are_of_the_whole(pair, short):
    """What pieces cannot give is given as before: by itself nothing is cut then."""
    _, kivi = pair
    ids = tokens(1, 150)
    kivi.prefill_chunk = None
    expected = kivi(ids, past_key_values=kivi.create_kivi_cache(), labels=ids)
    expected.loss.backward()
    gradient = kivi.lm_head.weight.grad.clone()
    kivi.zero_grad()
    kivi.prefill_chunk = "auto"
    kivi(ids, past_key_values=kivi.create_kivi_cache(), labels=ids).loss.backward()
    assert torch.equal(kivi.lm_head.weight.grad, gradient) and gradient.any()
    kivi.set_attn_implementation("eager")
    out, _ = filled(kivi, ids, output_attentions=True)
    assert out.attentions[0].shape == (1, SIZES["num_attention_heads"], 150, 150)


# what comes out


@pytest.mark.parametrize("kept", [1, 3, 20, 40, 0])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_last_logits_are_those_of_all(pair, short, kept, side):
    """Also of more tokens than the last piece has (150 is four pieces and 22 tokens), and of padded batches."""
    _, kivi = pair
    ids, mask = tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    if side:
        mask[1, slice(0, 50) if side == "left" else slice(100, 150)] = 0
    every, _ = filled(kivi, ids, attention_mask=mask)
    some, _ = filled(kivi, ids, attention_mask=mask, logits_to_keep=kept)
    expected = every.logits[:, -kept:]
    assert some.logits.shape == expected.shape
    real = mask[:, -kept:].bool()
    assert relative_error(some.logits[real], expected[real]) < 1e-6


def test_a_cache_has_the_same_bytes_whole_and_in_pieces(pair, short):
    """Room is made once, for all pieces; what is planned is what there is."""
    _, kivi = pair
    sizes = []
    for chunk in ("auto", None, 7):
        kivi.prefill_chunk = chunk
        _, cache = filled(kivi, tokens(2, 1500))
        assert cache.ledger.coming == 0
        sizes.append(cache.get_cache_info()["bytes"])
    planned = planned_cache(kivi.config, 1500, batch_size=2, dtype=torch.float32).get_cache_info()["bytes"]
    assert sizes[0] == sizes[1] == sizes[2] == planned


def test_memory_moves_once_in_a_long_prompt(pair, short):
    _, kivi = pair
    cache = kivi.create_kivi_cache()
    with torch.no_grad():
        kivi(tokens(1, 100), past_key_values=cache)
        grown = []
        grow = type(cache.kivi_layers[0].store.key).grow
        with pytest.MonkeyPatch.context() as patch:
            side = type(cache.kivi_layers[0].store.key)
            patch.setattr(side, "grow", lambda self, capacity: (grown.append(capacity), grow(self, capacity)))
            kivi(tokens(1, 1500), past_key_values=cache)
    assert len(grown) == 2 * len(cache.kivi_layers) and len(set(grown)) == 1


# how long a piece is


def config_of(**sizes):
    config = LlamaConfig(**sizes)
    for name, default in FIELD_DEFAULTS.items():
        setattr(config, name, default)
    return config


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8}  # fmt: skip
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3}  # fmt: skip
QWEN_HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("sizes,piece", [(LLAMA_8B, 3072), (SMOLLM2, 5120), (QWEN_HALF, 1024)])
def test_pieces_are_as_long_as_a_share_of_the_cache_allows(sizes, piece):
    config = config_of(**sizes)
    assert pieces.longest_piece(config, 8192) is None and pieces.longest_piece(config, 8193) == piece
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    dense = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * head_dim * 32768
    needed = piece * (2 * sizes["hidden_size"] + 3 * sizes["intermediate_size"])
    assert needed <= dense / 12


def test_sizes_that_differ_between_layers_and_experts_count_at_their_widest():
    narrow, wide = config_of(**SMOLLM2), config_of(**SMOLLM2)
    wide.__dict__["intermediate_size"] = [1536] * 29 + [12288]  # as configs of such models have it
    assert pieces.piece_of(wide) < pieces.piece_of(narrow)
    experts = config_of(**SMOLLM2)
    experts.num_experts_per_tok, experts.moe_intermediate_size = 8, 1536
    assert pieces.piece_of(experts) == pieces.piece_of(wide)
    sliding = config_of(**SMOLLM2)
    sliding.layer_types = ["sliding_attention"] * 28 + ["full_attention"] * 2
    assert pieces.piece_of(sliding) == 512


# memory


@pytest.mark.skipif(not prefill_cpu.Path("/proc/self/clear_refs").exists(), reason="only Linux says what the peak was")
def test_what_a_long_prompt_takes_beyond_the_cache_is_bounded(tmp_path, tokenizer, monkeypatch):
    """In processes of their own: in pieces a quarter of the dense cache of 32,768 tokens and some fixed room, whole much more."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))  # what is free goes back, and does not count
    sizes = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flags = parse(prefill_cpu.Flags, ["--model", str(tmp_path), "--threads", "1"], description="")
    in_pieces, whole = (prefill_cpu.measured(flags, name, 10240) for name in ("KIVI", "KIVI whole"))
    dense = in_pieces["dense_bytes"]
    assert dense == whole["dense_bytes"] == 2 * 2 * 128 * 10240 * 4
    assert in_pieces["cache_bytes"] == whole["cache_bytes"] < dense / 5
    bound = dense * 32768 / 10240 / 4 + (32 << 20)
    assert 0 < in_pieces["beyond_bytes"] < bound < whole["beyond_bytes"] / 2
