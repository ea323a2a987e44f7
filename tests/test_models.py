"""The models of every family, small and random: exact without quantization, right with it, on every path of a user."""

import copy
import dataclasses
import threading
import warnings
import weakref

import pytest
import torch
from conftest import FAMILIES, SIZES, SMALL, make_pair, relative_error, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, pipeline
from transformers.cache_utils import DynamicSlidingWindowLayer

from modules.codecs.rotation import hadamard
from modules.kivi_cache_general import KIVICache, KIVICacheLayer
from modules.models.config import FIELD_DEFAULTS
from modules.models.graphs import DecodeRunner
from modules.options import KIVIOptions
from modules.store.step import Step

GREEDY = {"max_new_tokens": 40, "do_sample": False, "use_cache": True}


def run(model, cache, pieces, **kwargs):
    """Logits of successive pieces through one cache, joined."""
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache, **kwargs).logits for piece in pieces], dim=1)


def cut(ids, *lengths):
    return ids.split([*lengths, ids.shape[1] - sum(lengths)], dim=1)


# exact where nothing is quantized


@pytest.mark.parametrize("bits", [(16, 16)])
@pytest.mark.parametrize("lengths", [(150,), (100, 1, 1, 1), (1, 40, 60), (64, 64)])
def test_sixteen_bits_equal_the_stock_model(each_pair, bits, lengths):
    stock, kivi = each_pair
    ids = tokens(2, 152)
    cache = kivi.create_kivi_cache(k_bits=bits[0], v_bits=bits[1])
    assert relative_error(run(kivi, cache, cut(ids, *lengths)), run(stock, DynamicCache(), cut(ids, *lengths))) < 1e-4


def test_sixteen_bits_through_a_long_decode(pair):
    stock, kivi = pair
    ids = tokens(1, 200)
    steps = cut(ids, 50, *[1] * 149)
    out = run(kivi, kivi.create_kivi_cache(k_bits=16, v_bits=16), steps)
    assert relative_error(out, run(stock, DynamicCache(), steps)) < 1e-4


def test_use_kivi_false_is_full_precision(pair):
    stock, kivi = pair
    ids = tokens(1, 120)
    cache = kivi.create_kivi_cache(use_kivi=False)
    assert relative_error(run(kivi, cache, cut(ids, 100)), run(stock, DynamicCache(), cut(ids, 100))) < 1e-4


def test_a_stock_cache_and_no_cache_give_the_stock_model(each_pair):
    stock, kivi = each_pair
    ids = tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(kivi(ids).logits, stock(ids).logits)
        assert torch.equal(kivi(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)
    assert torch.equal(run(kivi, DynamicCache(), cut(ids, 30)), run(stock, DynamicCache(), cut(ids, 30)))
    assert torch.equal(
        kivi.generate(ids, cache_implementation="static", **GREEDY),
        stock.generate(ids, cache_implementation="static", **GREEDY),
    )


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 4},
        {"prompt_lookup_num_tokens": 5},
        {"assistant_model": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"penalty_alpha": None, "repetition_penalty": 1.3},
        {"prefill_chunk_size": 16},
    ],
)
def test_generation_modes_at_sixteen_bits(pair, mode):
    stock, kivi = pair
    ids = tokens(1, 40)
    ids = torch.cat([ids, ids], dim=1)  # something for prompt lookup to find
    mode = dict(mode)
    if mode.pop("assistant_model", None):
        mode["assistant_model"] = make_pair("llama")[0]
    outputs = []
    for model, cache in ((kivi, kivi.create_kivi_cache(k_bits=16, v_bits=16)), (stock, DynamicCache())):
        torch.manual_seed(7)
        outputs.append(model.generate(ids, past_key_values=cache, **{**GREEDY, **mode}))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 5}, {"do_sample": True}])
def test_generation_modes_run_at_two_bits(pair, mode):
    _, kivi = pair
    ids = tokens(1, 100)
    cache = kivi.create_kivi_cache()
    out = kivi.generate(ids, past_key_values=cache, **{**GREEDY, **mode})
    assert out.shape == (1, 140) and cache.get_seq_length() >= 138
    assert cache.get_cache_info()["tokens"]["packed"] > 0


# right where it is quantized


