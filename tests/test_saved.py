"""Caches in files: what is loaded goes on as what was saved, in another process too; any other file is refused."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pages
import pytest
import torch
from conftest import SMALL, make_pair, real_model_path, tokens
from decoders import decoder
from layers import random_states
from safetensors import safe_open
from safetensors.torch import save_file

import modules.models.attention  # noqa: F401 - registers "kivi"
from modules import files
from modules.cache import cache as cache_module
from modules.cache import saved as saved_module
from modules.codecs.static import ChannelScales, StaticParameters, model_facts
from modules.kivi_cache_general import KIVICache, StaticInt8Cache
from modules.models.families import load_any
from modules.store.live import live_tensors

ROOT = Path(__file__).parent.parent
PAGE = pages.DOCS / "saved-prompts.md"
GREEDY = {"do_sample": False, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model():
    return make_pair("llama", backend="torch")[1]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "prompt.safetensors"


def run(model, cache, pieces, **kwargs):
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache, **kwargs).logits for piece in pieces], dim=1)


def filled(model, length=150, batch=1, **options) -> KIVICache:
    cache = model.create_kivi_cache(**options)
    run(model, cache, tokens(batch, length).split([length - 10, *[1] * 10], dim=1))
    return cache


def state(cache: KIVICache) -> list:
    """All that a cache is: its ledger, and what is alive of its layers."""
    ledger, layers = cache.ledger, [live_tensors(layer.store) for layer in cache.kivi_layers]
    real = None if ledger.is_real is None else ledger.is_real.tolist()
    return [ledger.seq_length, ledger.lengths, ledger.packed, ledger.save().reach, ledger.geometry, real, layers]


def assert_same(loaded: KIVICache, saved: KIVICache) -> None:
    *ledger, layers = state(loaded)
    *expected, expected_layers = state(saved)
    assert ledger == expected
    for held, tensors in zip(layers, expected_layers, strict=True):
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[name], tensors[name]) and held[name].dtype == tensors[name].dtype for name in held)


def through_file(cache, path, model, **kwargs) -> KIVICache:
    cache.save(path, model=model)
    loaded = KIVICache.load(path, model, **kwargs)
    assert_same(loaded, cache)
    return loaded


# what is loaded goes on as what was saved


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k_range": "minmax", "sink_length": 0},
        {"k_bits": 16, "v_bits": 2},
        {"k_bits": 2, "v_bits": 16, "wide_channels": 0.5},
        {"k_bits": [2, 4, 8], "v_bits": [8, 2, 4], "v_rotation": True},
        {"k_bits": 4, "v_bits": 4},
        {"metadata_bits": 8, "wide_channels": 0.5},
        {"k_bits": [2, 4, 2], "wide_channels": [1.0, 0.5, 0], "metadata_bits": 8},
        {"use_kivi": False},
    ],
    ids=str,
)
def test_a_loaded_cache_goes_on_as_the_saved_one(model, path, options):
    """A batch padded on the left, so that its sequences are packed differently; then steps, a piece, and taking back."""
    cache, ids = model.create_kivi_cache(**options), tokens(3, 150)
    mask = torch.ones_like(ids)
    mask[0, :90], mask[1, :130] = 0, 0
    run(model, cache, [ids], attention_mask=mask)
    loaded = through_file(cache, path, model)
    if options.get("use_kivi", True):
        assert len(set(cache.ledger.packed)) > 1
    outputs = []
    for each in (cache, loaded):
        logits = [run(model, each, tokens(3, 40, seed=1).split(1, dim=1))]
        each.crop(-25)
        each.batch_select_indices(torch.tensor([2, 0]))
        logits.append(run(model, each, tokens(2, 30, seed=2).split([20, *[1] * 10], dim=1))[[0, 1]])
        outputs.append(torch.cat([part.flatten() for part in logits]))
    assert torch.equal(*outputs)
    assert_same(loaded, cache)


@pytest.mark.parametrize("length", [3, 4, 30, 53])
def test_a_cache_of_few_tokens(model, path, length):
    """Sinks alone, a window without codes, one group: wide channels are chosen later by the queries that were seen before."""
    cache = model.create_kivi_cache()
    run(model, cache, [tokens(2, length)])
    loaded = through_file(cache, path, model)
    later = tokens(2, 60, seed=1).split(1, dim=1)
    assert torch.equal(run(model, loaded, later), run(model, cache, later))
    assert_same(loaded, cache)


@pytest.mark.parametrize("length", [40, 150])
def test_drafts_are_taken_back_as_exactly(model, path, length):
    cache = model.create_kivi_cache()
    cache.activate_past_recording()
    run(model, cache, tokens(1, length).split([length - 20, 20], dim=1))
    loaded = through_file(cache, path, model)
    for each in (cache, loaded):
        each.crop(-18)
    assert_same(loaded, cache)
    for each in (cache, loaded):
        run(model, each, tokens(1, 60, seed=1).split([50, *[1] * 10], dim=1))
    assert_same(loaded, cache)


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text"])
@pytest.mark.parametrize("implementation", ["kivi", "sdpa"])
def test_layers_of_transformers_are_saved_too(name, implementation, path):
    """Linear attention beside full attention, and sliding windows that have slid."""
    stock = decoder(name)
    stock.set_attn_implementation(implementation)
    cache = KIVICache(stock.config, backend="torch", **SMALL)
    run(stock, cache, tokens(2, 100).split([90, 10], dim=1))
    loaded = through_file(cache, path, stock)
    later = tokens(2, 40, seed=1).split([1, 5, *[1] * 34], dim=1)
    assert torch.equal(run(stock, loaded, later), run(stock, cache, later))
    assert_same(loaded, cache)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]


def test_sliding_windows_follow_another_dtype(path):
    stock = decoder("gemma3_text")
    cache = KIVICache(stock.config, backend="torch", **SMALL)
    run(stock, cache, [tokens(1, 100)])
    cache.save(path, model=stock)
    half = copy.deepcopy(stock).bfloat16()
    loaded = KIVICache.load(path, half)
    sliding, before = loaded.layers[0], cache.layers[0]
    assert torch.equal(sliding.keys, before.keys.bfloat16()) and sliding.dtype == torch.bfloat16
    assert run(half, loaded, tokens(1, 5, seed=1).split(1, dim=1)).isfinite().all()


def test_a_cache_without_a_config(path):
    stock, _ = make_pair("llama")
    cache = KIVICache(backend="torch", **SMALL)
    run(stock, cache, [tokens(1, 100)])
    loaded = through_file(cache, path, stock)
    later = tokens(1, 30, seed=1).split(1, dim=1)
    assert torch.equal(run(stock, loaded, later), run(stock, cache, later))


def test_room_and_limits_are_those_of_a_new_cache(model, path):
    cache = filled(model)
    cache.save(path)
    assert model.load_kivi_cache(path, max_length=400).layers[0].store.key.capacity > 300
    cache_module._warn_of_nothing_to_offload.cache_clear()  # it warns once a process
    with pytest.warns(UserWarning, match="no effect"):
        run(model, model.load_kivi_cache(path, offloading=True), [tokens(1, 1)])
    with pytest.raises(ValueError, match="holds 150 tokens; got max_length=149"):
        model.load_kivi_cache(path, max_length=149)


def test_the_file_has_what_is_alive_and_no_more(model, path):
    """Its bytes are those of the tokens: no room to grow, no slots that hold nothing, the sample of the weights beside."""
    cache = filled(model, length=400, batch=2, max_length=1500)
    cache.save(path, tokens=tokens(2, 400))
    size = cache.get_cache_info()["bytes"]
    assert size["slack"] > size["total"] / 2
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
    held = sum(t.nbytes for name, t in kept.items() if name.startswith("layers."))
    dead = sum(side.window.nbytes for layer in cache.layers for side in layer.store.sides) / 48  # slots of the ring
    slots = 48 - max(400 - 4 - first for first in cache.ledger.held_from())
    assert held == size["total"] - size["slack"] - slots * dead
    header = path.stat().st_size - sum(t.nbytes for t in kept.values())
    assert kept["tokens"].nbytes + kept["weights"].nbytes < 10_000 and header < 20_000


def test_another_process_goes_on(model, path, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ids, more = tokens(1, 150), tokens(1, 7, seed=1)
    cache = model.create_kivi_cache()
    run(model, cache, [ids])
    cache.save(path, tokens=ids)
    code = """
