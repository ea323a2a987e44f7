"""The Triton backend against the torch one. `test_triton.py` runs these on the GPU, or in Triton's interpreter without one.

The interpreter is chosen when triton is imported, so a run of this file alone needs `TRITON_INTERPRET=1` set before:

    TRITON_INTERPRET=1 python -m pytest tests/triton_cases.py
"""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch

pytest.importorskip("triton")

from conftest import FAMILIES, SIZES, SMALL, relative_error, tokens
from modules.packed_attention import _attend_torch
from modules.packed_state import PackedLayer
from modules.quantization import Quantized, dequantize_keys, dequantize_values, quantize_keys, quantize_values

from modules import packed_attention as dispatch
from modules.models.graphs import DecodeRunner, _Capture, _memory, _states, _warn_of_hooks
from modules.options import KIVIOptions

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-3}

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


def make_states(batch, heads, tokens, head_dim, dtype, seed=0):
    """Keys with a scale and a large offset a channel, and values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    keys = draw(batch, heads, tokens, head_dim) * draw(head_dim).abs() * 2 + draw(head_dim) * 5
    return keys.to(DEVICE, dtype), draw(batch, heads, tokens, head_dim).to(DEVICE, dtype)


def make_layer(
    lengths, *, bits=(2, 2), head_dim=64, group_size=32, residual=32, sink=4, heads=1, dtype=torch.float16, **more
):
    """A layer of the torch backend holding random tokens; min-max without wide channels unless `more` says else."""
    options = KIVIOptions(
        k_bits=bits[0],
        v_bits=bits[1],
        group_size=group_size,
        residual_length=residual,
        sink_length=sink,
        **{"k_range": "minmax"} | more,
    )
    keys, values = make_states(len(lengths), heads, max(lengths), head_dim, dtype)
    layer = PackedLayer.empty(keys, bits, options)
    layer.append(keys, values, list(lengths))
    return layer


def check_attention(kernels, layer, *, group=1, tokens=1, new_lengths=None, splits=None):
    """Attention of random queries over `layer`, by both backends."""
    batch, heads, _, head_dim = layer.key.window.shape
    dtype = layer.key.window.dtype
    query, _ = make_states(batch, heads * group, tokens, head_dim, dtype, seed=1)
    query = torch.nn.functional.normalize(query.float(), dim=-1).mul(head_dim**0.5).to(dtype)
    key, value = make_states(batch, heads, tokens, head_dim, dtype, seed=2)
    new_lengths = new_lengths or [tokens] * batch
    expected = _attend_torch(query.float(), key, value, layer, head_dim**-0.5, new_lengths)
    out = kernels[0].attend(query, key, value, layer, head_dim**-0.5, new_lengths, splits=splits)
    assert out.shape == (batch, tokens, heads * group, head_dim) and out.dtype == dtype
    error = (out.float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"
    for row, new in enumerate(new_lengths):
        assert not out[row, new:].any()


@pytest.mark.parametrize("bits", list(itertools.product((2, 4, 8, 16), repeat=2)))
def test_every_pair_of_bits(kernels, bits):
    check_attention(kernels, make_layer([150], bits=bits))


@pytest.mark.parametrize(
    "head_dim, group_size", [(64, 16), (64, 64), (96, 32), (128, 32), (128, 64), (128, 128), (256, 32)]
)
@pytest.mark.parametrize("bits", [2, 8])
def test_every_head_and_group_size(kernels, head_dim, group_size, bits):
    check_attention(
        kernels, make_layer([300], bits=(bits, bits), head_dim=head_dim, group_size=group_size, residual=group_size)
    )


@pytest.mark.parametrize("group_size", [16, 32])
def test_a_head_that_is_no_power_of_two_at_4_bits(kernels, group_size):
    check_attention(kernels, make_layer([150], bits=(4, 4), head_dim=96, group_size=group_size, residual=32))


@pytest.mark.parametrize("group, tokens", [(1, 1), (3, 1), (7, 1), (8, 1), (7, 2), (1, 17), (3, 6)])
def test_grouped_queries_and_several_new_tokens(kernels, group, tokens):
    check_attention(kernels, make_layer([150]), group=group, tokens=tokens)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 35, 67, 68, 69, 99, 100, 101, 131, 132, 324])
def test_lengths_around_every_boundary(kernels, length):
    check_attention(kernels, make_layer([length]))


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits(kernels, splits):
    check_attention(kernels, make_layer([700]), group=4, splits=splits)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ragged_batches_and_types(kernels, dtype):
    layer = make_layer([150, 2, 100], heads=2, dtype=dtype)
    check_attention(kernels, layer, group=2)
    check_attention(kernels, layer, tokens=3, new_lengths=[3, 1, 0])


@pytest.mark.parametrize("head_dim, share", [(64, 0.25), (96, 0.25), (128, 0.25), (128, 0.1)])
def test_wide_channels_and_wider_groups_of_values(kernels, head_dim, share):
    layer = make_layer([150, 120], head_dim=head_dim, heads=2, wide_channels=share, v_group_size=16, group_size=32)
    assert layer.key.wide
    check_attention(kernels, layer, group=2)


def test_the_default_cache(kernels):
    layer = make_layer([300], head_dim=128, residual=128, k_range="lsq")
    assert layer.key.wide and layer.value.group_size == 64
    check_attention(kernels, layer, group=4)


@pytest.mark.parametrize("residual, sink", [(0, 0), (0, 3), (64, 0)])
def test_without_window_or_sinks(kernels, residual, sink):
    check_attention(kernels, make_layer([100], residual=residual, sink=sink))


def test_states_with_strides_and_large_queries(kernels):
    """Heads and tokens transposed as a model hands them over; a query far beyond what a product with a scale can hold."""
    layer = make_layer([150], heads=2, dtype=torch.float32)
    query = (torch.randn(1, 2, 8, 64) * 1e6).to(DEVICE).transpose(1, 2)
    key, value = (torch.randn(1, 2, 2, 64).to(DEVICE).transpose(1, 2) for _ in range(2))
    expected = _attend_torch(query, key, value, layer, 1e-7, [2])
    out = kernels[0].attend(query, key, value, layer, 1e-7, [2])
    assert (out - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("method", ["minmax", "lsq"])
@pytest.mark.parametrize(
    "head_dim, group_size, bits", [(64, 32, 2), (96, 16, 2), (96, 32, 4), (128, 64, 8), (128, 16, 4)]
)
def test_packing_of_a_prompt(kernels, head_dim, group_size, bits, method):
    """Codes and metadata as the torch quantizer's: the same by min-max, as good a fit by least squares."""
    keys, values = make_states(1, 2, 2 * group_size, head_dim, torch.float16)
    options = KIVIOptions(
        k_bits=bits,
        v_bits=bits,
        group_size=group_size,
        residual_length=group_size,
        k_range=method,
        v_range=method,
        v_group_size=group_size,
    )
    layer = PackedLayer.empty(keys, (bits, bits), options)
    layer.key.extra = layer.key.order = None
    for side, states, quantize, back in (
        (layer.key, keys, quantize_keys, dequantize_keys),
        (layer.value, values, quantize_values, dequantize_values),
    ):
        side.grow(3 * group_size)
        kernels[1].pack_groups(side, slice(0, 1), group_size, states)
        stored = side.stored(slice(0, 1), group_size, 3 * group_size)
        expected = quantize(states, bits, group_size, method)
        if method == "minmax":
            assert all(torch.equal(a, b) for a, b in zip(stored[:3], expected[:3]))
        error, least = ((back(Quantized(*q), bits, group_size) - states.float()).norm() for q in (stored, expected))
        assert error <= least * (1 + 1e-4)
        assert not side.codes[:, :, :group_size].any()


