"""The Triton backend in whole models, and decoding from graphs. `test_triton.py` runs these as it does `triton_cases.py`:

TRITON_INTERPRET=1 python -m pytest tests/graph_cases.py
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from conftest import FAMILIES, SIZES, SMALL, relative_error, tokens
from layers import random_scales
from triton_cases import SMALL_METADATA, kernels  # noqa: F401 - a fixture

from modules.codecs.static import StaticParameters, model_facts
from modules.kernels.registry import REGISTRY, Entry
from modules.kernels.triton import attention
from modules.models.graphs import DecodeRunner, _Capture, _warn_of_hooks
from modules.store.step import Step

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture
def allowed(monkeypatch):
    """Caches take the Triton backend, also where the interpreter runs it."""
    monkeypatch.setitem(REGISTRY, "triton", Entry("modules.kernels.triton", "triton", None))


def small_model(family):
    """One random KIVI layer with heads that the kernels know; float16 on the GPU, float32 in the interpreter."""
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    _, _, config_class, model_class, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **SMALL, **sizes})).eval()
    return model.to(DEVICE, torch.float16 if ON_GPU else torch.float32)


def left_padded(batch, length, padding):
    """Token ids and their mask; the first sequence has `padding` places of padding."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids.to(DEVICE), mask.to(DEVICE)


def static_parameters(config):
    """Scales for all layers of a model, not fitted to it."""
    shape = config.num_key_value_heads, config.head_dim
    scales = random_scales(*shape, True), random_scales(*shape, False)
    return StaticParameters(dict.fromkeys(range(config.num_hidden_layers), scales), model_facts(config), {}, {}, 0)


@pytest.mark.parametrize(
    "family, how", [*((family, {}) for family in FAMILIES), ("llama", "static"), ("llama", SMALL_METADATA)]
)
def test_logits_of_whole_models(kernels, allowed, family, how):  # noqa: F811
    """A padded batch in chunks and single tokens, over a packing: as with the torch backend."""
    model = small_model(family)
    options = {"static": static_parameters(model.config)} if how == "static" else how
    ids, mask = left_padded(2, 69, 7)
    logits = {}
    for backend in ("torch", "triton"):
        cache, outputs, seen = model.create_kivi_cache(backend=backend, **options), [], 0
        with torch.inference_mode():
            for piece in ids.split([64, 2, 1, 1, 1], dim=1):
                seen += piece.shape[1]
                outputs.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        assert cache.get_cache_info()["backend"] == backend
        logits[backend] = torch.cat(outputs, dim=1)[mask.bool()].float()
    assert relative_error(logits["triton"], logits["torch"]) < (1e-2 if ON_GPU else 2e-3)


class _Replay:
    """What a CUDA graph does, without one: the step runs again, and the host's side of the ledger does not notice."""

    def __init__(self, model, cache, ids, positions, step, logits):
        self.model, self.cache = model, weakref.ref(cache)
        self.ids, self.positions, self.step, self.logits = ids, positions, step, logits

    def replay(self):
        cache = self.cache()
        with cache.ledger.recording():
            self.logits.copy_(DecodeRunner._eager(self.model, cache, self.ids, self.positions, self.step))


def recorded_without_a_graph(runner, model, cache, input_ids, position_ids, step):
    """Stands in for `DecodeRunner._record`."""
    cache.ledger.counts(input_ids.device)
    ids, positions = input_ids.clone(), position_ids.clone()
    still = Step(1, None if step.all_real else step.real.clone(), counted=step.counted)
    logits = torch.empty(*ids.shape, model.config.vocab_size, device=DEVICE)
    graph = _Replay(model, cache, ids, positions, still, logits)
    return _Capture(graph, ids, positions, still.real, logits, cache.ledger.moves)


def graphs_without_a_gpu(monkeypatch):
    """Lets a runner work where there is no GPU; on a GPU it does as it is. Returns a list with an entry a recording."""
    records = []
    record = DecodeRunner._record if ON_GPU else recorded_without_a_graph
    monkeypatch.setattr(DecodeRunner, "_record", lambda *args: records.append(1) or record(*args))
    if not ON_GPU:
        monkeypatch.setattr(DecodeRunner, "why_not", staticmethod(lambda *_: None))
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setattr(attention, "FORCE_PLAIN", True)
    return records


@pytest.mark.parametrize("reserved, how", [(False, {}), (True, {}), (True, "static")])
def test_replayed_decoding_is_eager_decoding(kernels, allowed, monkeypatch, reserved, how):  # noqa: F811
    """Tokens, lengths and masks over several packings. A cache that knows its length is recorded once; one that grows,
    again each time it moves."""
    model, steps = small_model("llama"), 12 if how == "static" else 36
    ids, mask = left_padded(2, 42, 7)
    greedy = {"attention_mask": mask, "do_sample": False, "min_new_tokens": steps, "max_new_tokens": steps}
    model.use_cuda_graphs = False
    options = {"static": static_parameters(model.config)} if how == "static" else {"residual_length": 0, **how}
    eager = model.create_kivi_cache(backend="triton", **options)
    expected = model.generate(ids, past_key_values=eager, **greedy)
    model.use_cuda_graphs = True
    records = graphs_without_a_gpu(monkeypatch)
    cache = model.create_kivi_cache(backend="triton", **options)
    if reserved:
        cache.reserve(ids.shape[1] + steps)
    assert torch.equal(model.generate(ids, past_key_values=cache, **greedy), expected)
    assert len(records) == 1 if reserved or ON_GPU else len(records) > 1
    ledger, other = cache.ledger, eager.ledger
    assert (ledger.seq_length, ledger.lengths, ledger.packed) == (other.seq_length, other.lengths, other.packed)
    assert ledger.counts(torch.device(DEVICE, 0) if ON_GPU else torch.device("cpu"))[:2].tolist() == [
        ledger.lengths,
        ledger.packed,
    ]
    assert torch.equal(ledger.is_real, other.is_real)