import sys, json, torch
from modeling_llama_kivi import LlamaForCausalLM_KIVI
model = LlamaForCausalLM_KIVI.from_pretrained(sys.argv[1])
cache = model.load_kivi_cache(sys.argv[2])
ids = torch.cat([cache.tokens, torch.tensor(json.loads(sys.argv[3]))], dim=1)
out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=40)
print(json.dumps(out.tolist()))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(path), json.dumps(more.tolist())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = model.generate(torch.cat([ids, more], dim=1), past_key_values=cache, **GREEDY)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


# dtypes


def test_another_dtype_of_the_states(model, path):
    """Wider is exact; narrower rounds what is in full precision and leaves the codes; a model of another dtype asks for its."""
    cache = filled(model, k_bits=16)
    cache.save(path)
    narrow = model.load_kivi_cache(path, dtype=torch.bfloat16)
    for layer, other in zip(narrow.layers, cache.layers):
        (held, expected) = live_tensors(layer.store), live_tensors(other.store)
        for name, t in held.items():
            in_full = expected[name].dtype == torch.float32 and name != "query_energy"
            assert torch.equal(t, expected[name].bfloat16() if in_full else expected[name])
    half = copy.deepcopy(model).bfloat16()
    loaded = half.load_kivi_cache(path)  # its weights are those of the file, rounded
    assert loaded.layers[0].dtype == torch.bfloat16
    assert run(half, loaded, tokens(1, 20, seed=1).split(1, dim=1)).isfinite().all()
    loaded.save(path)
    wide = KIVICache.load(path, model.config, dtype=torch.float32)
    for layer, other in zip(wide.layers, loaded.layers):
        for name, t in live_tensors(other.store).items():
            assert torch.equal(live_tensors(layer.store)[name], t.float() if t.dtype == torch.bfloat16 else t)


