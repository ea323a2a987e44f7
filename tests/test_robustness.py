"""What a cache meets outside its own model's decode loop: other models, odd arguments, failures, devices, threads, compilers."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from conftest import FAMILIES, SIZES, SMALL, make_pair, relative_error, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_llama_kivi import LlamaForCausalLM_KIVI, LlamaKIVIConfig
from modules.cache import cache as cache_module
from modules.kivi_cache_general import KIVICache
from modules.options import MOST_TOKENS, KIVIOptions
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide

GREEDY = {"do_sample": False, "use_cache": True, "suppress_tokens": [0]}
LLAMA = {**SIZES, "head_dim": 32}


def run(model, cache, *pieces, **kwargs):
    """Logits of successive pieces through one cache, joined."""
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache, **kwargs).logits for piece in pieces], dim=1)


def contents(cache: KIVICache) -> list[torch.Tensor]:
    """All that a cache holds, dequantized."""
    return [layer.dense(side) for layer in cache.kivi_layers for side in layer.store.sides]


# --- caches of other models -------------------------------------------------------------------------------------------

OTHER_MODELS = {
    "more KV heads": ({"num_key_value_heads": 3}, "keys of 2 heads of 32 channels"),
    "fewer KV heads": ({"num_key_value_heads": 1}, "keys of 2 heads of 32 channels"),
    "wider heads": ({"head_dim": 64}, "keys of 2 heads of 32 channels"),
    "narrower heads": ({"head_dim": 16}, "keys of 2 heads of 32 channels"),
    "queries that no KV heads share": ({"num_attention_heads": 3, "num_key_value_heads": 3}, "keys of 2 heads"),
    "fewer layers": ({"num_hidden_layers": 2}, r"no states to the layers \[2\]"),
    "more layers": ({"num_hidden_layers": 4}, "the cache has 3 layers"),
    "another dtype": ({"dtype": torch.bfloat16}, "float32 states and the new ones are torch.bfloat16"),
}


def make_model(kind: str, sizes: dict, **options):
    """A random Llama, of a KIVI class or a stock one, which may attend over codes; `options` for a cache of its own."""
    torch.manual_seed(0)
    dtype = {**sizes}.pop("dtype", torch.float32)
    sizes = {name: value for name, value in sizes.items() if name != "dtype"}
    if kind == "KIVI":
        return LlamaForCausalLM_KIVI(LlamaKIVIConfig(**sizes, **SMALL, **options)).eval().to(dtype)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(dtype)
    if kind == "stock, attending over codes":
        model.set_attn_implementation("kivi")
    return model


KINDS = ("KIVI", "stock", "stock, attending over codes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", OTHER_MODELS)
def test_a_cache_of_another_model_is_refused_and_kept(kind, other):
    changes, message = OTHER_MODELS[other]
    first, second = make_model(kind, LLAMA), make_model(kind, {**LLAMA, **changes})
    prompt, later = tokens(2, 90), tokens(2, 20, seed=1)
    for length in (1, 20):
        cache, untouched = (KIVICache(first.config, backend="numba", **SMALL) for _ in range(2))
        for each in (cache, untouched):
            run(first, each, prompt)
        before = contents(cache)
        with pytest.raises(ValueError, match=message):
            run(second, cache, later[:, :length])
            run(second, cache, later[:, :length])  # a stock model says that it has ended when it begins again
        assert cache.get_seq_length() == 90 and len(cache) == 3
        assert all(map(torch.equal, contents(cache), before))
        assert torch.equal(run(first, cache, later), run(first, untouched, later))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["fewer layers", "more layers"])
def test_an_empty_cache_of_another_model_is_refused_and_stays_empty(kind, other):
    second = make_model(kind, {**LLAMA, **OTHER_MODELS[other][0]})
    cache = KIVICache(LlamaConfig(**LLAMA), backend="torch", **SMALL)
    with pytest.raises(ValueError, match="create_kivi_cache"):
        run(second, cache, tokens(1, 60), tokens(1, 1))
    assert cache.get_seq_length() == 0 and not cache.get_cache_info()["bytes"]["total"]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2.7, "3", None, torch.tensor(2.0), torch.tensor([1, 2])])
def test_crop_takes_whole_numbers(value):
    _, kivi = make_pair("llama", backend="torch")
    cache = kivi.create_kivi_cache()
    run(kivi, cache, tokens(1, 60))
    with pytest.raises(ValueError, match="whole number"):
        cache.crop(value)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("name", ["k_bits", "v_bits"])
@pytest.mark.parametrize("value", [torch.tensor(2), 2 + 0j, 2.0, True, "2", None, [2, 4, torch.tensor(2)]])
def test_bits_are_plain_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of 2, 4, 8, 16"):
        KIVICache(LlamaConfig(**LLAMA), **SMALL, **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"residual_length": 10**12},
        {"sink_length": 10**12},
        {"group_size": 10**12, "residual_length": 10**12},
        {"max_length": 10**12},
        {"residual_length": torch.tensor(32)},
        {"sink_length": 4.0},
    ],
)
def test_lengths_are_those_of_a_text(options):
    with pytest.raises(ValueError, match=f"whole number of tokens.*at most {MOST_TOKENS}"):
        KIVICache(LlamaConfig(**LLAMA), **{**SMALL, **options})


def test_a_chunk_is_a_length_too():
    _, kivi = make_pair("llama")
    with pytest.raises(ValueError, match="prefill_chunk must be a whole number of tokens"):
        kivi.prefill_chunk = 10**12


@pytest.mark.parametrize("stored", [0, 60])
def test_masks_are_tensors_of_tokens(stored):
    _, kivi = make_pair("llama", backend="torch")
    cache = kivi.create_kivi_cache()
    if stored:
        run(kivi, cache, tokens(1, stored))
    for mask in ([[1] * (stored + 5)], torch.ones(stored + 5), torch.ones(1, 1, 5, stored + 5)):
        with pytest.raises(ValueError, match=r"a tensor \[batch, tokens\]"):
            run(kivi, cache, tokens(1, 5), attention_mask=mask)
        assert cache.get_seq_length() == stored


@pytest.mark.parametrize(
    "inputs", [{"input_ids": tokens(1, 9)[0]}, {"inputs_embeds": torch.zeros(9, SIZES["hidden_size"])}]
)
def test_inputs_have_a_batch(inputs):
    _, kivi = make_pair("llama", backend="torch")
    cache = kivi.create_kivi_cache()
    with pytest.raises(ValueError, match=r"input_ids \[batch, tokens\]"):
        kivi(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 0


# --- offloading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", 1, None])
def test_offloading_is_a_flag(value):
    _, kivi = make_pair("llama")
    with pytest.raises(ValueError, match="offloading must be True or False"):
        kivi.create_kivi_cache(offloading=value)


def test_offloading_on_a_cpu_works_and_says_once_that_it_has_no_effect():
    _, kivi = make_pair("llama", backend="torch")
    ids = tokens(2, 90)
    expected = kivi.generate(ids, past_key_values=kivi.create_kivi_cache(), max_new_tokens=20, **GREEDY)
    cache_module._warn_of_nothing_to_offload.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cache = kivi.create_kivi_cache(offloading=True)
        out = kivi.generate(ids, past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert torch.equal(out, expected)
    assert len([w for w in seen if "offloading=True has no effect" in str(w.message)]) == 1


@pytest.mark.parametrize("failing", [None, "weights", "states", "prefetch"])
def test_an_offloaded_layer_is_on_the_cpu_whatever_happens(monkeypatch, failing):
    """Where its tensors were sent last, layer by layer; there is no other device here to send them to."""
    _, kivi = make_pair("llama", backend="torch")
    cache = kivi.create_kivi_cache(offloading=True)
    run(kivi, cache, tokens(1, 90))
    last, most = {}, []
    for number, layer in enumerate(cache.layers):
        layer.device = torch.device("meta", number)

    def to(store, device):
        number = [layer.store for layer in cache.layers].index(store)
        last[number] = str(device)
        most.append(sum(where != "cpu" for where in last.values()))
        if failing == "prefetch" and number == 1 and last[number] != "cpu":
            raise MemoryError

    monkeypatch.setattr(PackedLayer, "to", to)
    monkeypatch.setattr(type(cache.layers[0]), "_check_shapes", lambda *_: None)  # devices differ, as is meant here
    if failing == "weights":

        def stop(*_):
            raise RuntimeError("weights")

        kivi.model.layers[1].mlp.register_forward_hook(stop)
    if failing == "states":
        torch.nn.init.constant_(kivi.model.layers[1].self_attn.k_proj.weight, torch.inf)
    with pytest.raises((RuntimeError, ValueError, MemoryError)) if failing else warnings.catch_warnings():
        run(kivi, cache, tokens(1, 1))
    assert last and set(last.values()) == {"cpu"} and max(most) == 1
    assert cache.get_seq_length() == 90 + (failing is None)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 7])
def test_generation_over_a_cache_that_is_ahead_says_what_to_do(extra):
    _, kivi = make_pair("llama", backend="torch", wide_channels=0)
    ids, cache = tokens(1, 60), kivi.create_kivi_cache()
    run(kivi, cache, torch.cat([ids, tokens(1, extra, seed=1)], dim=1))
    with pytest.raises(ValueError, match=rf"holds {60 + extra} tokens.*crop\({-1 - extra}\)"):
        kivi.generate(ids, past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert cache.get_seq_length() == 60 + extra
    cache.crop(-1 - extra)  # none of these tokens was packed, so all is as if they had never come
    fresh = kivi.create_kivi_cache()
    run(kivi, fresh, ids[:, :59])
    expected = kivi.generate(ids, past_key_values=fresh, max_new_tokens=30, **GREEDY)
    assert torch.equal(kivi.generate(ids, past_key_values=cache, max_new_tokens=30, **GREEDY), expected)


class Stop(Exception):
    """Ends a generation."""


def test_a_generation_that_was_broken_off_goes_on_with_all_its_tokens():
    _, kivi = make_pair("llama", backend="torch")
    ids, cache, seen = tokens(1, 60), kivi.create_kivi_cache(), []

    def stop(all_ids, scores, **kwargs):
        seen.append(all_ids)
        if len(seen) == 9:
            raise Stop
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(Stop):
        kivi.generate(ids, past_key_values=cache, max_new_tokens=20, stopping_criteria=[stop], **GREEDY)
    with pytest.raises(ValueError, match="of which none is new"):
        kivi.generate(ids, past_key_values=cache, max_new_tokens=20, **GREEDY)
    out = kivi.generate(seen[-1], past_key_values=cache, max_new_tokens=11, **GREEDY)
    assert torch.equal(out, kivi.generate(ids, past_key_values=kivi.create_kivi_cache(), max_new_tokens=20, **GREEDY))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [1, 4])
def test_gradients_stop_at_stored_tokens_with_a_warning(training, length):
    _, kivi = make_pair("llama", backend="torch")
    kivi.train(training)
    cache = kivi.create_kivi_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kivi, cache, tokens(1, 60), tokens(1, length))
        with torch.inference_mode():
            kivi(tokens(1, length), past_key_values=cache)
    with pytest.warns(UserWarning, match="no gradients"):
        kivi(tokens(1, length), past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_of_a_config_is_kept(family):
    _, _, config_class, model_class, extra = FAMILIES[family]
    config = config_class(**{**SIZES, **extra}, use_cache=False)
    config.gradient_checkpointing = True
    model = model_class(config)
    assert model.is_gradient_checkpointing and not hasattr(config, "gradient_checkpointing")
    model.train()
    model(tokens(1, 20), labels=tokens(1, 20)).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_config", [False, True])
def test_a_cache_is_freed_when_it_is_let_go(with_config):
    """By counting references: codes must not wait for the garbage collector."""
    _, kivi = make_pair("llama", backend="torch")
    stock, _ = make_pair("llama")
    gc.collect()
    gc.disable()
    try:
        for model in (kivi, stock):
            cache = KIVICache(LlamaConfig(**LLAMA) if with_config else None, backend="torch", **SMALL)
            run(model, cache, tokens(1, 80), tokens(1, 1), tokens(1, 20))
            gone = weakref.ref(cache), weakref.ref(cache.layers[0].store.key.codes.untyped_storage())
            del cache
            assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["KIVI", "stock"])
@pytest.mark.parametrize("length", [1, 200])
def test_one_layer_grows_at_a_time(monkeypatch, kind, length):
    """The codes that a layer had before it grew are gone before the next one grows; a copy of them all is another cache."""
    stock, kivi = make_pair("llama", backend="torch")
    model = kivi if kind == "KIVI" else stock
    cache = kivi.create_kivi_cache()
    run(model, cache, tokens(1, 300))
    old: list[weakref.ref] = []
    alive: list[int] = []
    grow = PackedSide.grow

    def watched(side: PackedSide, capacity: int) -> None:
        alive.append(sum(ref() is not None for ref in old))  # of layers, or the other side, that have grown before
        old.append(weakref.ref(side.codes.untyped_storage()))
        grow(side, capacity)

    monkeypatch.setattr(PackedSide, "grow", watched)
    while len(old) < 6:
        run(model, cache, tokens(1, length))
    assert len(old) == 6 and max(alive) <= 2  # the two sides of one layer


def append(cache: KIVICache, states: list[torch.Tensor]) -> None:
    """Store a step, without a copy of what is stored."""
    step = cache.new_step(None, 1, states[0].shape[2])
    with cache.step(step, over_codes=True):
        for layer in cache.layers:
            layer.append(*states, step)
            cache.ledger.open.written.add(layer.layer_idx)


@pytest.mark.parametrize("chunk", [2048, 32000])
def test_llama_8b_at_32k_tokens_is_5_times_smaller_slack_included(chunk):
    """One KV head of its layers, filled in chunks and then token by token, through several groups and growths."""
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, hidden_size=512)
    cache = KIVICache(config, backend="numba")
    states = [torch.randn(1, 1, 32768, 128).to(torch.float16) for _ in "kv"]
    for part in zip(*(side[:, :, :32640].split(chunk, dim=2) for side in states)):
        append(cache, list(part))
    ratios, grown = [], {}
    while cache.get_seq_length() < 32768 + 700:
        append(cache, [side[:, :, :1] for side in states])
        grown[cache.layers[0].store.key.capacity] = True
        if cache.get_seq_length() >= 32768:
            ratios.append(cache.get_cache_info()["bytes"]["ratio"])
    assert min(ratios) >= 5.1 and len(grown) > 1


class SeenMasks(TorchDispatchMode):
    """Shapes of the tensors that an operation makes and that look like a mask `[.., q, kv]`."""

    def __init__(self, length: int, columns: int) -> None:
        super().__init__()
        self.shape, self.seen = (length, columns), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and tuple(t.shape[-2:]) == self.shape:
                self.seen.append(f"{func}: {tuple(t.shape)}, {t.dtype}")
        return out


@pytest.mark.parametrize("kind", ["KIVI", "stock, attending over codes"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_no_mask_is_made_for_several_new_tokens_over_a_packed_past(kind, is_padded):
    model = make_model(kind, LLAMA)
    cache, mask = KIVICache(model.config, backend="numba", **SMALL), torch.ones(2, 1000, dtype=torch.long)
    if is_padded:
        mask[0, :300] = 0
    with torch.no_grad():
        model(tokens(2, 900), attention_mask=mask[:, :900], past_key_values=cache)
        with SeenMasks(100, 1000) as made:
            model(tokens(2, 100), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 1000 and not made.seen


# --- devices, threads, compilers --------------------------------------------------------------------------------------


def test_weights_on_the_cpu_and_on_disk_give_the_same_logits(tmp_path):
    pytest.importorskip("accelerate")
    stock, kivi = make_pair("llama", backend="torch")
    kivi.save_pretrained(tmp_path / "model")
    ids = tokens(2, 120)
    expected = run(kivi, kivi.create_kivi_cache(), ids[:, :100], ids[:, 100:101], ids[:, 101:])
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    for name, where in (("cpu", ("cpu",) * 3), ("disk", ("cpu", "disk", "disk"))):
        device_map = {**places, **{f"model.layers.{number}": place for number, place in enumerate(where)}}
        model = LlamaForCausalLM_KIVI.from_pretrained(
            tmp_path / "model", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / name
        )
        out = run(model, model.create_kivi_cache(), ids[:, :100], ids[:, 100:101], ids[:, 101:])
        assert torch.equal(out, expected)
        generated = model.generate(ids, past_key_values=model.create_kivi_cache(), max_new_tokens=10, **GREEDY)
        again = kivi.generate(ids, past_key_values=kivi.create_kivi_cache(), max_new_tokens=10, **GREEDY)
        assert torch.equal(generated, again)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_two_threads_generate_at_once_with_one_model(backend, implementation):
    stock, kivi = make_pair("llama", backend=backend)
    kivi.set_attn_implementation(implementation)
    prompts = [tokens(2, 70, seed=3), tokens(1, 90, seed=4)]
    expected = [
        kivi.generate(ids, past_key_values=kivi.create_kivi_cache(), max_new_tokens=40, **GREEDY) for ids in prompts
    ]
    stock_expected = stock.generate(prompts[0], past_key_values=DynamicCache(), max_new_tokens=40, **GREEDY)
    results = {}

    def generate(number: int, ids: torch.Tensor, make) -> None:
        results[number] = kivi.generate(ids, past_key_values=make(), max_new_tokens=40, **GREEDY)

    jobs = [
        (0, prompts[0], kivi.create_kivi_cache),
        (1, prompts[1], kivi.create_kivi_cache),
        (2, prompts[0], DynamicCache),
    ]
    threads = [threading.Thread(target=generate, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    assert torch.equal(results[2], stock_expected)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_compiled_forward_gives_the_same_tokens(backend):
    kivi = make_model("KIVI", {**LLAMA, "num_hidden_layers": 2}, backend=backend)
    prompt = tokens(1, 70)

    def decode(forward):
        cache, ids, out = kivi.create_kivi_cache(), prompt, []
        with torch.no_grad():
            for _ in range(4):
                ids = forward(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                out.append(ids.item())
        return out

    expected = decode(kivi.forward)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert decode(torch.compile(kivi.forward)) == expected
    torch._dynamo.reset()
    assert not [str(w.message) for w in seen if "modules/" in w.filename or "kivi" in str(w.message).lower()]


# --- what transformers asks of a cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 16])
def test_beams_of_a_stock_model_over_a_kivi_cache(bits):
    """Each beam must go on from its own past; at 2 bits the rebuilt states of the KIVI model say what that is."""
    stock, kivi = make_pair("llama", backend="torch")
    ids = tokens(1, 60)
    modes = {"num_beams": 3, "max_new_tokens": 12, **GREEDY}
    out = stock.generate(ids, past_key_values=kivi.create_kivi_cache(k_bits=bits, v_bits=bits), **modes)
    if bits == 16:
        expected = stock.generate(ids, past_key_values=DynamicCache(), **modes)
    else:
        kivi.set_attn_implementation("eager")
        expected = kivi.generate(ids, past_key_values=kivi.create_kivi_cache(), **modes)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ["assistant", "prompt lookup"])
def test_drafts_leave_nothing_behind_at_sixteen_bits(mode):
    stock, kivi = make_pair("llama", backend="torch")
    ids = tokens(1, 40).repeat(1, 2)
    extra = {"assistant_model": make_pair("llama")[0]} if mode == "assistant" else {"prompt_lookup_num_tokens": 5}
    cache = kivi.create_kivi_cache(use_kivi=False)
    out = kivi.generate(ids, past_key_values=cache, max_new_tokens=30, **GREEDY, **extra)
    assert torch.equal(out, stock.generate(ids, past_key_values=DynamicCache(), max_new_tokens=30, **GREEDY))
    assert cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize("way", ["draft", "failed step", "selection", "emptied"])
def test_queries_that_were_taken_back_do_not_count(way):
    """They help to choose the wide channels; with room for drafts those of the newest tokens are known one by one."""
    kivi = make_model("KIVI", LLAMA, backend="torch")
    cache = kivi.create_kivi_cache(max_length=200)
    cache.activate_past_recording()
    run(kivi, cache, tokens(3, 20))
    store, kept = cache.layers[1].store, [0, 1, 2]
    before = store.query_energy.clone()
    run(kivi, cache, tokens(3, 1))
    if way == "failed step":
        hook = kivi.model.layers[1].mlp.register_forward_hook(lambda *_: torch.zeros(1)[1])
        with pytest.raises(IndexError):
            run(kivi, cache, tokens(3, 5))
        hook.remove()
    if way == "selection":
        kept = [2, 0]
        cache.batch_select_indices(torch.tensor(kept))
    run(kivi, cache, tokens(len(kept), 7))
    cache.crop(-8)
    if way == "emptied":
        cache.reset()
        before = torch.zeros_like(before)
    assert torch.allclose(store.query_energy, before[kept], rtol=1e-5, atol=1e-5)


def test_a_cache_that_is_saved_and_loaded_goes_on(tmp_path):
    _, kivi = make_pair("llama", backend="numba")
    ids, cache = tokens(2, 120), kivi.create_kivi_cache()
    run(kivi, cache, ids[:, :100])
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    twin = copy.deepcopy(cache)
    expected = run(kivi, cache, *ids[:, 100:].split(1, dim=1))
    for each in (loaded, twin):
        assert torch.equal(run(kivi, each, *ids[:, 100:].split(1, dim=1)), expected)
    assert loaded.options == KIVIOptions.from_config(kivi.config)


def test_a_model_that_is_saved_and_loaded_decodes_the_same(tmp_path):
    _, kivi = make_pair("llama", backend="torch", k_bits=4)
    kivi.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM_KIVI.from_pretrained(tmp_path)
    ids = tokens(2, 90)
    outputs = [run(model, model.create_kivi_cache(), ids[:, :80], ids[:, 80:]) for model in (kivi, loaded)]
    assert loaded.config.k_bits == 4 and relative_error(*outputs) == 0
