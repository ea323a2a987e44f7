"""A decode step on a GPU makes the host wait for nothing: shown on fake CUDA tensors, where there is no GPU.

On a fake tensor whatever looks at a value raises (`.item()`, `bool(tensor)`, `.tolist()`, `torch.equal`); what copies from
the host does not, so that a dispatch mode counts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from layers import empty_layer, random_scales

from modeling_llama_kivi import LlamaForCausalLM_KIVI, LlamaKIVIConfig
from modules.codecs.static import StaticParameters, model_facts
from modules.kernels.registry import backend
from modules.kernels.triton import append, attention, launch, pack
from modules.store.layer import PackedLayer
from modules.store.step import Step

CUDA = torch.device("cuda", 0)
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # a dimension of a grid, CUDA's limits


def view(tensor: torch.Tensor, index) -> torch.Tensor:
    """`tensor[index]`, by operators that go through the dispatcher."""
    keys, dim = index if isinstance(index, tuple) else (index,), 0
    named = sum(key is not None and key is not Ellipsis for key in keys)
    for key in keys:
        if key is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif key is Ellipsis:
            dim += tensor.dim() - dim - named
        elif isinstance(key, slice):
            tensor, dim = torch.ops.aten.slice.Tensor(tensor, dim, key.start, key.stop, key.step or 1), dim + 1
        elif isinstance(key, int):
            tensor = torch.ops.aten.select.int(tensor, dim, key)
        else:
            tensor, dim = torch.ops.aten.index.Tensor(tensor, [None] * dim + [torch.as_tensor(key)]), dim + 1
        named -= key is not None and key is not Ellipsis
    return tensor


class GuardedCalls(TorchFunctionMode):
    """Indexing and copying by operators of the dispatcher: PyTorch's own code for them asks for the GPU of a tensor first,
    which a build for CPUs refuses for fake ones too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return view(*args)
        if func is torch.Tensor.__setitem__:
            return self._copy(view(*args[:2]), args[2])
        if func is torch.Tensor.copy_:
            return self._copy(*args[:2])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _copy(target: torch.Tensor, source: torch.Tensor | float) -> torch.Tensor:
        """Nothing is in a fake tensor, so that it is enough to let the modes see what would be copied."""
        if isinstance(source, torch.Tensor):
            torch.ops.aten.copy.default(target, source)
        return target


class CopiesFromTheHost(TorchDispatchMode):
    """Lists the operators that take data from the host to a GPU while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(kwargs or {}).values(), out) if isinstance(t, torch.Tensor)]
        placed = {t.device.type for t in tensors if t.device.type == "cuda" or t.dim()}  # scalars go as arguments
        if isinstance(out, torch.Tensor) and out.device.type == "cuda" and "cpu" in placed:
            self.found.append(str(func))
        return out


class Launches:
    """Stands in for a compiled kernel: keeps the grids it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        self.grids.append(grid)
        return lambda *_, **__: None


@contextlib.contextmanager
def fake_gpu() -> Iterator[tuple[CopiesFromTheHost, Launches]]:
    """Within it tensors on CUDA are fake, kernels are not run, and copies from the host are counted.

    A whole model runs in it as well as a layer: everything that reaches the device is seen.
    """
    launches, copies = Launches(), CopiesFromTheHost()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), copies, GuardedCalls():
        for module, name in (
            (attention, "attend_splits"),
            (attention, "combine_splits"),
            (append, "append_step"),
            (pack, "pack_states"),
        ):
            patch.setattr(module, name, launches)
        patch.setattr(launch, "processors", lambda _: 132)
        patch.setattr(launch, "shared_memory", lambda _: launch.SHARED_H100)
        patch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
        yield copies, launches


def states(layer, heads: int, tokens: int = 1) -> torch.Tensor:
    """States of new tokens for `layer`, in its dtype and place."""
    window = layer.key.window
    return torch.empty(window.shape[0], heads, tokens, window.shape[3], dtype=window.dtype, device=window.device)