def test_states_that_a_dtype_cannot_say_are_refused(model, path):
    cache = filled(model, k_bits=16)
    cache.layers[1].store.key.window[0, 0, :, 3] = 1e5
    cache.save(path)
    with pytest.raises(ValueError, match="window reach 1e\\+05, beyond torch.float16; load in torch.float32"):
        model.load_kivi_cache(path, dtype=torch.float16)
    assert model.load_kivi_cache(path, dtype=torch.bfloat16).layers[1].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, or None; got torch.int8"):
        model.load_kivi_cache(path, dtype=torch.int8)
    stock = decoder("qwen3_next")
    hybrid = KIVICache(stock.config, backend="torch", **SMALL)
    run(stock, hybrid, [tokens(1, 60)])
    hybrid.save(path, model=stock)
    with pytest.raises(ValueError, match="linear-attention layers have dtypes of their own.*load the file in float32"):
        KIVICache.load(path, stock, dtype=torch.bfloat16)


# files that are refused


def refusal(path: Path, model) -> str:
    with pytest.raises(ValueError) as raised:
        KIVICache.load(path, model)
    return str(raised.value)


def test_a_flipped_byte_anywhere_is_noticed(model, path):
    """In the length of the header, throughout the header with the checksum in it, and in the tensors."""
    cache = filled(model)
    for _ in range(100):  # safetensors orders what is in the header by chance: some of it is to be before the checksum
        cache.save(path, tokens=tokens(1, 150))
        whole = path.read_bytes()
        if whole.index(b'"state":') < whole.index(b'"sha256":'):
            break
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    checksum = whole.index(b'"sha256":"')
    places = {*range(8), *range(checksum, checksum + 76), *range(8, header, 41), len(whole) - 1}
    places |= {draw.randrange(8, header) for _ in range(100)} | {draw.randrange(header, len(whole)) for _ in range(200)}
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= draw.choice([1 << bit for bit in range(8)] + [255])
        path.write_bytes(altered)
        assert "altered" in refusal(path, model.config), f"byte {place} of {len(whole)}"
    path.write_bytes(whole)
    KIVICache.load(path, model.config)


