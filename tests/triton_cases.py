"""The Triton backend against the torch one. `test_triton.py` runs these on the GPU, or in Triton's interpreter without one.

The interpreter is chosen when triton is imported, so a run of this file alone needs `TRITON_INTERPRET=1` set before:

    TRITON_INTERPRET=1 python -m pytest tests/triton_cases.py
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from layers import empty_layer, make_layer, put, random_states, relative_error

from modules.codecs.codec import Packed
from modules.codecs.metadata import numbers_of
from modules.kernels.registry import backend, pick_backend
from modules.store.ledger import LENGTH, MARK, PACKED
from modules.store.step import Step

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-3}
SMALL = {"head_dim": 64, "group_size": 32, "residual_length": 32, "sink_length": 4, "kv_heads": 1}
PLAIN = {"k_range": "minmax", "dtype": torch.float16, "device": DEVICE}  # no wide channels unless a test says else
SMALL_METADATA = {"metadata_bits": 8, "wide_channels": 0.5}

pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(scope="module")
def kernels():
    """The backend."""
    with pytest.MonkeyPatch.context() as patch:
        _take_one_element_bounds(patch)
        yield backend("triton")


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


def stored(lengths, **more):
    """A small layer into which the torch backend has put random tokens."""
    return make_layer(lengths, **{**SMALL, **PLAIN, **more})


def known_to_the_device(counts: list[int]) -> Step:
    """A step of one token that some sequences get, of which the host knows nothing."""
    return Step(1, torch.tensor(counts, dtype=torch.bool, device=DEVICE).unsqueeze(1))


def new_states(layer, group=1, tokens=1):
    """Queries of unit energy, keys and values of new tokens for `layer`, as it stores them but for a rotation."""
    batch, heads, _, head_dim = layer.key.window.shape
    dtype, device = layer.key.window.dtype, layer.key.window.device
    query, _ = random_states((batch, heads * group, tokens, head_dim), torch.float32, 1, device)
    query = torch.nn.functional.normalize(query, dim=-1).mul(head_dim**0.5).to(dtype)
    key, value = random_states((batch, heads, tokens, head_dim), dtype, 2, device)
    return (layer.fold(query), *(layer.enter(key, value) if layer.scales else (key, value)))


def check_attention(layer, *, group=1, tokens=1, step=None, splits=None, pipeline=None):
    """Attention of random queries over `layer`, by both backends."""
    from modules.kernels.triton.attention import attend

    query, key, value = new_states(layer, group, tokens)
    dtype, scaling = query.dtype, query.shape[3] ** -0.5
    step = step or Step.of(None, query.shape[0], tokens)
    expected = backend("torch").attend(query.float(), key, value, layer, scaling, step)
    out = attend(query, key, value, layer, scaling, step, splits=splits, pipeline=pipeline)
    assert out.shape == (query.shape[0], tokens, query.shape[1], query.shape[3]) and out.dtype == dtype
    error = relative_error(out, expected)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"
    for row, new in enumerate(step.lengths):
        assert not out[row, new:].any()


PAIRS = list(itertools.product((2, 4, 8, 16), repeat=2))


@pytest.mark.parametrize(
    "bits, metadata_bits", [*((pair, 16) for pair in PAIRS), *((pair, 8) for pair in PAIRS if min(pair) < 8)]
)
def test_every_pair_of_bits(kernels, bits, metadata_bits):
    check_attention(stored([150], bits=bits, metadata_bits=metadata_bits))


@pytest.mark.parametrize(
    "head_dim, group_size", [(64, 16), (64, 64), (64, 128), (96, 32), (128, 32), (128, 64), (128, 128), (256, 32)]
)
@pytest.mark.parametrize("bits, metadata_bits", [(2, 16), (8, 16), (2, 8)])
def test_every_head_and_group_size(kernels, head_dim, group_size, bits, metadata_bits):
    sizes = {"head_dim": head_dim, "group_size": group_size, "residual_length": group_size}
    sizes["v_group_size"] = min(group_size, head_dim)
    check_attention(stored([300], bits=(bits, bits), metadata_bits=metadata_bits, **sizes))


@pytest.mark.parametrize("metadata_bits", [16, 8])
@pytest.mark.parametrize("group_size", [16, 32])
def test_a_head_that_is_no_power_of_two_at_4_bits(kernels, group_size, metadata_bits):
    check_attention(stored([150], bits=(4, 4), head_dim=96, group_size=group_size, metadata_bits=metadata_bits))


@pytest.mark.parametrize("group, tokens", [(1, 1), (3, 1), (7, 1), (8, 1), (7, 2), (1, 17), (3, 6)])
def test_grouped_queries_and_several_new_tokens(kernels, group, tokens):
    check_attention(stored([150, 150], kv_heads=2), group=group, tokens=tokens)
    check_attention(stored([150], head_dim=128, **SMALL_METADATA), group=group, tokens=tokens)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 35, 67, 68, 69, 99, 100, 101, 131, 132, 324])
def test_lengths_around_every_boundary(kernels, length):
    check_attention(stored([length]))
    check_attention(stored([length], **SMALL_METADATA))


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits(kernels, splits):
    check_attention(stored([700]), group=4, splits=splits)


@pytest.mark.parametrize("pipeline", [(2, 16, 4, 1), (3, 32, 8, 4), (4, 128, 2, 2), (1, 64, 1, 8)])
def test_every_pipeline_is_the_same_attention(kernels, pipeline):
    """Those that tuning may choose; once more as a table of this GPU has it."""
    from modules.kernels.triton import launch

    check_attention(stored([700, 90], wide_channels=0.25), group=4, pipeline=launch.Pipeline(*pipeline))
    check_attention(stored([700], bits=(4, 8), group_size=16), group=3, tokens=4, pipeline=launch.Pipeline(*pipeline))


def test_a_tuned_pipeline_is_what_runs(kernels, monkeypatch, tmp_path):
    from modules.kernels.triton import attention, launch, tuning

    layer, tiles = stored([300]), []
    tuned = tuning.Tuned(stages=4, tokens=32, warps=2, programs=3, microseconds=1.0, default_microseconds=2.0)
    layout = tuning.layout(launch.Shape.of(layer, 1), False, 2)
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning, "device_name", lambda _: "a GPU")
    found = attention.launch.attention_tile
    monkeypatch.setattr(attention.launch, "attention_tile", lambda *args: tiles.append(found(*args)) or tiles[-1])
    table = tuning.Table(device="a GPU", kernels=tuning.kernels(), layouts={layout: tuned})
    tuning.save(table, tmp_path / tuning.file_name("a GPU"))
    check_attention(layer)
    assert [(tile.STAGES, tile.U * tile.T, tile.WARPS) for tile in tiles] == [(4, 32, 2)]
    assert launch.attention_options(tiles[0])["num_warps"] == 2


@pytest.mark.parametrize("more", [{}, SMALL_METADATA], ids=["16", "8"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ragged_batches_and_types(kernels, dtype, more):
    layer = stored([150, 2, 100], kv_heads=2, dtype=dtype, **more)
    check_attention(layer, group=2)
    check_attention(layer, tokens=3, step=Step.of_lengths([3, 1, 0], 3))
    check_attention(layer, group=2, step=known_to_the_device([1, 0, 1]))


@pytest.mark.parametrize(
    "head_dim, share, metadata_bits, k_bits",
    [
        *((64, 0.25, 16, 2), (96, 0.25, 16, 2), (128, 0.25, 16, 2), (128, 0.1, 16, 2)),
        *((64, 0.5, 8, 2), (96, 0.5, 8, 2), (128, 0.25, 8, 2)),
        *((64, 0.25, 8, 4), (96, 0.25, 16, 4), (128, 0.25, 8, 4), (128, 0.1, 16, 4), (256, 0.25, 8, 4)),
    ],
)
def test_wide_channels_and_wider_groups_of_values(kernels, head_dim, share, metadata_bits, k_bits):
    more = {"wide_channels": share, "metadata_bits": metadata_bits, "bits": (k_bits, 2)}
    layer = stored([150, 120], head_dim=head_dim, kv_heads=2, v_group_size=16, **more)
    assert layer.key.wide
    check_attention(layer, group=2)


@pytest.mark.parametrize("more", [{"metadata_bits": 16, "wide_channels": 0.25}, SMALL_METADATA], ids=["16", "8"])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_a_cache_of_3_bits(kernels, head_dim, more):
    layer = stored([300], head_dim=head_dim, residual_length=128, k_range="lsq", **more)
    assert layer.key.wide and layer.rotates and layer.value.group_size == 64
    check_attention(layer, group=4)


def test_minima_beyond_float16(kernels):
    """Values at its end have minima of 8 bits that read as more than float16 holds."""
    more = {"kv_heads": 1, "v_rotation": False, "metadata_bits": 8, "dtype": torch.float32, "sink_length": 0}
    layer = empty_layer(1, **{**SMALL, **PLAIN, **more})
    keys, values = random_states((1, 1, 100, 64), torch.float32, device=DEVICE)
    values[..., ::2] = values[..., ::2].sign() * 65504
    put(layer, backend("torch"), keys, values, [100])
    minima = numbers_of(Packed(*layer.value.stored(slice(None), 0, layer.packed[0])), 2)[1]
    assert minima.abs().max() > 65504
    check_attention(layer, group=2)


@pytest.mark.parametrize("residual, sink", [(0, 0), (0, 3), (64, 0)])
def test_without_window_or_sinks(kernels, residual, sink):
    check_attention(stored([100], residual_length=residual, sink_length=sink))


def test_states_with_strides_and_large_queries(kernels):
    """Heads and tokens transposed as a model hands them over; a query far beyond what a product with a scale can hold."""
    layer = stored([150], kv_heads=2, dtype=torch.float32)
    query = (torch.randn(1, 2, 8, 64) * 1e6).to(DEVICE).transpose(1, 2)
    key, value = (torch.randn(1, 2, 2, 64).to(DEVICE).transpose(1, 2) for _ in range(2))
    step = Step.of(None, 1, 2)
    expected = backend("torch").attend(query, key, value, layer, 1e-7, step)
    assert relative_error(kernels.attend(query, key, value, layer, 1e-7, step), expected) < 2e-3


@pytest.mark.parametrize("method", ["minmax", "lsq"])
@pytest.mark.parametrize(
    "head_dim, group_size, bits, metadata_bits",
    [
        *((64, 32, 2, 16), (96, 16, 2, 16), (96, 32, 4, 16), (128, 64, 8, 16), (128, 16, 4, 16)),
        *((96, 16, 2, 8), (64, 32, 4, 8)),
    ],
)
def test_packing_of_a_prompt(kernels, head_dim, group_size, bits, metadata_bits, method):
    """Codes and metadata as the codecs': the same by min-max, as good a fit by least squares."""
    more = {"group_size": group_size, "v_group_size": group_size, "residual_length": group_size}
    ranges = {"k_range": method, "v_range": method, "wide_channels": 0, "v_rotation": False}
    ranges["metadata_bits"] = metadata_bits
    layer = empty_layer(2, bits=(bits, bits), kv_heads=2, head_dim=head_dim, **{**PLAIN, **more, **ranges})
    keys, values = random_states((2, 2, 2 * group_size, head_dim), torch.float16, device=DEVICE)
    _move_far_from_zero(values)
    for side, states in zip(layer.sides, (keys, values)):
        side.grow(3 * group_size)
        for rows in (slice(0, 1), slice(1, 2)):
            kernels.pack(side, rows, group_size, states[rows])
        found = side.stored(slice(None), group_size, 3 * group_size)
        expected = side.codec.encode(states, None)
        if method == "minmax":
            assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3]))
        error, least = (
            relative_error(side.codec.decode(Packed(*packed), None, torch.float32), states)
            for packed in (found, expected)
        )
        assert error <= least * (1 + 1e-4)
        assert not side.codes[:, :, :group_size].any()


