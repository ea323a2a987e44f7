"""The Triton backend in whole models, and decoding from graphs: not collected until it follows the cache and the models.

The interpreter is chosen when triton is imported, so a run of this file alone needs `TRITON_INTERPRET=1` set before:

    TRITON_INTERPRET=1 python -m pytest tests/graph_cases.py
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from conftest import FAMILIES, SIZES, SMALL, relative_error, tokens
from modules.decode_runner import DecodeRunner, _Capture, _memory, _states, _warn_of_hooks

from modules import packed_attention as dispatch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(scope="module")
def kernels():
    """The kernel modules."""
    with pytest.MonkeyPatch.context() as patch:
        _take_one_element_bounds(patch)
        from modules.kernels import triton_attention, triton_quantize

        yield triton_attention, triton_quantize


def _take_one_element_bounds(patch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton before 3.8 makes loop bounds arrays of one element, which NumPy no longer converts."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    patch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture
def allowed(monkeypatch):
    """Caches take the Triton backend, also where the interpreter runs it."""
    monkeypatch.setattr(dispatch, "_triton_problem", lambda _: None)


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


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_of_whole_models(kernels, allowed, family):
    """A padded batch in chunks and single tokens, over a packing: as with the torch backend."""
    model = small_model(family)
    ids, mask = left_padded(2, 69, 7)
    logits = {}
    for backend in ("torch", "triton"):
        cache, outputs, seen = model.create_kivi_cache(backend=backend), [], 0
        with torch.inference_mode():
            for piece in ids.split([64, 2, 1, 1, 1], dim=1):
                seen += piece.shape[1]
                outputs.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        assert cache.get_cache_info()["backend"] == backend
        logits[backend] = torch.cat(outputs, dim=1)[mask.bool()].float()
    assert relative_error(logits["triton"], logits["torch"]) < (1e-2 if ON_GPU else 2e-3)


class _Replay:
    """What a CUDA graph does, without one: the step runs again, and the host's side of the cache does not notice."""

    def __init__(self, runner, cache, ids, logits):
        self.runner, self.cache, self.ids, self.logits = runner, weakref.ref(cache), ids, logits

    def replay(self):
        cache = self.cache()
        layers = cache.layers
        host = [(layer.columns, layer.column_is_real, layer.state.lengths, layer.state.packed) for layer in layers]
        self.logits.copy_(self.runner._eager(cache, self.ids))
        for layer, (columns, real, lengths, packed) in zip(layers, host):
            layer.columns, layer.column_is_real = columns, real
            layer.state.lengths, layer.state.packed = lengths, packed


def recorded_without_a_graph(runner, cache, input_ids):
    """Stands in for `DecodeRunner._record`."""
    for layer in cache.layers:
        layer.state.device_counts()
    ids, logits = input_ids.clone(), torch.empty(*input_ids.shape, runner.model.config.vocab_size, device=DEVICE)
    return _Capture(_Replay(runner, cache, ids, logits), ids, logits, _memory(_states(cache)))


def graphs_without_a_gpu(monkeypatch, kernels):
    """Lets a runner work where there is no GPU; on a GPU it does as it is. Returns a list with an entry a recording."""
    records = []
    record = DecodeRunner._record if ON_GPU else recorded_without_a_graph
    monkeypatch.setattr(DecodeRunner, "_record", lambda *args: records.append(1) or record(*args))
    if not ON_GPU:
        monkeypatch.setattr(DecodeRunner, "why_not", staticmethod(lambda *_: None))
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(kernels[0], "FORCE_PLAIN", True)
    return records