def test_truncated_and_foreign_files_are_refused(model, path, tmp_path):
    filled(model).save(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is not a saved KIVI cache, or was truncated or altered" in refusal(path, model)
    path.write_bytes(whole + b"\0")
    assert "altered" in refusal(path, model)
    path.write_text("some text, longer than eight bytes")
    assert "is not a saved KIVI cache" in refusal(path, model)
    torch.save({"a": torch.zeros(3)}, path)
    assert "is not a saved KIVI cache" in refusal(path, model)
    save_file({"a": torch.zeros(3)}, path, {"sha256": "0" * 64})
    assert "is not a saved KIVI cache, or its header was altered: its kind is None" in refusal(path, model)
    files.write_checked(path, "something-else", {}, {})
    assert "its kind is 'something-else'" in refusal(path, model)
    files.write_checked(path, "kivi-cache", {}, {"version": "4"})
    assert "version 4 of the format and this code reads version 3" in refusal(path, model)
    assert "there is no file" in refusal(tmp_path / "nothing", model) and "no file" in refusal(tmp_path, model)


@pytest.mark.parametrize("options", [{"k_bits": 4}, {"v_bits": [2, 4, 2]}, {}, {"k_bits": 8, "v_bits": 16}], ids=str)
def test_files_of_an_older_version_are_read_where_their_codes_lie_as_ever(model, path, monkeypatch, options):
    cache = filled(model, **options)
    with monkeypatch.context() as patch:
        patch.setattr(saved_module, "VERSION", 2)
        cache.save(path)
    if 4 in itertools.chain(*(bits if isinstance(bits, list) else [bits] for bits in options.values())):
        assert "has 4-bit codes of version 2 of the format, which version 3 stores in another way" in refusal(
            path, model
        )
    else:
        assert_same(KIVICache.load(path, model), cache)


@pytest.mark.parametrize("where", ["save_file", "os.fsync", "os.replace"])
def test_an_interrupted_save_leaves_the_old_file(model, path, monkeypatch, where):
    cache = filled(model)
    cache.save(path)
    before = path.read_bytes()
    run(model, cache, [tokens(1, 20, seed=1)])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"modules.files.{where}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    cache.save(path)
    assert model.load_kivi_cache(path).get_seq_length() == 170


def test_other_users_may_read_it_as_they_may_other_files(model, path):
    filled(model).save(path)
    path.with_name("plain").touch()
    assert path.stat().st_mode == path.with_name("plain").stat().st_mode


# whose it is


def test_another_model_is_refused(model, path):
    """One of another shape, one of the same shape with other weights, and one that was trained a little further."""
    filled(model).save(path)
    assert "model_type is 'llama' in the file and 'qwen3' here" in refusal(path, make_pair("qwen3")[1])
    other_base = copy.deepcopy(model.config)
    other_base.rope_parameters = {**other_base.rope_parameters, "rope_theta": 5e5}
    assert "rope_parameters is" in refusal(path, other_base)
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    count = len(list(model.model.named_parameters()))
    assert f"{count} of {count} parameters differ" in refusal(path, other)
    tuned = copy.deepcopy(model)
    tuned.model.layers[1].self_attn.v_proj.weight.data *= 1.0001
    assert f"1 of {count} parameters differ, layers.1.self_attn.v_proj.weight" in refusal(path, tuned)
    tuned.model.layers[1].self_attn.v_proj.bias = torch.nn.Parameter(torch.zeros(64))
    assert "other parameters than the one that filled the file, layers.1.self_attn.v_proj.bias" in refusal(path, tuned)


def test_the_same_weights_are_known_in_other_hands(model, path):
    """A stock model, its base model, a config alone, another dtype, another head: none decides keys and values."""
    cache = filled(model)
    cache.save(path)
    stock, _ = make_pair("llama")
    torch.nn.init.normal_(stock.lm_head.weight)
    for other in (stock, stock.model, model.config, stock.config, copy.deepcopy(model).half()):
        assert KIVICache.load(path, other).ledger.lengths == [150]
    cache.save(path, model=model.config)  # weights are not to be compared
    torch.nn.init.normal_(stock.model.layers[0].self_attn.k_proj.weight)
    assert KIVICache.load(path, stock).ledger.lengths == [150]


def test_a_cache_says_whose_it_is(model, path):
    """A KIVI model is known from the step; of a stock model, and in another process, save() has to be told."""
    stock, _ = make_pair("llama")
    cache = KIVICache(stock.config, backend="torch", **SMALL)
    run(stock, cache, [tokens(1, 60)])
    with pytest.raises(ValueError, match="does not know which model filled it: pass save\\(path, model=model\\)"):
        cache.save(path)
    with pytest.raises(
        ValueError, match="not the model that filled the cache: .*num_hidden_layers is 3 in the cache and 32 here"
    ):
        cache.save(path, model=type(stock.config)())
    with pytest.raises(ValueError, match="model must be a model of transformers or its config; got str"):
        cache.save(path, model="llama")
    assert not path.exists()
    cache.save(path, model=stock)
    loaded = model.load_kivi_cache(path)
    copy.deepcopy(loaded).save(path)  # of the model that it was loaded for
    assert model.load_kivi_cache(path).ledger.lengths == [60]


def test_other_options_are_refused(model, path):
    filled(model, k_bits=4).save(path)
    loaded = model.load_kivi_cache(path, k_bits=4, backend="numba")
    assert loaded.options.k_bits == 4 and loaded.options.backend == "numba"
    for option, value, saved in (("k_bits", 2, 4), ("residual_length", 64, 32), ("v_bits", [2, 2, 4], 2)):
        message = re.escape(f"{option} is {saved!r} in the file and {value!r} here")
        with pytest.raises(ValueError, match=f"saved with other options: {message}"):
            model.load_kivi_cache(path, **{option: value})
    with pytest.raises(ValueError, match="no option 'kbits'"):
        model.load_kivi_cache(path, kbits=4)


# caches that cannot be saved


def test_no_cache_is_saved_in_the_middle_of_a_step(model, path):
    cache = filled(model)
    with cache.step(cache.new_step(None, 1, 1), over_codes=True):
        with pytest.raises(ValueError, match="in the middle of a step"):
            cache.save(path, model=model)
        run_in_step(model, cache)
    assert not path.exists()
    stock, _ = make_pair("llama")
    stock.set_attn_implementation("kivi")
    cache = KIVICache(stock.config, backend="torch", **SMALL)
    run(stock, cache, [tokens(1, 60)])
    before = state(cache)[:3]
    cache.get_mask_sizes(1, 0)
    cache.update(*[torch.zeros(1, 2, 1, 32)] * 2, 0)  # and no other layer: the forward was broken off
    with pytest.raises(ValueError, match="the last forward gave no states to the layers"):
        cache.save(path, model=stock)
    assert state(cache)[:3] == before
    cache.save(path, model=stock)


def run_in_step(model, cache) -> None:
    """The new token of the open step, in every layer."""
    for index, layer in enumerate(cache.layers):
        key, value = random_states((1, 2, 1, 32), seed=index)
        cache.store(key, value, layer, cache.ledger.open.step)


def test_where_it_cannot_be_written_is_said_before_work(model, path, tmp_path, monkeypatch):
    cache = filled(model)
    with pytest.raises(ValueError, match="nothing to save"):
        model.create_kivi_cache().save(path, model=model)
    monkeypatch.setattr("modules.cache.saved.live_tensors", lambda layer: pytest.fail("worked in vain"))
    with pytest.raises(ValueError, match=f"there is no folder {re.escape(str(tmp_path))}/a/b. Make it first"):
        cache.save(tmp_path / "a" / "b" / "file")
    with pytest.raises(ValueError, match="that is a folder"):
        cache.save(tmp_path)


# its tokens


def test_tokens_are_saved_and_checked(model, path):
    ids, question = tokens(2, 150), tokens(2, 5, seed=1)
    cache = model.create_kivi_cache()
    run(model, cache, [ids])
    for wrong in (ids[:, :-1], ids[:1], ids[0], ids.float(), ids.tolist()):
        with pytest.raises(ValueError, match="tokens must be the ids of all 150 columns of the cache's 2 sequences"):
            cache.save(path, tokens=wrong)
    cache.save(path, tokens=ids)
    loaded = model.load_kivi_cache(path)
    assert torch.equal(loaded.tokens, ids) and model.create_kivi_cache().tokens is None
    asked = torch.cat([loaded.tokens, question], dim=1)
    others = asked.clone()
    others[1, 70] += 1
    with pytest.raises(ValueError, match="not those that the cache holds from column 70 on.*cache.tokens"):
        model.generate(others, past_key_values=loaded, **GREEDY)
    assert_same(loaded, cache)
    answer = model.generate(asked, past_key_values=loaded, **GREEDY)
    assert torch.equal(answer, model.generate(asked, past_key_values=cache, **GREEDY))
    loaded.crop(-60)  # the answer, and a part of the question and the prompt: the rest is known
    assert torch.equal(loaded.tokens, ids[:, : loaded.get_seq_length()])
    loaded.batch_select_indices(torch.tensor([1]))
    assert torch.equal(loaded.tokens, ids[1:, : loaded.get_seq_length()])
    loaded.reset()
    assert loaded.tokens is None


def test_the_last_token_of_an_answer_is_saved_with_it(model, path):
    """generate() has not fed it yet; another one may take its place."""
    cache = model.create_kivi_cache()
    ids = model.generate(tokens(1, 60), past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == ids.shape[1] - 1
    cache.save(path, tokens=ids)
    loaded = model.load_kivi_cache(path)
    assert torch.equal(loaded.tokens, ids)
    loaded.save(path)  # tokens and all, as it has not moved on
    loaded = model.load_kivi_cache(path)
    changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1, tokens(1, 3, seed=1)], dim=1)
    settings = {**GREEDY, "attention_mask": torch.ones_like(changed)}
    answers = [model.generate(changed, past_key_values=each, **settings) for each in (loaded, cache)]
    assert torch.equal(*answers)
    assert torch.equal(loaded.tokens, ids[:, :-1])
    loaded.save(path)
    assert model.load_kivi_cache(path).tokens is None  # the cache has moved on from those that are known