def test_reference_equals_attention_over_dequantized_states(pair):
    """ "eager" runs the stock attention on what the cache dequantizes: the definition of right."""
    _, kivi = pair
    ids = tokens(2, 170, seed=2)  # no state of these lies halfway between two codes, where rounding decides
    pieces = cut(ids, 100, 1, 1, 40, 1)
    out = run(kivi, kivi.create_kivi_cache(), pieces)
    full = run(kivi, DynamicCache(), pieces)
    kivi.set_attn_implementation("eager")
    ref = run(kivi, kivi.create_kivi_cache(), pieces)
    assert relative_error(out, ref) < 1e-4
    assert relative_error(out, full) > 1e-2  # it was quantized


@pytest.mark.parametrize("side", ["k_bits", "v_bits"])
def test_closer_with_more_bits(pair, side):
    """One side at a time: in random models the values' error hides that of the keys."""
    _, kivi = pair
    pieces = cut(tokens(1, 200), 150)
    full = run(kivi, DynamicCache(), pieces)[:, 150:]

    def error(bits):
        cache = kivi.create_kivi_cache(**{"k_bits": 16, "v_bits": 16, side: bits}, backend="torch")
        return relative_error(run(kivi, cache, pieces)[:, 150:], full)

    assert error(8) < error(4) / 2 < error(2) / 4


def test_bias_of_the_keys_does_not_matter(each_pair):
    """A constant in the keys, as Qwen2's bias gives, is absorbed by the minimum of each channel."""
    _, kivi = each_pair
    layer = kivi.model.layers[0].self_attn
    if layer.k_proj.bias is None:
        pytest.skip("this family has no bias in k_proj")
    with torch.no_grad():
        for block in kivi.model.layers:
            block.self_attn.k_proj.bias.mul_(10)
    ids = tokens(1, 150)
    full = run(kivi, DynamicCache(), cut(ids, 100, *[1] * 49))
    out = run(kivi, kivi.create_kivi_cache(k_bits=4, v_bits=4), cut(ids, 100, *[1] * 49))
    assert relative_error(out, full) < 0.15


# batches


