"""Stock decoders of transformers under the attention implementation "kivi": small, random, one of each kind."""

from __future__ import annotations

import pytest
import torch
from conftest import SMALL, make_pair, relative_error, tokens
from decoders import DECODERS, HYBRIDS, decoder
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

import modules.models.attention  # noqa: F401 - registers "kivi"
from modules.kivi_cache_general import KIVICache, KIVICacheLayer

PIECES = (84, 1, 1, 10, *[1] * 34)  # of 130 tokens; groups are packed in the prompt, and two and more after it
CROPPABLE = [
    name for name in DECODERS if name not in (*HYBRIDS, "gemma3_text")
]  # sliding layers forget what is cropped


def run(model, cache, pieces, **kwargs):
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache, **kwargs).logits for piece in pieces], dim=1)


def kivi(name, implementation="kivi", **changes):
    model = decoder(name, **changes)
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(params=list(DECODERS))
def name(request):
    return request.param


def test_exact_at_sixteen_bits(name):
    pieces = tokens(2, 130).split(PIECES, dim=1)
    stock = decoder(name)
    expected = run(stock, DynamicCache(config=stock.config), pieces)
    model = kivi(name)
    assert relative_error(run(model, KIVICache(model.config, use_kivi=False), pieces), expected) < 1e-5
    assert relative_error(run(model, DynamicCache(config=model.config), pieces), expected) < 1e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equal_to_attention_over_rebuilt_states(name, bits):
    """The rebuilt path is transformers' own attention over what the cache dequantizes."""
    options = {**SMALL, "k_bits": bits, "v_bits": bits}
    models = kivi(name), kivi(name, "kivi_eager")
    for seed in range(5):  # a state halfway between two codes may be rounded to the other one in one of the two
        pieces = tokens(1, 130, seed=seed).split(PIECES, dim=1)
        logits = [run(model, KIVICache(model.config, **options), pieces) for model in models]
        if relative_error(*logits) < 1e-5:
            break
    else:
        pytest.fail(f"relative error {relative_error(*logits):.1e}")
    model = kivi(name)
    full = run(model, DynamicCache(config=model.config), pieces)
    assert 1e-4 < relative_error(logits[0], full) < 1  # it was quantized, and is not noise


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(name, side):
    if side == "right" and name in (*HYBRIDS, "gemma3_text"):
        pytest.skip("linear attention reads the padding behind a prompt, and windows count it, in the stock model too")
    model, lengths = kivi(name), (31, 90)
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    ids, mask = torch.zeros(2, 90, dtype=torch.long), torch.zeros(2, 90, dtype=torch.long)
    for row, prompt in enumerate(rows):
        place = slice(90 - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    later = tokens(2, 40, seed=5)
    cache = KIVICache(model.config, **SMALL)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = []
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        for step in range(40):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            token = later[:, step : step + 1]
            out.append(model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    for row, prompt in enumerate(rows):
        alone = KIVICache(model.config, **SMALL)
        expected = run(model, alone, [prompt[None], *later[row : row + 1].split(1, dim=1)])[0, len(prompt) :]
        assert relative_error(torch.cat(out, dim=1)[row], expected) < 1e-3  # a tie may move a scale of 8 bits by a step


def test_beams(name):
    model, ids = kivi(name), tokens(1, 90)
    wanted = {"max_new_tokens": 20, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    expected = decoder(name).generate(ids, **wanted)
    cache = KIVICache(model.config, use_kivi=False)
    assert torch.equal(model.generate(ids, past_key_values=cache, **wanted), expected)


@pytest.mark.parametrize("name", CROPPABLE)
def test_crop(name):
    model, ids = kivi(name), tokens(1, 120)
    cache, fresh = (KIVICache(model.config, use_kivi=False, **SMALL) for _ in range(2))
    run(model, cache, [ids])
    cache.crop(-50)
    run(model, fresh, [ids[:, :70]])
    later = tokens(1, 30, seed=2).split(1, dim=1)
    assert relative_error(run(model, cache, later), run(model, fresh, later)) < 1e-5


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("stored", [0, 90])
def test_a_failed_step_restores_recurrent_states(name, length, stored):
    """Also of a stock model, which does not say when a forward ends: what it left half done is undone by the next."""
    model = kivi(name)
    cache, expected = (KIVICache(model.config, **SMALL) for _ in range(2))
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer, KIVICacheLayer] * 2
    for twin in (cache, expected):
        if stored:
            run(model, twin, [tokens(1, stored)])

    def stop(*_):
        raise InterruptedError

    hook = model.model.layers[2].register_forward_hook(stop)
    later = tokens(1, length, seed=3)
    with pytest.raises(InterruptedError):
        run(model, cache, [later])
    hook.remove()
    with pytest.raises(ValueError, match="broken off"):
        run(model, cache, [later])
    assert cache.get_seq_length() == stored
    steps = [later, *tokens(1, 20, seed=4).split(1, dim=1)]
    assert relative_error(run(model, cache, steps), run(model, expected, steps)) < 1e-6


def test_what_the_function_does_not_know_is_refused():
    model = kivi("llama")
    attention = model.model.layers[0].self_attn
    attend = type(attention).forward
    ids = tokens(1, 60)
    for extra in ({"softcap": 30.0}, {"s_aux": torch.zeros(6)}, {"something_new": 1}):
        type(attention).forward = lambda self, *args, extra=extra, **kwargs: attend(self, *args, **{**kwargs, **extra})
        try:
            for cache in (None, KIVICache(model.config), DynamicCache()):
                with pytest.raises(ValueError, match=f"passes {next(iter(extra))}="):
                    run(model, cache, [ids])
        finally:
            type(attention).forward = attend


@pytest.mark.parametrize("model_type", ["stock", "KIVI"])
def test_states_that_nobody_attends_are_noticed(monkeypatch, model_type):
    """An attention that copies what `update` gave back loses the way to the past: an error, never a wrong answer."""
    model = kivi("llama") if model_type == "stock" else make_pair("llama")[1]
    cache = KIVICache(model.config, **SMALL)
    update = KIVICache.update
    monkeypatch.setattr(KIVICache, "update", lambda *args, **kwargs: [t.clone() for t in update(*args, **kwargs)])
    with pytest.raises(ValueError, match="does not pass what update"):
        for _ in range(2):  # a stock model does not say when a forward ends
            run(model, cache, [tokens(1, 20)])
    assert cache.get_seq_length() == 0


def test_custom_masks_are_refused():
    model, ids = kivi("llama"), tokens(1, 60)
    cache = KIVICache(model.config, **SMALL)
    with pytest.raises(ValueError, match="4 dimensions"):
        run(model, cache, [ids], attention_mask=torch.ones(1, 1, 60, 60, dtype=torch.bool))
    run(model, cache, [ids])
    with pytest.raises(ValueError, match="4 dimensions"):
        run(model, cache, [ids[:, :1]], attention_mask=torch.ones(1, 1, 1, 61, dtype=torch.bool))