# static INT8


def static_parameters(model) -> StaticParameters:
    """Scales of random ranges for all layers but the first."""
    facts = model_facts(model.config)
    spread = (
        torch.rand(4, facts["num_key_value_heads"], facts["head_dim"], generator=torch.Generator().manual_seed(5)) / 10
    )
    ranges = (-spread[0], spread[1], -spread[2], spread[3])
    sides = ChannelScales.from_range(*ranges[:2], True), ChannelScales.from_range(*ranges[2:], False)
    layers = range(1, facts["num_hidden_layers"])
    return StaticParameters(dict.fromkeys(layers, sides), facts, {"made": "here"}, dict.fromkeys(layers, ranges), 9)


def test_static_int8_takes_its_scales_along(model, path):
    cache = model.create_kivi_cache(static=static_parameters(model), backend="torch")
    run(model, cache, [tokens(2, 60)])
    loaded = through_file(cache, path, model)
    assert_same(loaded, cache)
    more = tokens(2, 5, seed=3)
    assert torch.equal(run(model, loaded, [more]), run(model, cache, [more]))
    assert loaded.static.spec == {"made": "here"} and loaded.get_cache_info()["saturated"]["total"] > 0
    assert StaticInt8Cache.load(path, model).get_seq_length() == 60
    with pytest.raises(ValueError, match="other options: k_bits is"):
        KIVICache.load(path, model, k_bits=2)
    run_and_save = filled(model)
    run_and_save.save(path)
    with pytest.raises(ValueError, match="static must be calibrated parameters"):
        StaticInt8Cache.load(path, model)