def test_replayed_decoding_is_eager_decoding(kernels, allowed, monkeypatch):
    """Tokens, lengths and masks over several packings; the growing cache records again each time it moves."""
    model, steps = small_model("llama"), 19
    ids, mask = left_padded(1, 42, 7)
    greedy = {"attention_mask": mask, "do_sample": False, "min_new_tokens": steps, "max_new_tokens": steps}
    model.use_cuda_graphs = False
    eager = model.create_kivi_cache(backend="triton", residual_length=0)
    expected = model.generate(ids, past_key_values=eager, **greedy)
    model.use_cuda_graphs = True
    records = graphs_without_a_gpu(monkeypatch, kernels)
    cache = model.create_kivi_cache(backend="triton", residual_length=0)
    assert torch.equal(model.generate(ids, past_key_values=cache, **greedy), expected)
    assert len(records) == 2  # at the start and when the packed part had to grow
    for layer, other in zip(cache.layers, eager.layers):
        assert (layer.columns, layer.state.lengths, layer.state.packed) == (
            other.columns,
            other.state.lengths,
            other.state.packed,
        )
        assert layer.state.counts[:2].tolist() == [layer.state.lengths, layer.state.packed]
        assert torch.equal(layer.column_is_real, other.column_is_real)


def test_replayed_steps_in_another_autograd_mode(kernels, allowed, monkeypatch):
    """The cache grows in inference mode and is written to without it."""
    model, logits = small_model("llama"), []
    records = graphs_without_a_gpu(monkeypatch, kernels)
    pieces = tokens(1, 72).to(DEVICE).split([49, 1, 1, 1, 1, 19], dim=1)
    for model.use_cuda_graphs in (False, True):
        cache, parts = model.create_kivi_cache(backend="triton", residual_length=0, k_bits=16), []
        for index, piece in enumerate(pieces):
            with torch.inference_mode() if index < 4 else torch.no_grad():
                parts.append(model(piece, past_key_values=cache).logits)
        logits.append(torch.cat(parts, dim=1))
    assert records
    assert relative_error(*logits) < (2e-3 if ON_GPU else 1e-5)


def test_a_replay_that_fails_is_not_stored(kernels, allowed, monkeypatch):
    """As with an eager step: the lengths of all layers, on the host and on the device, are what they were."""
    model = small_model("llama")
    graphs_without_a_gpu(monkeypatch, kernels)
    cache = model.create_kivi_cache(backend="triton", residual_length=0)
    token = tokens(1, 1, seed=1).to(DEVICE)

    def stop(_):
        raise ValueError("too large")

    with torch.no_grad():
        for piece in (tokens(1, 49).to(DEVICE), token, token):
            model(piece, past_key_values=cache)
        model.use_cuda_graphs = False
        expected = model(token, past_key_values=copy.deepcopy(cache)).logits
        model.use_cuda_graphs = True
        assert cache.layers[0].state.packs_at(0, 1)
        before = cache.get_seq_length(), list(cache.layers[0].state.lengths), list(cache.layers[0].state.packed)
        with monkeypatch.context() as patch:
            patch.setattr(kernels[1], "check_packed", stop)
            with pytest.raises(ValueError, match="too large"):
                model(token, past_key_values=cache)
        state = cache.layers[0].state
        assert before == (cache.get_seq_length(), state.lengths, state.packed)
        assert state.device_counts()[:2].tolist() == [state.lengths, state.packed]
        assert relative_error(model(token, past_key_values=cache).logits, expected) < (2e-3 if ON_GPU else 1e-5)


def test_a_hooked_model_decodes_eagerly(kernels, allowed, monkeypatch):
    """A graph would not call the hook; those that transformers leaves behind need not be called."""
    model, calls = small_model("llama"), []
    records = graphs_without_a_gpu(monkeypatch, kernels)
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


def test_a_cache_is_gone_with_its_last_name(kernels, allowed, monkeypatch):
    """Its memory must not wait for Python's collector of cycles."""
    model = small_model("llama")
    graphs_without_a_gpu(monkeypatch, kernels)
    cache = model.create_kivi_cache(backend="triton")
    with torch.no_grad():
        for piece in tokens(1, 64).to(DEVICE).split([61, 1, 1, 1], dim=1):
            model(piece, past_key_values=cache)
    assert cache._runner._capture is not None
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()