def decode(layer, step: Step) -> torch.Tensor:
    """One step of a cache that has this one layer."""
    triton = backend("triton")
    kv_heads = layer.key.window.shape[1]
    query, key, value = states(layer, 2 * kv_heads), states(layer, kv_heads), states(layer, kv_heads)
    key, value = layer.enter(key, value)
    layer.ledger.check_room(step)
    layer.make_room(step)
    out = triton.attend(layer.fold(query), key, value, layer, 0.125, step)
    layer.observe(query, step)
    triton.append(layer, key, value, step)
    layer.ledger.commit(step)
    return layer.leave(out)


def prompted(batch: int, length: int, **options):
    """A layer on the fake GPU with a prompt in it, and the counts of its ledger there."""
    layer = empty_layer(batch, dtype=torch.float16, device=CUDA, **options)
    step = Step.of_lengths([length] * batch, length)
    key, value = states(layer, 2, length), states(layer, 2, length)
    layer.make_room(step)
    for row in range(batch):
        layer.key.write_window(slice(row, row + 1), 0, key[row : row + 1, :, : layer.ring])
        layer.value.write_window(slice(row, row + 1), 0, value[row : row + 1, :, : layer.ring])
    layer.ledger.commit(step)
    layer.ledger.counts(CUDA)  # made once behind a prompt, from the host
    decode(layer, Step.of(None, batch, 1))  # the first step makes what is kept: the rotation
    return layer


def test_the_tools_see_what_they_should():
    """Else the tests below would pass whatever a step does."""
    with fake_gpu() as (copies, _):
        on_device = torch.ones(3, device=CUDA)
        for look in (on_device.sum().item, on_device.tolist, lambda: bool(on_device.any())):
            with pytest.raises(DataDependentOutputException):
                look()
        with pytest.raises(DataDependentOutputException):
            torch.equal(on_device, on_device)
        on_device.add_(1).sum()
        assert not copies.found
        torch.tensor([1, 2], device=CUDA)
        torch.ones(2).to(CUDA)
        on_device.copy_(torch.ones(3))
        on_device[:2] = torch.ones(2)
        assert len(copies.found) == 4
        on_device[1:] = on_device[:2]
        on_device[0] = 1.0
        assert len(copies.found) == 4


@pytest.mark.parametrize("padded", [False, True], ids=["all real", "known to the device"])
@pytest.mark.parametrize("length, steps, metadata_bits", [(30, 10, 16), (127, 40, 16), (300, 40, 16), (127, 40, 8)])
def test_decode_steps_wait_for_nothing(padded, length, steps, metadata_bits):
    """Through sinks, the window, the step that chooses the wide channels, and later groups."""
    with fake_gpu() as (copies, launches):
        layer = prompted(2, length, metadata_bits=metadata_bits)
        assert layer.key.wide and layer.rotates
        _check_steps(layer, padded, steps, copies, launches)


@pytest.mark.parametrize("padded", [False, True], ids=["all real", "known to the device"])
@pytest.mark.parametrize("static", ["int8", "full precision"])
def test_steps_that_pack_at_once_wait_for_nothing(padded, static):
    with fake_gpu() as (copies, launches):
        _check_steps(prompted(2, 300, static=static), padded, 40, copies, launches)


def _check_steps(layer: PackedLayer, padded: bool, steps: int, copies: CopiesFromTheHost, launches: Launches) -> None:
    real = torch.ones(2, 1, dtype=torch.bool, device=CUDA) if padded else None
    copies.found.clear()
    launches.grids.clear()
    for _ in range(steps):
        out = decode(layer, Step.of(real, 2, 1))
        assert out.shape == (2, 1, 4, 64)
    assert not copies.found
    assert len(launches.grids) == 3 * steps  # attend, combine, append


def test_a_step_only_the_device_knows_is_known_to_no_list():
    """The host is not told which sequences got a token, and asking for it would wait."""
    with fake_gpu():
        layer = prompted(2, 40)
        decode(layer, Step.of(torch.ones(2, 1, dtype=torch.bool, device=CUDA), 2, 1))
        with pytest.raises(DataDependentOutputException):
            layer.lengths  # noqa: B018