def padded(rows, side, width):
    """Rows of ids in one batch, padded on one side, with its mask."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 32])
def test_padded_sequences_get_the_logits_they_get_alone(each_pair, side, chunk):
    _, kivi = each_pair
    kivi.prefill_chunk = chunk
    prompts = [tokens(1, length, seed=length)[0] for length in (9, 80, 131)]
    later = tokens(3, 40, seed=5)
    ids, mask = padded(prompts, side, 131)
    cache = kivi.create_kivi_cache()
    with torch.no_grad():
        first = kivi(ids, attention_mask=mask, past_key_values=cache).logits
        rest = []
        for step in range(40):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            rest.append(kivi(later[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits)
    for row, prompt in enumerate(prompts):
        alone = run(kivi, kivi.create_kivi_cache(), [prompt[None], *later[row : row + 1].split(1, dim=1)])[0]
        place = mask[row, :131].bool()
        assert relative_error(first[row, place], alone[: len(prompt)]) < 1e-4
        assert relative_error(torch.cat(rest, dim=1)[row], alone[len(prompt) :]) < 1e-4


def test_a_second_turn_with_padding_of_its_own(pair):
    _, kivi = pair
    turns = [[tokens(1, n, seed=n + t)[0] for n in lengths] for t, lengths in enumerate([(70, 20), (5, 33), (40, 40)])]
    cache, mask, logits = kivi.create_kivi_cache(), torch.zeros(2, 0, dtype=torch.long), []
    for side, turn in zip(("left", "right", "left"), turns):
        ids, new = padded(turn, side, max(map(len, turn)))
        mask = torch.cat([mask, new], dim=1)
        with torch.no_grad():
            logits.append((kivi(ids, attention_mask=mask, past_key_values=cache).logits, new.bool()))
    for row in range(2):
        alone = run(kivi, kivi.create_kivi_cache(), [turn[row][None] for turn in turns])[0]
        together = torch.cat([out[row, real[row]] for out, real in logits])
        assert relative_error(together, alone) < 1e-4


def test_generate_on_a_left_padded_batch(pair):
    _, kivi = pair
    prompts = [tokens(1, length, seed=length)[0] for length in (12, 90)]
    ids, mask = padded(prompts, "left", 90)
    for extra in ({}, {"num_beams": 3}):
        together = kivi.generate(ids, attention_mask=mask, past_key_values=kivi.create_kivi_cache(), **GREEDY, **extra)
        for row, prompt in enumerate(prompts):
            alone = kivi.generate(prompt[None], past_key_values=kivi.create_kivi_cache(), **GREEDY, **extra)
            assert torch.equal(together[row, 90:], alone[0, len(prompt) :])


def test_select_and_repeat_in_the_middle_of_a_padded_batch(pair):
    _, kivi = pair
    prompts = [tokens(1, length, seed=length)[0] for length in (30, 90, 60)]
    ids, mask = padded(prompts, "left", 90)
    cache = kivi.create_kivi_cache()
    later = tokens(1, 40, seed=1)
    with torch.no_grad():
        kivi(ids, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        out = run(kivi, cache, later.expand(4, -1).split(1, dim=1))
    for row, prompt in zip((0, 2), (prompts[2], prompts[0])):
        alone = run(kivi, kivi.create_kivi_cache(), [prompt[None], *later.split(1, dim=1)])[0, len(prompt) :]
        assert relative_error(out[row], alone) < 1e-4 and relative_error(out[row + 1], alone) < 1e-4


# turns, chunks, copies, interruptions


@pytest.mark.parametrize("chunk", [7, 32, 64, 1000])
def test_prefill_chunk_is_the_same_as_cutting_by_hand(pair, chunk):
    _, kivi = pair
    ids = tokens(2, 130)
    by_hand = run(kivi, kivi.create_kivi_cache(), ids.split(chunk, dim=1))
    kivi.prefill_chunk = chunk
    with torch.no_grad():
        out = kivi(ids, past_key_values=kivi.create_kivi_cache(), output_hidden_states=True)
    assert relative_error(out.logits, by_hand) < 1e-5
    assert len(out.hidden_states) == 4 and out.hidden_states[1].shape == (2, 130, kivi.config.hidden_size)


@pytest.mark.parametrize("window", [None, 20])
def test_chunks_of_a_second_turn_know_the_padding_of_the_first(window):
    """With a mask that says nothing of the new tokens; eager attention and sliding layers go by it."""
    _, _, kivi_config, kivi_class, _ = FAMILIES["qwen2"]
    sizes = {**SIZES, **SMALL, "backend": "torch"}
    if window:
        layers = ["full_attention", "sliding_attention", "full_attention"]
        sizes |= {"layer_types": layers, "sliding_window": window, "use_sliding_window": True}
    torch.manual_seed(0)
    kivi = kivi_class(kivi_config(**sizes)).eval()
    kivi.set_attn_implementation("sdpa" if window else "eager")
    ids, mask = padded([tokens(1, 10)[0], tokens(1, 100)[0]], "left", 100)
    later = tokens(2, 40, seed=5)
    for make in (kivi.create_kivi_cache, lambda **options: KIVICache(**SMALL, backend="torch", **options)):
        logits = []
        for chunk in (None, 16):
            cache, kivi.prefill_chunk = make(use_kivi=False), None
            with torch.no_grad():
                kivi(ids, attention_mask=mask, past_key_values=cache)
                kivi.prefill_chunk = chunk
                both = torch.cat([mask, torch.ones_like(later)], dim=1)
                logits.append(kivi(later, attention_mask=both, past_key_values=cache).logits)
        alone = run(kivi, kivi.create_kivi_cache(use_kivi=False), [ids[:1, 90:], later[:1]])[0, 10:]
        assert relative_error(logits[1], logits[0]) < 1e-4 and relative_error(logits[0][0], alone) < 1e-4


def test_chunks_of_a_step_that_says_itself_what_is_padding(pair):
    _, kivi = pair
    kivi.prefill_chunk = 32
    ids, mask = padded([tokens(1, 40)[0], tokens(1, 90)[0]], "left", 90)
    with torch.no_grad():
        masked = kivi.model(ids, attention_mask=mask, past_key_values=kivi.create_kivi_cache())
        step = Step.of(mask.bool(), 2, 90)
        told = kivi.model(ids, past_key_values=kivi.create_kivi_cache(), kivi_step=step)
    assert torch.equal(told.last_hidden_state, masked.last_hidden_state)


def test_chunks_without_a_return_dict_or_attention_weights(pair):
    _, kivi = pair
    kivi.config.backend = "torch"
    ids, kivi.prefill_chunk = tokens(2, 90), 32
    with torch.no_grad():
        plain = kivi.model(ids, past_key_values=kivi.create_kivi_cache()).last_hidden_state
        out = kivi.model(ids, past_key_values=kivi.create_kivi_cache(), return_dict=False)
        assert isinstance(out, tuple) and torch.equal(out[0], plain)
        with pytest.raises(ValueError, match="attention weights"):
            kivi(ids, past_key_values=kivi.create_kivi_cache(), output_attentions=True)


def test_chunks_with_labels_and_embeddings(pair):
    _, kivi = pair
    ids = tokens(2, 90)
    kivi.prefill_chunk, kivi.use_kivi_cache = 32, True
    with torch.no_grad():
        by_ids = kivi(ids, labels=ids)
        by_embeddings = kivi(inputs_embeds=kivi.get_input_embeddings()(ids), labels=ids)
        kept = kivi(ids, logits_to_keep=1).logits
    assert torch.isfinite(by_ids.loss) and torch.allclose(by_ids.loss, by_embeddings.loss)
    assert torch.allclose(kept, by_ids.logits[:, -1:], atol=1e-5)


def test_a_chat_of_three_turns_reuses_one_cache(pair):
    _, kivi = pair
    cache, ids = kivi.create_kivi_cache(), tokens(1, 70)
    for turn in range(3):
        ids = kivi.generate(ids, past_key_values=cache, suppress_tokens=[0], **{**GREEDY, "max_new_tokens": 20})
        assert cache.get_seq_length() == ids.shape[1] - 1
        ids = torch.cat([ids, tokens(1, 30, seed=turn)], dim=1)
    assert ids.shape[1] == 70 + 3 * 50


def test_a_prompt_shared_by_four_continuations(pair):
    _, kivi = pair
    prompt, later = tokens(1, 100), tokens(4, 20, seed=2)
    shared = kivi.create_kivi_cache()
    run(kivi, shared, [prompt])
    copies = [run(kivi, copy.deepcopy(shared), [later[row : row + 1]]) for row in range(4)]
    shared.batch_repeat_interleave(4)
    assert relative_error(run(kivi, shared, [later]), torch.cat(copies)) < 1e-4


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize(
    "layer,length,error", [(0, 1, Interrupt), (1, 60, RuntimeError), (2, 1, RuntimeError), (2, 60, Interrupt)]
)
def test_a_step_that_fails_leaves_the_cache_as_it_was(pair, layer, length, error):
    _, kivi = pair
    ids, later = tokens(2, 84), tokens(2, length, seed=3)
    for stored in (0, 83, 84):  # empty, before and after a flush
        cache, expected = kivi.create_kivi_cache(), kivi.create_kivi_cache()
        if stored:
            run(kivi, cache, [ids[:, :stored]])
            run(kivi, expected, [ids[:, :stored]])

        def stop(*_):
            raise error

        hook = kivi.model.layers[layer].mlp.register_forward_hook(stop)
        with pytest.raises(error):
            run(kivi, cache, [later])
        hook.remove()
        assert cache.get_seq_length() == stored
        steps = tokens(2, 20, seed=4).split(1, dim=1)
        assert relative_error(run(kivi, cache, [later, *steps]), run(kivi, expected, [later, *steps])) < 1e-6


def test_broken_weights_are_reported_with_the_layer(pair):
    _, kivi = pair
    kivi.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    cache = kivi.create_kivi_cache()
    with pytest.raises(ValueError, match="layer 1"):
        run(kivi, cache, [tokens(1, 50)])
    assert cache.get_seq_length() == 0


# masks and positions


def test_masks_that_cannot_be_meant(pair):
    _, kivi = pair
    ids, cache = tokens(2, 60), kivi.create_kivi_cache()
    one = torch.ones(2, 61, dtype=torch.long)
    with torch.no_grad():
        kivi(ids, past_key_values=cache)
        for mask, message in (
            (torch.ones(2, 1), r"must have the shape \(2, 61\)"),
            (torch.ones(2, 1, 1, 61), "4 dimensions"),
            (one.index_fill(1, torch.tensor([3]), 0), "changes tokens that are stored already"),
        ):
            with pytest.raises(ValueError, match=message):
                kivi(ids[:, :1], attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 60
        kivi(ids[:, :1], attention_mask=one, past_key_values=cache)
    with pytest.raises(ValueError, match="4 dimensions"):
        kivi(ids, attention_mask=torch.ones(2, 1, 60, 60), past_key_values=kivi.create_kivi_cache())


def test_positions_given_by_hand(pair):
    stock, kivi = pair
    ids, positions = tokens(1, 80), torch.arange(80)[None] * 2
    with torch.no_grad():
        out = kivi(ids, position_ids=positions, past_key_values=kivi.create_kivi_cache(use_kivi=False)).logits
        assert relative_error(out, stock(ids, position_ids=positions).logits) < 1e-4


# creating, loading, saving


def test_the_cache_is_created_when_asked(pair):
    stock, kivi = pair
    ids = tokens(1, 90)
    assert not isinstance(kivi(ids).past_key_values, KIVICache)
    kivi.use_kivi_cache = True
    assert isinstance(kivi(ids).past_key_values, KIVICache)
    assert kivi(ids, use_cache=False).past_key_values is None
    out = kivi.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, KIVICache)
    expected = kivi.generate(ids, past_key_values=kivi.create_kivi_cache(), **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert isinstance(
        kivi.generate(ids, past_key_values=DynamicCache(), return_dict_in_generate=True, **GREEDY).past_key_values,
        DynamicCache,
    )
    with pytest.raises(ValueError, match="use_kivi_cache"):
        kivi.use_kivi_cache = "on"


def test_save_reload_and_auto_classes(each_pair, tmp_path):
    stock, kivi = each_pair
    kivi.config.k_bits, kivi.config.sink_length = 4, 8
    kivi.save_pretrained(tmp_path / "kivi")
    reloaded = type(kivi).from_pretrained(tmp_path / "kivi")
    assert reloaded.config.k_bits == 4 and reloaded.create_kivi_cache().options.sink_length == 8
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "kivi", dtype=torch.float32)
    assert type(auto) is type(kivi) and auto.config.model_type.endswith("_kivi")
    ids = tokens(1, 100)
    for model in (reloaded, auto):
        assert torch.equal(run(model, model.create_kivi_cache(), [ids]), run(kivi, kivi.create_kivi_cache(), [ids]))
    assert AutoConfig.from_pretrained(tmp_path / "kivi").residual_length == 32


def test_options_by_layer_are_saved_with_the_model(pair, tmp_path):
    _, kivi = pair
    chosen = {"k_bits": [2, 4, 2], "wide_channels": [0, 0.25, 1.0]}
    for name, value in chosen.items():
        setattr(kivi.config, name, value)
    kivi.save_pretrained(tmp_path)
    cache = AutoModelForCausalLM.from_pretrained(tmp_path).create_kivi_cache()
    assert {name: getattr(cache.options, name) for name in chosen} == chosen
    assert [layer.options.wide_channels for layer in cache.layers] == chosen["wide_channels"]
    with pytest.raises(ValueError, match="wide_channels has 2 entries for 3 layers"):
        type(kivi).from_pretrained(tmp_path, wide_channels=[0, 0.5])


def test_a_stock_checkpoint(each_pair, tmp_path):
    stock, kivi = each_pair
    stock.save_pretrained(tmp_path / "stock")
    loaded = type(kivi).from_pretrained(
        tmp_path / "stock", k_bits=4, v_bits=8, residual_length=64, torch_dtype=torch.bfloat16
    )
    cache = loaded.create_kivi_cache()
    assert (cache.options.k_bits, cache.options.v_bits, cache.options.residual_length) == (4, 8, 64)
    assert loaded.dtype == torch.bfloat16
    assert type(kivi).from_pretrained(tmp_path / "stock", dtype=torch.float16).dtype == torch.float16
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is type(kivi) and again.config.v_bits == 8
    config = type(kivi).config_class.from_pretrained(tmp_path / "stock", k_bits=8)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "stock", config=config).create_kivi_cache().options.k_bits == 8
    )
    stock_config = AutoConfig.from_pretrained(tmp_path / "stock")
    assert (
        type(kivi).from_pretrained(tmp_path / "stock", config=stock_config, k_bits=4).create_kivi_cache().options.k_bits
        == 4
    )


@pytest.mark.parametrize(
    "options,message",
    [
        ({"k_bits": 5}, "k_bits must be one of"),
        ({"k_bits": "two"}, "k_bits"),
        ({"v_bits": 2.0}, "v_bits must be one of"),
        ({"use_kivi_cache": "no"}, "use_kivi_cache must be True or False"),
        ({"group_size": 40, "residual_length": 80}, "group_size must divide head_dim"),
        ({"k_bit": 2}, "did you mean 'k_bits'"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_bad_options_are_refused_before_the_weights_are_read(pair, tmp_path, options, message):
    stock, kivi = pair
    stock.config.save_pretrained(tmp_path)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        type(kivi).from_pretrained(tmp_path, **options)


def test_a_stock_config_is_enough(each_pair, tmp_path):
    stock, kivi = each_pair
    model = type(kivi)(stock.config, k_bits=4, group_size=16)
    assert model.create_kivi_cache().options.k_bits == 4 and not hasattr(stock.config, "k_bits")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(kivi) and again.create_kivi_cache().options.k_bits == 4
    with pytest.raises(ValueError, match="did you mean"):
        kivi.create_kivi_cache(resdual_length=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_fields_are_the_options_of_the_cache(family):
    config = FAMILIES[family][2]()
    assert {name: getattr(config, name) for name in FIELD_DEFAULTS} == FIELD_DEFAULTS
    assert dataclasses.asdict(KIVIOptions.from_config(config)) == dataclasses.asdict(KIVIOptions())


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_says_what_to_install(family):
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed here")
    _, kivi = make_pair(family)
    name = type(kivi).__name__.replace("ForCausalLM_KIVI", "KIVIFlashAttention2")
    module = __import__(type(kivi).__module__)
    with pytest.raises(ImportError, match="pip install flash-attn"):
        getattr(module, name)(kivi.config, 0)
    with pytest.raises(ImportError, match="(?i)flash"):
        kivi.set_attn_implementation("flash_attention_2")
        FAMILIES[family][3](kivi.config)


def test_pipeline_and_streamer(pair):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

    _, kivi = pair
    words = {f"w{index}": index for index in range(SIZES["vocab_size"])}
    base = Tokenizer(models.WordLevel(words, unk_token="w2"))
    from tokenizers.pre_tokenizers import Whitespace

    base.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, unk_token="w2", pad_token="w0", bos_token="w1")
    kivi.use_kivi_cache = True
    prompt = " ".join(f"w{index % 90 + 3}" for index in range(60))
    text = pipeline("text-generation", model=kivi, tokenizer=tokenizer)(prompt, **{**GREEDY, "max_new_tokens": 5})
    assert text[0]["generated_text"].startswith(prompt)
    streamer = TextIteratorStreamer(tokenizer)
    inputs = tokenizer(prompt, return_tensors="pt")
    thread = threading.Thread(
        target=kivi.generate,
        kwargs={
            "input_ids": inputs.input_ids,
            "past_key_values": kivi.create_kivi_cache(),
            "streamer": streamer,
            **GREEDY,
        },
    )
    thread.start()
    assert len("".join(streamer).split()) == inputs.input_ids.shape[1] + 40
    thread.join()


def test_sliding_layers_keep_the_stock_layer():
    config_class, stock_class, kivi_config, kivi_class, _ = FAMILIES["qwen2"]
    sizes = {
        **SIZES,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 20,
        "use_sliding_window": True,
        "max_window_layers": 0,
    }
    torch.manual_seed(0)
    stock = stock_class(config_class(**sizes)).eval()
    kivi = kivi_class(kivi_config(**sizes, **SMALL, backend="torch")).eval()
    kivi.load_state_dict(stock.state_dict())
    cache = kivi.create_kivi_cache(use_kivi=False)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [KIVICacheLayer, DynamicSlidingWindowLayer, KIVICacheLayer]
    ids = tokens(2, 120)
    pieces = cut(ids, 70, 1, 30)
    assert relative_error(run(kivi, cache, pieces), run(stock, DynamicCache(config=stock.config), pieces)) < 1e-4
    prompts = [tokens(1, length, seed=length)[0] for length in (12, 90)]
    ids, mask = padded(prompts, "left", 90)
    together = kivi.generate(ids, attention_mask=mask, past_key_values=kivi.create_kivi_cache(), **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = kivi.generate(prompt[None], past_key_values=kivi.create_kivi_cache(), **GREEDY)
        assert torch.equal(together[row, 90:], alone[0, len(prompt) :])


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_default_dtype_does_not_matter(pair, backend):
    """Loading code sets it for a while."""
    _, kivi = pair
    pieces = cut(tokens(1, 100), 90, *[1] * 9)
    expected = run(kivi, kivi.create_kivi_cache(backend=backend), pieces)
    hadamard.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = run(kivi, kivi.create_kivi_cache(backend=backend), pieces)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(out, expected) < 1e-5


def test_no_warnings_of_ours(pair):
    _, kivi = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kivi, kivi.create_kivi_cache(backend="torch"), cut(tokens(1, 90), 80, 1))


MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_cache_goes_from_one_autograd_mode_to_another(pair, first, second, backend):
    _, kivi = pair
    ids = tokens(2, 120)
    pieces = cut(ids, 60, *[1] * 20)
    expected = run(kivi, kivi.create_kivi_cache(backend=backend), pieces)
    cache = kivi.create_kivi_cache(backend=backend)
    out = []
    for index, piece in enumerate(pieces):
        with (first, second)[index % 2]():
            out.append(kivi(piece, past_key_values=cache).logits.detach())
            cache = copy.deepcopy(cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.reorder_cache(torch.tensor([1, 0]))
    assert relative_error(torch.cat(out, dim=1), expected) < 1e-5
    for tensor in cache.layers[0].store.tensors().values():
        assert not tensor.is_inference() and not tensor.requires_grad


@pytest.mark.parametrize("backend,bits", [("torch", 2), ("torch", 8), ("numba", 2)])
def test_autocast(pair, backend, bits):
    """As near to no autocast as the stock model is."""
    stock, kivi = pair
    pieces = cut(tokens(2, 120), 90, *[1] * 25)
    errors = []
    for model, make in ((stock, DynamicCache), (kivi, lambda: kivi.create_kivi_cache(k_bits=bits, backend=backend))):
        full = run(model, make(), pieces)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append(relative_error(run(model, make(), pieces), full))
    assert 0 < errors[1] < 2 * errors[0] + 0.02


@pytest.mark.parametrize("how", ["reset", "crop"])
@pytest.mark.parametrize("max_length", [None, 300])
def test_what_is_forgotten_does_not_matter(pair, how, max_length):
    """A cache that was emptied is a new one, for another number of sequences too."""
    _, kivi = pair
    pieces = cut(tokens(2, 120, seed=2), 100, 1, 1)
    used = kivi.create_kivi_cache(max_length=max_length)
    run(kivi, used, [tokens(2, 90, seed=1)])
    used.reset() if how == "reset" else used.crop(-90)
    assert torch.equal(run(kivi, used, pieces), run(kivi, kivi.create_kivi_cache(max_length=max_length), pieces))
    used.reset()
    one = [piece[:1] for piece in pieces]
    assert torch.equal(run(kivi, used, one), run(kivi, kivi.create_kivi_cache(max_length=max_length), one))
    with pytest.raises(ValueError, match="holds 1 sequences, the new states 2"):
        run(kivi, used, pieces[1:2])


def test_attention_dropout_of_a_training_step(pair):
    _, kivi = pair
    kivi.train()
    for layer in kivi.model.layers:
        layer.self_attn.attention_dropout = 0.5
    logits = []
    for cache in (DynamicCache(), kivi.create_kivi_cache()):
        torch.manual_seed(3)
        logits.append(kivi(tokens(1, 40), past_key_values=cache).logits)
    assert relative_error(*logits) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_marks_of_padding_are_data_in_inference_mode_too(pair, backend):
    _, kivi = pair
    ids, mask = padded([tokens(1, 60)[0], tokens(1, 80)[0]], "left", 80)
    cache = kivi.create_kivi_cache(backend=backend)
    with torch.inference_mode():
        for token in (ids, *tokens(2, 3).split(1, dim=1)):
            kivi(token, attention_mask=mask, past_key_values=cache)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    real = cache.ledger.is_real
    assert real.shape == (2, 83) and not real.is_inference()


def test_training_over_stored_tokens_says_that_gradients_stop(pair):
    _, kivi = pair
    kivi.train()
    cache = kivi.create_kivi_cache()
    kivi(tokens(1, 60), past_key_values=cache)
    with pytest.warns(UserWarning, match="no gradients"):
        kivi(tokens(1, 4), past_key_values=cache)


def test_training_goes_around_the_cache(pair):
    _, kivi = pair
    kivi.use_kivi_cache = True
    kivi.train()
    ids = tokens(1, 40)
    kivi(ids, labels=ids).loss.backward()
    assert kivi.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_single_tokens_over_an_allocated_cache_go_to_the_graph_runner(pair, monkeypatch):
    """The wiring alone: on a CPU the runner is made to believe that it may, and runs each step eagerly."""
    _, kivi = pair
    ids = tokens(2, 60)
    expected = kivi.generate(ids, past_key_values=kivi.create_kivi_cache(), **GREEDY)
    seen = []

    def step(self, model, cache, input_ids, step, position_ids):
        seen.append(input_ids.shape)
        self.running = True
        try:
            return self._eager(model, cache, input_ids, position_ids, step)
        finally:
            self.running = False

    monkeypatch.setattr(DecodeRunner, "step", step)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    cache = kivi.create_kivi_cache(max_length=200, backend="torch")
    out = kivi.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(out, expected) and len(seen) == 39
    outputs = kivi(tokens(2, 1), past_key_values=cache, return_dict=False)
    assert isinstance(outputs, tuple) and len(seen) == 39
    kivi.use_cuda_graphs = False
    kivi.generate(ids, past_key_values=kivi.create_kivi_cache(max_length=200, backend="torch"), **GREEDY)
    assert len(seen) == 39
    twin = copy.deepcopy(kivi)
    assert twin._decode_graphs.runner(cache) is not kivi._decode_graphs.runner(cache)


def test_graphs_keep_no_cache_alive(pair):
    _, kivi = pair
    cache = kivi.create_kivi_cache()
    run(kivi, cache, [tokens(1, 60)])
    kivi._decode_graphs.runner(cache)
    gone = weakref.ref(cache)
    del cache
    assert gone() is None


@pytest.mark.parametrize(
    "mode", [{"prompt_lookup_num_tokens": 5}, {"prompt_lookup_num_tokens": 20}, {"assistant_model": True}]
)
@pytest.mark.parametrize("length", [20, 110])
def test_drafts_change_no_token(pair, mode, length):
    """Assisted decoding gives what greedy decoding over the same codes gives: a rejected draft leaves no trace."""
    stock, kivi = pair
    ids = tokens(1, length, seed=length)
    mode = {"assistant_model": stock} if mode.get("assistant_model") else mode
    plain, drafted = kivi.create_kivi_cache(), kivi.create_kivi_cache()
    for turn in range(2):
        expected = kivi.generate(ids, past_key_values=plain, **GREEDY)
        assert torch.equal(kivi.generate(ids, past_key_values=drafted, **GREEDY, **mode), expected)
        assert plain.ledger.packed == drafted.ledger.packed
        ids = torch.cat([expected, tokens(1, 30, seed=turn)], dim=1)


def test_room_for_drafts_can_be_made_later(pair):
    _, kivi = pair
    later = tokens(1, 100, seed=1).split([*[1] * 20, 50, 30], dim=1)
    plain, drafted = kivi.create_kivi_cache(), kivi.create_kivi_cache()
    for cache in (plain, drafted):
        run(kivi, cache, [tokens(1, 90)])
    drafted.activate_past_recording()
    outputs = [run(kivi, cache, later) for cache in (plain, drafted)]
    assert relative_error(*outputs) < 1e-5
