"""Decode steps replayed from a CUDA graph, so that launching some hundred kernels a token costs one launch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from transformers.utils import output_capturing

from modules.kivi_cache_general import KIVICache, KIVICacheLayer, Step, as_data
from modules.packed_state import PackedLayer

_MOST_IN_VAIN = 3


@dataclasses.dataclass
class _Capture:
    """A recorded step and what it is bound to: the memory of the cache at the time."""

    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor  # int64 [B, 1]
    logits: torch.Tensor  # [B, 1, vocabulary]
    bound_to: list[tuple[PackedLayer, torch.Tensor, int]]  # layers, their counts and capacities

    def fits(self, states: list[PackedLayer], input_ids: torch.Tensor) -> bool:
        """Whether the cache lies where it lay: what moves a layer's memory makes its counts anew or changes its capacity."""
        return self.input_ids.shape == input_ids.shape and all(
            state is bound and state.counts is counts and state.key.capacity == capacity
            for state, (bound, counts, capacity) in zip(states, self.bound_to, strict=True)
        )


class DecodeRunner:
    """Runs a model one token at a time over a KIVI cache, which owns it; replays the step from a CUDA graph where it can.

    Covered: one new token for every sequence of the batch, all of them real, over a cache that lies on one GPU, uses the
    Triton backend in every layer and is not offloaded. Lengths live on the device, so one graph serves every position,
    packing included; the host-side lengths of the cache are advanced here and stay right, also for padded prompts.
    Positions are those of the cache (`position_ids` = tokens stored of each sequence).

    Not covered, and then run eagerly, with the same result: anything `why_not` names, several new tokens at once
    (prefill, speculative decoding), and the first step, which compiles the kernels. After something moved the cache's
    memory (`reorder_cache`, `batch_select_indices`, `crop`, a step that failed; a growing cache moves each time it is a
    twentieth longer, one made with `max_length=` never) the next step records again; where that happens step after step,
    as in beam search, the runner stays eager. Model code that waits for the device or branches on values of tensors
    inside `forward` cannot be recorded: the first attempt then warns and the runner stays eager; so it does, with a
    warning, while the model has forward hooks, which a graph would not call. A graph reads the weights where they lay
    when it was recorded: change them in place, or start with a new cache.

    The kernels have run through Triton's interpreter and been compiled for sm_80, sm_90 and sm_100; the tests that replay
    a graph need a GPU.

    Args:
        model: a causal LM whose forward takes `input_ids`, `position_ids`, `past_key_values` and returns `.logits`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._capture: _Capture | None = None
        self._warm_batch: int | None = None  # the batch size that has run eagerly once
        self._refused = False
        self._in_vain = 0  # recordings in a row that were not replayed again
        self._hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.running = False

    @staticmethod
    def why_not(model: torch.nn.Module, cache: KIVICache) -> str | None:
        """What keeps steps of `model` over `cache` from being replayed; None where nothing does."""
        if not torch.cuda.is_available():
            return "there is no GPU"
        if model.config._attn_implementation == "eager":
            return "eager attention rebuilds the keys and values, by lengths that the host knows"
        if not isinstance(cache, KIVICache) or cache.offloading:
            return "it is not a KIVI cache that stays on the GPU"
        layers = cache.layers
        if not all(isinstance(layer, KIVICacheLayer) and layer.state is not None for layer in layers):
            return "some layers are not packed, or hold no prompt yet"
        states = [layer.state for layer in layers]
        if any(state.backend != "triton" for state in states):
            return "some layers do not use the Triton backend"
        if any(state.key.wide and not all(state.packed) for state in states):
            return "some sequences are too short to have their wide key channels chosen, which the host does"
        if len({state.key.window.device for state in states}) > 1:
            return "its layers are on several devices"
        return None

    @as_data
    def step(self, cache: KIVICache, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, q, vocabulary]` after storing the tokens `input_ids`, int64 `[B, q]`, in `cache`.

        From a graph (`q = 1`) the logits are a buffer that the next step overwrites; clone them to keep them. Gives no
        gradients.

        Raises:
            ValueError: where the cache is full, or packed states that its metadata cannot hold (seen when they are packed);
                the step is then not stored.
        """
        self.running = True
        try:
            return self._step(cache, input_ids)
        finally:
            self.running = False

    def _step(self, cache: KIVICache, input_ids: torch.Tensor) -> torch.Tensor:
        replayable = input_ids.shape[1] == 1 and not self._refused and self.why_not(self.model, cache) is None
        if replayable and any(map(_is_called, self._hooks)):
            _warn_of_hooks()
            replayable = False
        if not replayable or self._warm_batch != input_ids.shape[0]:
            self._warm_batch = input_ids.shape[0] if input_ids.shape[1] == 1 else self._warm_batch
            return self._eager(cache, input_ids)
        states = _states(cache)
        for state in states:
            state.check_room(input_ids.shape[0], [1] * input_ids.shape[0])
            state.make_room([1] * input_ids.shape[0])  # not within a graph, which could not allocate for keeps
        if self._capture is None or not self._capture.fits(states, input_ids):
            self._in_vain += 1
            self._refused = self._in_vain > _MOST_IN_VAIN
            self._capture = None  # its memory is free before the next one takes its own
            self._capture = None if self._refused else self._record(cache, input_ids)
        else:
            self._in_vain = 0
        if self._capture is None:
            return self._eager(cache, input_ids)
        self._capture.input_ids.copy_(input_ids)
        before = _host_side(cache)
        try:
            self._capture.graph.replay()
            _advance(cache)
        except BaseException:
            _go_back(cache, before)
            raise
        return self._capture.logits

    def _eager(self, cache: KIVICache, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits

    def _record(self, cache: KIVICache, input_ids: torch.Tensor) -> _Capture | None:
        """Record a step without running it: what it did to the host's side of the cache is undone."""
        states = _states(cache)
        counts = [state.device_counts() for state in states]  # before the recording, which may not copy from the host
        still = input_ids.clone()
        before = _host_side(cache)
        for layer in cache.layers:
            layer.column_is_real = None  # the new column is real; `_advance` writes it down
        graph, recorded = torch.cuda.CUDAGraph(), False
        try:
            with _recording(graph, still.device):
                positions = counts[0][0].to(torch.int64).unsqueeze(1)
                output = self.model(input_ids=still, position_ids=positions, past_key_values=cache, use_cache=True)
            recorded = True
        except Exception as error:  # what is wrong with the step itself, the eager one that follows says
            self._refused = True
            warnings.warn(
                f"decoding stays eager: the step could not be recorded in a CUDA graph ({error}).", stacklevel=3
            )
        finally:
            _go_back(cache, before, counts if recorded else None)
        return _Capture(graph, still, output.logits, _memory(states)) if recorded else None


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Record what is launched on `device` within; a failure leaves the caller on the stream it was on.

    `torch.cuda.graph` alone would not: it raises before it restores the stream.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with (
            torch.cuda.stream(stream),
            # others may use the GPU meanwhile
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            yield


def _states(cache: KIVICache) -> list[PackedLayer]:
    return [layer.state for layer in cache.layers]


def _host_side(cache: KIVICache) -> list[tuple[int, torch.Tensor | None, list[int], list[int]]]:
    """What the host knows of each layer's length."""
    return [(layer.columns, layer.column_is_real, layer.state.lengths, layer.state.packed) for layer in cache.layers]


def _go_back(
    cache: KIVICache,
    host_side: list[tuple[int, torch.Tensor | None, list[int], list[int]]],
    counts: list[torch.Tensor] | None = None,
) -> None:
    """Undo a step on the host's side, and let the device go on from `counts`, where None from what the host knows.

    One token takes free slots only, so nothing stored has to be undone.
    """
    layers = zip(cache.layers, host_side, counts or [None] * len(host_side))
    for layer, (columns, real, lengths, packed), on_device in layers:
        layer.columns, layer.column_is_real = columns, real
        layer.state.lengths, layer.state.packed, layer.state.counts = lengths, packed, on_device


def _advance(cache: KIVICache) -> None:
    """One more token in every sequence, on the host's side."""
    from modules.kernels.triton_quantize import check_packed

    packing = []
    for layer in cache.layers:
        state = layer.state
        before, batch = state.packed, state.batch_size
        state.advance([1] * batch, counts=state.counts)
        layer.add_columns(Step.of(None, batch, 1), 1)
        if state.packed != before:
            packing.append(state)
    for state in packing:
        check_packed(state)


def _is_called(hooks: dict[int, Callable]) -> bool:
    """Whether there is a hook among a module's that would be missed. transformers' own, which collect the outputs that a
    call asks for, stay in place once installed; such a call is not replayed."""
    return any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks.values())


@functools.cache
def _warn_of_hooks() -> None:
    warnings.warn("decoding stays eager: the model has forward hooks, which a CUDA graph would not call.", stacklevel=4)


def _memory(states: list[PackedLayer]) -> list[tuple[PackedLayer, torch.Tensor, int]]:
    """What a recorded step reads and writes, in a form that takes no time to compare."""
    return [(state, state.device_counts(), state.key.capacity) for state in states]