@pytest.mark.parametrize(
    "bits, group_size, residual, sink, start, steps",
    [((2, 2), 16, 16, 4, 30, 36), ((4, 16), 16, 0, 2, 1, 36), ((16, 8), 16, 16, 0, 20, 14), ((8, 4), 32, 32, 4, 60, 9)],
)
def test_append_step_by_step(kernels, bits, group_size, residual, sink, start, steps):
    """Token by token the buffers, lengths and device counters become what `PackedLayer.append` makes of them."""
    options = KIVIOptions(
        k_bits=bits[0],
        v_bits=bits[1],
        group_size=group_size,
        residual_length=residual,
        sink_length=sink,
        k_range="minmax",
    )
    keys, values = make_states(2, 1, start + steps, 64, torch.float16)
    torch_layer, layer = (PackedLayer.empty(keys, bits, options) for _ in range(2))
    layer.backend = "triton"
    for each in (torch_layer, layer):
        each.append(keys[:, :, :start], values[:, :, :start], [start, max(0, start - 5)])
        for token in range(start, start + steps):
            each.append(keys[:, :, token : token + 1], values[:, :, token : token + 1], [1, 1])
    assert (layer.lengths, layer.packed) == (torch_layer.lengths, torch_layer.packed)
    assert layer.counts.tolist() == [layer.lengths, layer.packed, [0, 0], [0, 0]]
    assert max(layer.packed) > 0
    for ours, theirs in zip(layer.sides, torch_layer.sides):
        for row in range(2):
            read = (
                each.read(side, slice(row, row + 1), torch.float32)
                for each, side in ((layer, ours), (torch_layer, theirs))
            )
            assert torch.equal(*read)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_append_with_wide_channels(kernels, head_dim):
    """The first group chooses the channels on the host; prompt and later groups are packed by the kernels."""
    options = KIVIOptions(
        group_size=16, residual_length=16, k_range="minmax", wide_channels=0.25, v_group_size=32, v_range="clipped"
    )
    keys, values = make_states(1, 2, 75, head_dim, torch.float16)
    torch_layer, layer = (PackedLayer.empty(keys, (2, 2), options) for _ in range(2))
    layer.backend = "triton"
    for each in (torch_layer, layer):
        each.append(keys[:, :, :55], values[:, :, :55], [55])
        for token in range(55, 75):
            each.append(keys[:, :, token : token + 1], values[:, :, token : token + 1], [1])
    assert layer.packed == torch_layer.packed == [48]
    assert layer.counts.tolist() == [[75], [48], [0], [0]]
    for ours, theirs in zip(layer.tensors().values(), torch_layer.tensors().values()):
        assert torch.equal(ours, theirs)