# a real model, and the page


@pytest.fixture(scope="module")
def smollm2():
    return load_any(real_model_path("llama"), dtype=torch.float32)


@pytest.mark.real_model
def test_a_prompt_of_4000_tokens(smollm2, path, record_property):
    """It loads in under a second, is as large as the cache, and is answered as if it had never been saved."""
    model, tokenizer = smollm2
    text = " ".join((ROOT / "docs" / name).read_text() for name in ("architecture.md", "quality.md", "performance.md"))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :4000]
    assert ids.shape[1] == 4000
    cache = model.create_kivi_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    cache.save(path, tokens=ids)
    size = cache.get_cache_info()["bytes"]
    alive = size["total"] - size["slack"]
    assert 0.9 * alive < path.stat().st_size < 1.02 * alive
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        loaded = model.load_kivi_cache(path)
        seconds.append(time.perf_counter() - start)
    record_property("seconds", seconds)
    assert min(seconds) < 1
    more = tokenizer(" In short:", return_tensors="pt", add_special_tokens=False).input_ids
    ids = torch.cat([loaded.tokens, more], dim=1)
    settings = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    answers = [model.generate(ids, past_key_values=each, **settings) for each in (loaded, cache)]
    assert torch.equal(*answers)


@pytest.mark.real_model
def test_the_page_does_what_it_says(smollm2, tmp_path, monkeypatch):
    """Its blocks of Python run, one after the other."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = smollm2
    (tmp_path / "report.txt").write_text(PAGE.read_text()[:2000])
    names = {"load_llama_kivi": lambda *args, **kwargs: (model, tokenizer)}
    blocks = pages.blocks(PAGE, "python")
    assert len(blocks) > 2
    for block in blocks:
        pages.run_python(block, names, {"from modeling_llama_kivi import load_llama_kivi\n": ""})
