"""Decode steps replayed from a CUDA graph, so that launching some hundred kernels a token costs one launch."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import torch

from modules.kivi_cache_general import KIVICache, KIVICacheLayer, Step
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
    """Runs a model one token at a time over a KIVI cache; replays the step from a CUDA graph where it can.

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
        cache: the cache, already holding the prompt.

    Example:
        >>> runner = DecodeRunner(model, cache)
        >>> for _ in range(new_tokens):
        ...     token = runner.step(token).argmax(-1)
    """

    def __init__(self, model: torch.nn.Module, cache: KIVICache) -> None:
        self.model, self.cache = model, cache
        self._capture: _Capture | None = None
        self._warm_batch: int | None = None  # the batch size that has run eagerly once
        self._refused = False
        self._in_vain = 0  # recordings in a row that were not replayed again
        self._hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.running = False

    @staticmethod
    def why_not(cache: KIVICache) -> str | None:
        """What keeps steps over `cache` from being replayed; None where nothing does."""
        if not torch.cuda.is_available():
            return "there is no GPU"
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

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, q, vocabulary]` after storing the tokens `input_ids`, int64 `[B, q]`.

        From a graph (`q = 1`) the logits are a buffer that the next step overwrites; clone them to keep them.

        Raises:
            ValueError: where the cache is full, or packed states that its metadata cannot hold (seen when they are packed).
        """
        self.running = True
        try:
            return self._step(input_ids)
        finally:
            self.running = False

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        replayable = input_ids.shape[1] == 1 and not self._refused and self.why_not(self.cache) is None
        if replayable and any(self._hooks):
            _warn_of_hooks()
            replayable = False
        if not replayable or self._warm_batch != input_ids.shape[0]:
            self._warm_batch = input_ids.shape[0] if input_ids.shape[1] == 1 else self._warm_batch
            return self._eager(input_ids)
        states = self._states()
        for state in states:
            state.check_room(input_ids.shape[0], [1] * input_ids.shape[0])
            state.make_room([1] * input_ids.shape[0])  # not within a graph, which could not allocate for keeps
        if self._capture is None or not self._capture.fits(states, input_ids):
            self._in_vain += 1
            self._refused = self._in_vain > _MOST_IN_VAIN
            self._capture = None  # its memory is free before the next one takes its own
            self._capture = None if self._refused else self._record(input_ids)
        else:
            self._in_vain = 0
        if self._capture is None:
            return self._eager(input_ids)
        self._capture.input_ids.copy_(input_ids)
        self._capture.graph.replay()
        self._advance()
        return self._capture.logits

    def _eager(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True).logits

    def _states(self) -> list[PackedLayer]:
        return [layer.state for layer in self.cache.layers]

    def _record(self, input_ids: torch.Tensor) -> _Capture | None:
        """Record a step without running it: what it did to the host's side of the cache is undone."""
        layers = self.cache.layers
        states = self._states()
        counts = [state.device_counts() for state in states]  # before the recording, which may not copy from the host
        still = input_ids.clone()
        saved = [
            (layer.columns, layer.column_is_real, state.lengths, state.packed) for layer, state in zip(layers, states)
        ]
        for layer in layers:
            layer.column_is_real = None  # the new column is real; `_advance` writes it down
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
                positions = counts[0][0].to(torch.int64).unsqueeze(1)
                output = self.model(input_ids=still, position_ids=positions, past_key_values=self.cache, use_cache=True)
        except RuntimeError as error:
            self._refused = True
            warnings.warn(
                f"decoding stays eager: the step could not be recorded in a CUDA graph ({error}).", stacklevel=3
            )
        for layer, state, (columns, real, lengths, packed) in zip(layers, states, saved):
            layer.state, layer.columns, layer.column_is_real = state, columns, real
            state.lengths, state.packed = lengths, packed
            if self._refused:
                state.counts = None
        return None if self._refused else _Capture(graph, still, output.logits, _memory(states))

    def _advance(self) -> None:
        """One more token in every sequence, on the host's side."""
        from modules.kernels.triton_quantize import check_packed

        for layer, state in zip(self.cache.layers, self._states()):
            before, batch = state.packed, state.batch_size
            state.advance([1] * batch, counts=state.counts)
            layer.add_columns(Step.of(None, batch, 1), 1)
            if state.packed != before:
                check_packed(state)


@functools.cache
def _warn_of_hooks() -> None:
    warnings.warn("decoding stays eager: the model has forward hooks, which a CUDA graph would not call.", stacklevel=4)


def _memory(states: list[PackedLayer]) -> list[tuple[PackedLayer, torch.Tensor, int]]:
    """What a recorded step reads and writes, in a form that takes no time to compare."""
    return [(state, state.device_counts(), state.key.capacity) for state in states]