def test_positions_of_a_replayed_step_are_those_given(kernels, allowed, monkeypatch):  # noqa: F811
    model = small_model("llama")
    graphs_without_a_gpu(monkeypatch)
    logits = []
    for model.use_cuda_graphs in (False, True):
        cache, parts = model.create_kivi_cache(backend="triton"), []
        with torch.no_grad():
            model(tokens(1, 60).to(DEVICE), past_key_values=cache)
            for number, token in enumerate(tokens(1, 5, seed=1).to(DEVICE).split(1, dim=1)):
                position = torch.tensor([[100 + 3 * number]], device=DEVICE)
                parts.append(model(token, position_ids=position, past_key_values=cache).logits)
        logits.append(torch.cat(parts, dim=1))
    assert relative_error(*logits) < (2e-3 if ON_GPU else 1e-5)


def test_replayed_steps_in_another_autograd_mode(kernels, allowed, monkeypatch):  # noqa: F811
    """The cache grows in inference mode and is written to without it."""
    model, logits = small_model("llama"), []
    records = graphs_without_a_gpu(monkeypatch)
    pieces = tokens(1, 72).to(DEVICE).split([49, 1, 1, 1, 1, 19], dim=1)
    for model.use_cuda_graphs in (False, True):
        cache, parts = model.create_kivi_cache(backend="triton", residual_length=0, k_bits=16), []
        for index, piece in enumerate(pieces):
            with torch.inference_mode() if index < 4 else torch.no_grad():
                parts.append(model(piece, past_key_values=cache).logits)
        logits.append(torch.cat(parts, dim=1))
    assert records
    assert relative_error(*logits) < (2e-3 if ON_GPU else 1e-5)


def test_a_replay_that_fails_is_not_stored(kernels, allowed, monkeypatch):  # noqa: F811
    """As with an eager step: the lengths, on the host and on the device, are what they were."""
    model = small_model("llama")
    graphs_without_a_gpu(monkeypatch)
    cache = model.create_kivi_cache(backend="triton")
    token = tokens(1, 1, seed=1).to(DEVICE)
    with torch.no_grad():
        for piece in (tokens(1, 60).to(DEVICE), token, token):
            model(piece, past_key_values=cache)
        before = cache.ledger.lengths, cache.ledger.packed, cache.get_seq_length()
        with monkeypatch.context() as patch:
            patch.setattr(_Replay if not ON_GPU else torch.cuda.CUDAGraph, "replay", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(token, past_key_values=cache)
        assert before == (cache.ledger.lengths, cache.ledger.packed, cache.get_seq_length())
        model(token, past_key_values=cache)
        assert cache.get_seq_length() == before[2] + 1


def test_a_hooked_model_decodes_eagerly(kernels, allowed, monkeypatch):  # noqa: F811
    """A graph would not call the hook; those that transformers leaves behind need not be called."""
    model, calls = small_model("llama"), []
    records = graphs_without_a_gpu(monkeypatch)
    cache = model.create_kivi_cache(backend="triton")
    with torch.no_grad():
        out = model(tokens(1, 60).to(DEVICE), past_key_values=cache, output_hidden_states=True)
        assert len(out.hidden_states) == 2
        for token in tokens(1, 3, seed=2).to(DEVICE).split(1, dim=1):
            model(token, past_key_values=cache)
        assert len(records) == 1
        model.config.output_hidden_states = True
        assert len(model(token, past_key_values=cache).hidden_states) == 2
        model.config.output_hidden_states = False
        model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        _warn_of_hooks.cache_clear()
        with pytest.warns(UserWarning, match="forward hooks"):
            for token in tokens(1, 2, seed=1).to(DEVICE).split(1, dim=1):
                model(token, past_key_values=cache)
    assert len(calls) == 2


def test_eager_attention_is_not_recorded(monkeypatch):
    model = small_model("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cache = model.create_kivi_cache()
    assert "no prompt" in DecodeRunner.why_not(model, cache)
    model.set_attn_implementation("eager")
    assert "eager attention" in DecodeRunner.why_not(model, cache)


def test_a_cache_and_its_memory_are_gone_with_the_last_name(kernels, allowed, monkeypatch):  # noqa: F811
    """Neither waits for Python's collector of cycles, nor does reset() wait for the graph."""
    model = small_model("llama")
    graphs_without_a_gpu(monkeypatch)
    cache = model.create_kivi_cache(backend="triton")
    with torch.no_grad():
        for piece in tokens(1, 64).to(DEVICE).split([61, 1, 1, 1], dim=1):
            model(piece, past_key_values=cache)
    assert model._decode_graphs.runner(cache)._capture is not None
    codes, gone = weakref.ref(cache.layers[0].store.key.codes), weakref.ref(cache)
    gc.disable()
    try:
        cache.reset()
        assert codes() is None
        del cache
        assert gone() is None
    finally:
        gc.enable()