def test_states_that_int32_cannot_reach_are_refused():
    """More elements of a sequence than a kernel counts."""
    with fake_gpu() as (_, launches):
        layer, step = empty_layer(1, dtype=torch.float16, device=CUDA), Step.of(None, 1, 1 << 20)
        key = states(layer, 2, 1 << 20)
        with pytest.raises(ValueError, match="smaller pieces"):
            backend("triton").attend(states(layer, 64, 1 << 20), key, key, layer, 0.125, step)
        assert not launches.grids


@pytest.mark.parametrize("tokens, heads, batch", [(200_000, 64, 1), (1 << 21, 8, 1), (1, 16, 20_000)])
def test_grids_stay_within_their_limits(tokens, heads, batch):
    """However many tokens or sequences are new: attention, merging, packing and appending."""
    with fake_gpu() as (_, launches):
        triton = backend("triton")
        layer = empty_layer(batch, dtype=torch.float16, device=CUDA, kv_heads=8)
        step = Step.of(None, batch, tokens)
        layer.make_room(step)
        query, key, value = states(layer, heads, tokens), states(layer, 8, tokens), states(layer, 8, tokens)
        triton.attend(query, key, value, layer, 0.125, step)
        for side in layer.sides:
            triton.pack(side, slice(None), 0, key[:, :, : tokens // 128 * 128])
        if tokens == 1:
            triton.append(layer, key, value, step)
        assert len(launches.grids) == (3 if tokens == 1 else 4)
        programs = {grid: [(size, most) for size, most in zip(grid, MOST_PROGRAMS)] for grid in launches.grids}
        assert all(0 < size <= most for grid in programs.values() for size, most in grid)
        assert max(max(grid) for grid in launches.grids) > 65535


def static_parameters(config) -> StaticParameters:
    """For the layers but the first."""
    shape = config.num_key_value_heads, config.head_dim
    layers = {
        index: (random_scales(*shape, True), random_scales(*shape, False))
        for index in range(1, config.num_hidden_layers)
    }
    return StaticParameters(layers, model_facts(config), {}, {}, 0)


def model_on_the_gpu():
    """A small model whose weights are to be fake: `place` puts them on the GPU."""
    config = LlamaKIVIConfig(
        vocab_size=131, hidden_size=256, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM_KIVI(config).eval().to(torch.float16)


def place(model) -> None:
    """Put fake weights where a model has meta ones."""
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    group[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def prompted_cache(model, batch: int, length: int, **options):
    """A cache as a prompt leaves it, which only the host's waiting could make here: its lengths are known."""
    cache = model.create_kivi_cache(backend="triton", **options)
    key = torch.empty(batch, 2, length, 64, dtype=torch.float16, device=CUDA)
    step = Step.of_lengths([length] * batch, length)
    for layer in cache.kivi_layers:
        layer.lazy_initialization(key, key)
        layer.store.make_room(step)
    cache.ledger.commit(step)
    return cache


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "a mask"])
@pytest.mark.parametrize("length, static", [(150, False), (400, False), (150, True)])
def test_decode_steps_of_a_model_wait_for_nothing(masked, length, static):
    """From `model(...)` to the kernels, through the step that chooses the wide channels, with an attention mask and without."""
    model = model_on_the_gpu()
    with fake_gpu() as (copies, launches), torch.no_grad():
        place(model)
        cache = prompted_cache(model, 2, length, static=static and static_parameters(model.config))
        token = torch.zeros(2, 1, dtype=torch.long, device=CUDA)
        for step in range(40):
            mask = torch.ones(2, length + step + 1, dtype=torch.long, device=CUDA) if masked else None
            if step == 1:  # the first makes what is kept: counts on the device, the rotation
                copies.found.clear()
                launches.grids.clear()
            logits = model(token, attention_mask=mask, past_key_values=cache).logits
            assert logits.shape == (2, 1, 131)
        assert not copies.found
        assert len(launches.grids) == 39 * 3 * 3
        assert cache.get_seq_length() == length + 40