def _move_far_from_zero(values):
    """Some tokens so far that an 8-bit minimum reaches there only with a larger scale, and some of equal channels."""
    values[:, :, ::3] += 30
    values[:, :, 1::9] = 1.5
    values[:, :, 2::9] = 0


@pytest.mark.parametrize("static", ["int8", "full precision"])
@pytest.mark.parametrize("length", [1, 32, 33, 300])
def test_tokens_that_are_packed_one_by_one(kernels, length, static):
    layer = stored([length], static=static)
    assert layer.packed == [length]
    check_attention(layer)
    check_attention(layer, group=3, tokens=5)


@pytest.mark.parametrize(
    "head_dim, dtype", [*((64, dtype) for dtype in TOLERANCE), *((d, torch.bfloat16) for d in (96, 128, 256))]
)
def test_static_int8_of_every_head_and_type(kernels, head_dim, dtype):
    layer = stored([45, 2], kv_heads=2, head_dim=head_dim, dtype=dtype, static="int8")
    check_attention(layer, group=7)
    check_attention(layer, group=2, tokens=3, step=Step.of_lengths([1, 3], 3), splits=2)
    check_attention(layer, group=8, step=known_to_the_device([1, 0]))


@pytest.mark.parametrize("static", ["int8", "full precision"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_append_one_by_one(kernels, static, dtype):
    """Also those that only the device knows of; saturated ones among them, and one that is not finite is marked."""
    layers = [stored([40, 3], static=static, dtype=dtype) for _ in range(2)]
    keys, values = (3 * t for t in random_states((2, 1, 9, 64), dtype, 3, DEVICE))
    for layer in layers:
        layer.ledger.counts(keys.device)
    for token in range(8):
        new = layers[0].enter(*(t[:, :, token : token + 1] for t in (keys, values)))
        append((kernels, backend("torch")), layers, *new, known_to_the_device([1, token % 2]))
    assert layers[0].packed == layers[0].lengths == [48, 7]
    assert_equal_layers(*layers)
    assert layers[0].saturated() == layers[1].saturated()
    if static == "int8":
        assert min(layers[0].saturated()) > 0
        keys[1] = torch.inf
        new = layers[0].scales[0].enter(keys[:, :, :1]), values[:, :, :1].round()
        append((kernels,), layers[:1], *new, Step.of(None, 2, 1))
        assert layers[0].ledger.counts(keys.device)[MARK].tolist() == [0, 1]


def append(backends, layers, key, value, step):
    """One step of every layer, each by its backend."""
    for each, layer in zip(backends, layers):
        rotated = layer.rotate(value)
        layer.make_room(step)
        each.append(layer, key, rotated, step)
        layer.ledger.commit(step)


def assert_equal_layers(ours, theirs):
    """Every tensor of two layers up to what is stored, and what their ledgers say."""
    assert (ours.lengths, ours.packed) == (theirs.lengths, theirs.packed)
    assert ours.ledger.counts(ours.key.window.device).tolist() == [theirs.lengths, theirs.packed, [0] * ours.batch_size]
    for mine, reference in zip(ours.sides, theirs.sides):
        for row in range(ours.batch_size):
            rows = slice(row, row + 1)
            assert torch.equal(ours.read(mine, rows, torch.float32), theirs.read(reference, rows, torch.float32))
            if mine.order is not None and ours.packed[row]:
                assert torch.equal(mine.order[rows], reference.order[rows])


@pytest.mark.parametrize(
    "bits, group_size, residual, sink, start, steps, metadata_bits",
    [
        ((2, 2), 16, 16, 4, 30, 36, 16),
        ((4, 16), 16, 0, 2, 1, 36, 16),
        ((16, 8), 16, 16, 0, 20, 14, 16),
        ((8, 4), 32, 32, 4, 60, 9, 16),
        ((2, 2), 16, 16, 4, 30, 36, 8),
        ((4, 4), 16, 0, 2, 1, 36, 8),
        ((8, 2), 32, 32, 4, 60, 9, 8),
    ],
)
def test_append_step_by_step(kernels, bits, group_size, residual, sink, start, steps, metadata_bits):
    """Token by token the buffers and the counts of the device become what the torch backend makes of them."""
    more = {"group_size": group_size, "residual_length": residual, "sink_length": sink, "bits": bits}
    more["metadata_bits"] = metadata_bits
    layers = [stored([start, max(0, start - 5)], **more) for _ in range(2)]
    keys, values = random_states((2, 1, steps, 64), torch.float16, 3, DEVICE)
    for token in range(steps):
        new = (t[:, :, token : token + 1] for t in (keys, values))
        append((kernels, backend("torch")), layers, *new, Step.of(None, 2, 1))
    assert max(layers[0].packed) > 0
    assert_equal_layers(*layers)


def test_append_in_a_window_with_room_for_drafts(kernels):
    """The window then has more slots than tokens that are not packed: groups are packed as before."""
    layers = [stored([70, 65]) for _ in range(2)]
    for layer in layers:
        geometry = layer.ledger.make_draft_room(64)
        layer.enlarge_window(geometry)
        layer.ledger.geometry = geometry
    keys, values = random_states((2, 1, 80, 64), torch.float16, 3, DEVICE)
    for token in range(80):
        new = (t[:, :, token : token + 1] for t in (keys, values))
        append((kernels, backend("torch")), layers, *new, Step.of(None, 2, 1))
    assert min(layers[0].packed) >= 96
    assert_equal_layers(*layers)
    check_attention(layers[0], group=2)


@pytest.mark.parametrize(
    "head_dim, rotary, residual, observed, options",
    [
        (64, 64, 16, True, {"wide_channels": 0.25}),
        (96, 24, 0, True, {"wide_channels": 0.25}),
        (128, 0, 16, False, {"wide_channels": 0.25}),
        (64, 64, 16, True, SMALL_METADATA),
        (96, 24, 0, True, SMALL_METADATA),
        (64, 64, 16, True, {"bits": (4, 4), "wide_channels": 0.25}),
        (96, 24, 0, True, {"bits": (4, 4), **SMALL_METADATA}),
    ],
)
def test_append_chooses_wide_channels_on_the_device(kernels, head_dim, rotary, residual, observed, options):
    """Sequences that reach their first group at different steps, of which the host is told nothing."""
    more = {"group_size": 16, "residual_length": residual, "v_group_size": 32, "v_range": "clipped", **options}
    sizes = {"kv_heads": 2, "head_dim": head_dim, "rotary": rotary, **more}
    layers = [empty_layer(2, **{**SMALL, **PLAIN, **sizes}) for _ in range(2)]
    keys, values = random_states((2, 2, 120, head_dim), torch.float16, 3, DEVICE)
    query, _ = random_states((2, 4, 1, head_dim), torch.float16, 4, DEVICE)
    for layer in layers:
        put(layer, backend("torch"), keys, values, [9, 15])
        if observed:
            layer.observe(query, Step.of(None, 2, 1))
        layer.ledger.counts(query.device)
    for token in range(20, 75):
        step = known_to_the_device([token % 3 > 0, token % 7 > 0])
        new = (t[:, :, token : token + 1] for t in (keys, values))
        append((kernels, backend("torch")), layers, *new, step)
    assert min(layers[0].packed) > 0
    assert_equal_layers(*layers)
    assert (layers[0].key.order[:, :, 0] != 0).any()


def test_equal_costs_choose_the_first_channels(kernels):
    """As nothing says which is better; the order must still be one of all channels."""
    layer = empty_layer(1, **{**SMALL, **PLAIN, "residual_length": 0, "sink_length": 0, "wide_channels": 0.25})
    for _ in range(32):
        token = torch.ones(1, 1, 1, 64, dtype=torch.float16, device=DEVICE)
        append((kernels,), (layer,), token, token, Step.of(None, 1, 1))
    assert layer.packed == [32]
    assert layer.key.order[0, 0].tolist() == list(range(64))


def test_append_writes_behind_the_ledger(kernels):
    """A step that is not committed leaves the counts as they are, and can be done again."""
    layer = stored([100, 99], kv_heads=2)
    counts = layer.ledger.counts(layer.key.window.device)
    before = counts.clone()
    _, key, value = new_states(layer)
    step = Step.of(None, 2, 1)
    layer.make_room(step)
    kernels.append(layer, value, key, step)
    kernels.append(layer, key, value, step)
    assert torch.equal(counts, before) and layer.lengths == [100, 99]
    layer.ledger.commit(step)
    expected = stored([100, 99], kv_heads=2)
    append((backend("torch"),), (expected,), key, value, step)
    assert_equal_layers(layer, expected)


def test_a_sequence_without_a_new_token_is_left_alone(kernels):
    """Whatever lies in its place of the step, at a length where one more token would fill a group."""
    layer = stored([99, 99], kv_heads=2, sink_length=4, dtype=torch.float32)
    _, key, value = new_states(layer)
    step = known_to_the_device([1, 0])
    layer.ledger.counts(key.device)
    layer.make_room(step)
    before = {name: t.clone() for name, t in layer.tensors().items()}
    key[1] = value[1] = float("nan")
    kernels.append(layer, key, value, step)
    assert layer.ledger.packs(0, 1) and layer.ledger.packs(1, 1)
    for name, t in layer.tensors().items():
        assert torch.equal(t[1], before[name][1]), name
    assert not torch.equal(layer.key.codes[0], before["key.codes"][0])
    assert not layer.ledger.marked()


def test_several_tokens_are_left_to_the_host(kernels):
    from modules.kernels.triton.append import append_token

    layer = stored([100])
    _, key, value = new_states(layer, tokens=2)
    assert not append_token(layer, key, value, Step.of(None, 1, 2))
    layers = [layer, stored([100])]
    append((kernels, backend("torch")), layers, key, value, Step.of(None, 1, 2))
    assert_equal_layers(*layers)


def test_packing_marks_what_float16_cannot_hold(kernels):
    """The step goes on, as looking would wait for the device; whoever waits anyway is told."""
    layer = empty_layer(2, **{**SMALL, **PLAIN, "residual_length": 0, "sink_length": 0, "dtype": torch.float32})
    token = torch.ones(2, 1, 1, 64, device=DEVICE)
    token[1] = 1e5
    for _ in range(31):
        append((kernels,), (layer,), token, token, Step.of(None, 2, 1))
    assert not layer.ledger.marked()
    layer.ledger.raise_if_marked()
    append((kernels,), (layer,), token, token, Step.of(None, 2, 1))
    assert layer.ledger.counts(token.device)[MARK].tolist() == [0, 1]
    with pytest.raises(ValueError, match="float16"):
        layer.ledger.raise_if_marked()


def test_lists_changed_outside_the_kernels_reach_the_device(kernels):
    layer = stored([150, 100])
    device = layer.key.window.device
    assert layer.ledger.counts(device)[[LENGTH, PACKED]].tolist() == [layer.lengths, layer.packed]
    layer.keep([60, 60])
    layer.ledger.seq_length = 150
    layer.ledger.crop(60)
    layer.select(torch.tensor([1, 0, 0]))
    layer.ledger.select(torch.tensor([1, 0, 0]))
    assert layer.lengths == [60, 60, 60]
    assert layer.ledger.counts(device)[[LENGTH, PACKED]].tolist() == [layer.lengths, layer.packed]
    check_attention(layer)


def test_what_does_not_fit_the_layer_is_refused(kernels):
    """Nothing reaches a kernel whose shape, type or place is another than the layer's."""
    layer, step = stored([100, 90], kv_heads=2), Step.of(None, 2, 1)
    query, key, value = new_states(layer, group=2)
    elsewhere = torch.empty_like(key, device="meta")
    refused = {
        "keys must be.*got \\[2, 1, 1, 64\\]": (query, key[:, :1], value),
        "keys must be.*got \\[2, 3, 1, 64\\]": (query, torch.cat([key, key[:, :1]], 1), value),
        "values must be.*got \\[2, 2, 1, 128\\]": (query, key, torch.cat([value, value], 3)),
        "values must be.*got \\[1, 2, 1, 64\\]": (query, key, value[:1]),
        "keys must be.*got \\[2, 2, 2, 64\\]": (query, torch.cat([key, key], 2), value),
        "values must be.*float32": (query, key, value.float()),
        "keys must be.*meta": (query, elsewhere, value),
        "multiple of the layer's 2 KV heads": (query[:, :3], key, value),
        "queries must be.*got \\[2, 4, 1, 32\\]": (query[..., :32], key, value),
        "queries must be.*bfloat16": (query.bfloat16(), key, value),
    }
    for words, states in refused.items():
        with pytest.raises(ValueError, match=words):
            kernels.attend(*states, layer, 0.125, step)
        if "quer" not in words and "multiple" not in words:
            with pytest.raises(ValueError, match=words):
                kernels.append(layer, *states[1:], step)


def test_append_without_room_is_refused(kernels):
    layer = empty_layer(1, **{**SMALL, **PLAIN})
    keys, values = random_states((1, 1, 68, 64), torch.float16, device=DEVICE)
    put(layer, backend("torch"), keys, values, [67])
    with pytest.raises(ValueError, match="room for 0 packed tokens and the step needs 32"):
        kernels.append(layer, keys[:, :, 67:], values[:, :, 67:], Step.of(None, 1, 1))


@pytest.mark.skipif(not ON_GPU, reason="inline assembly needs a GPU")
@pytest.mark.parametrize("bits, more", [(2, {}), (4, {}), (8, {}), (2, SMALL_METADATA), (4, {"metadata_bits": 8})])
def test_assembly_equals_plain_code(kernels, bits, more, monkeypatch):
    """Two ways from codes to operands; plain code multiplies in float32, which shows in the last bits."""
    from modules.kernels.triton import attention

    layer = stored([700], bits=(bits, bits), head_dim=128, **more)
    states, step, results = new_states(layer, group=4), Step.of(None, 1, 1), []
    for plain in (False, True):
        monkeypatch.setattr(attention, "FORCE_PLAIN", plain)
        results.append(kernels.attend(*states, layer, 128**-0.5, step))
    assert relative_error(*results) < 2e-3


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("more", [{}, SMALL_METADATA], ids=["default", "8"])
def test_steps_replayed_from_a_graph_equal_eager_ones(kernels, more):
    """Attention, append and the ledger's counts captured once: replays follow the device over several packings, the choice
    of wide channels among them."""
    sizes = {"head_dim": 128, "kv_heads": 2, "device": DEVICE, "dtype": torch.float16, "max_length": 300, **more}
    eager, graphed, spare = (empty_layer(1, **sizes) for _ in range(3))
    keys, values = random_states((1, 2, 300, 128), torch.float16, device=DEVICE)
    query, _ = random_states((1, 8, 300, 128), torch.float16, 1, DEVICE)
    step = Step.of(None, 1, 1)
    for layer in (eager, graphed, spare):
        put(layer, kernels, keys, values, [120])
        layer.ledger.counts(keys.device)

    def run(layer, q, k, v):
        out = kernels.attend(q, k, layer.rotate(v), layer, 128**-0.5, step)
        kernels.append(layer, k, layer.rotate(v), step)
        layer.ledger.commit(step)
        return out

    still = [t[:, :, 120:121].clone() for t in (query, keys, values)]
    run(spare, *still)  # compile outside the capture
    counts, before = graphed.ledger.counts(keys.device), graphed.ledger.save()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(graphed, *still)
    for token in range(120, 290):
        now = [t[:, :, token : token + 1] for t in (query, keys, values)]
        expected = run(eager, *now)
        for target, source in zip(still, now):
            target.copy_(source)
        graph.replay()
        assert torch.equal(captured, expected)
    assert before.lengths == [120]
    assert counts.tolist() == eager.ledger.counts(keys.device).tolist()


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_triton_is_refused_on_a_cpu():
    layer = empty_layer(1, **SMALL)
    assert pick_backend("auto", layer).name != "triton"
    with pytest.raises(ValueError, match="'cuda'"):
        pick_backend("triton", layer)