def test_append_refuses_what_float16_cannot_hold(kernels):
    options = KIVIOptions(group_size=16, residual_length=0, sink_length=0, k_range="minmax")
    token = torch.full((1, 1, 1, 64), 1e5, device=DEVICE)
    layer = PackedLayer.empty(token, (2, 2), options)
    layer.backend = "triton"
    layer.append(token[:, :, :0], token[:, :, :0], [0])
    layer.check_states = lambda *_: None  # as on a GPU, where a step must not wait for the device
    with pytest.raises(ValueError, match="float16"):
        for _ in range(16):
            layer.append(token, token, [1])


def test_lists_changed_outside_the_kernels_reach_the_device(kernels):
    layer = make_layer([150, 100])
    before = layer.device_counts()
    assert before[:2].tolist() == [layer.lengths, layer.packed]
    layer.keep([60, 20])
    layer.select(torch.tensor([1, 0, 0]))
    assert layer.device_counts()[:2].tolist() == [layer.lengths, layer.packed]
    check_attention(kernels, layer)


@pytest.mark.skipif(not ON_GPU, reason="inline assembly needs a GPU")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_assembly_equals_plain_code(kernels, bits):
    """Two ways from codes to operands; plain code multiplies in float32, which shows in the last bits."""
    attention = kernels[0]
    layer = make_layer([700], bits=(bits, bits), head_dim=128)
    query, _ = make_states(1, 4, 1, 128, torch.float16, seed=1)
    key, value = make_states(1, 1, 1, 128, torch.float16, seed=2)
    results = []
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "FORCE_PLAIN", plain)
            results.append(attention.attend(query, key, value, layer, 128**-0.5, [1]))
    assert relative_error(*results) < 2e-3


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_steps_replayed_from_a_graph_equal_eager_ones(kernels):
    """Attention and append captured once: replays follow the lengths on the device over several packings."""
    keys, values = make_states(1, 2, 300, 128, torch.float16)
    query, _ = make_states(1, 8, 300, 128, torch.float16, seed=1)
    options = KIVIOptions()
    eager, graphed = (PackedLayer.empty(keys, (2, 2), options, max_length=300) for _ in range(2))
    for layer in (eager, graphed):
        layer.backend = "triton"
        layer.append(keys[:, :, :200], values[:, :, :200], [200])
        layer.device_counts()

    def step(layer, q, k, v):
        out = kernels[0].attend(q, k, v, layer, 128**-0.5, [1])
        kernels[1].append_token(layer, k, v, [1])
        return out

    still = [t[:, :, 200:201].clone() for t in (query, keys, values)]
    step(PackedLayer.empty(keys, (2, 2), options, max_length=300), *still)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(graphed, *still)
    for token in range(200, 290):
        now = [t[:, :, token : token + 1] for t in (query, keys, values)]
        expected = kernels[0].attend(*now, eager, 128**-0.5, [1])
        eager.append(*now[1:], [1])
        for target, source in zip(still, now):
            target.copy_(source)
        graph.replay()
        assert torch.equal(captured, expected)
    assert graphed.counts.tolist() == eager.counts.tolist()


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


def test_triton_is_refused_on_a_cpu():
    from modules.packed_attention import pick_backend

    states = torch.zeros(1, 1, 1, 64)
    layer = PackedLayer.empty(states, (2, 2), KIVIOptions())
    assert pick_backend("auto", layer) != "triton"
    with pytest.raises(ValueError, match="GPU"):
        pick_backend("triton", layer)
