"""Decode steps replayed from a CUDA graph, so that launching some hundred kernels a token costs one launch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.utils import output_capturing

from modules.cache.cache import KIVICache
from modules.cache.layer import KIVICacheLayer
from modules.cache.modes import as_data
from modules.store.step import Step

_MOST_IN_VAIN = 3


class DecodeGraphs:
    """The graphs of one model: a runner for every cache it decodes over, gone with the cache.

    Nothing here keeps a cache alive, nor its memory: a graph is bound to addresses and is dropped when the cache has moved.
    """

    def __init__(self) -> None:
        self._runners: weakref.WeakKeyDictionary[KIVICache, DecodeRunner] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeGraphs:
        return DecodeGraphs()

    def __reduce__(self) -> tuple[type[DecodeGraphs], tuple[()]]:
        return DecodeGraphs, ()

    def runner(self, cache: KIVICache) -> DecodeRunner:
        """What decodes over `cache`."""
        if cache not in self._runners:
            self._runners[cache] = DecodeRunner()
        return self._runners[cache]


@dataclasses.dataclass
class _Capture:
    """A recorded step: its buffers, and what it is bound to.

    Attributes:
        input_ids, positions: int64 `[B, 1]`.
        real: bool `[B, 1]`, None in a step in which every sequence gets a token.
        logits: `[B, 1, vocabulary]`.
        moves: of the cache's ledger when it was recorded.
    """

    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor | None
    logits: torch.Tensor
    moves: int

    def fits(self, cache: KIVICache, input_ids: torch.Tensor, step: Step) -> bool:
        """Whether the cache lies where it lay, and the step is of the same kind."""
        same_kind = self.input_ids.shape == input_ids.shape and (self.real is None) == step.all_real
        return same_kind and self.moves == cache.ledger.moves


class DecodeRunner:
    """Runs a model one token at a time over a KIVI cache, and replays the step from a CUDA graph where it can.

    Covered: one new token over a cache that lies on one GPU, uses the Triton backend in every layer and is not offloaded.
    Lengths live on the device, so one graph serves every position, packing included; the host's side of the ledger is
    moved on here.

    Not covered, and then run eagerly, with the same result: anything `why_not` names, several new tokens at once
    (prefill, speculative decoding), and the first step, which compiles the kernels. After something moved the cache's
    memory (`reorder_cache`, `batch_select_indices`, `crop`, a step that failed; growing: `generate()` reserves what it
    may need, and a cache made with `max_length=` never grows) the next step records again; where that happens step after
    step, as in beam search, the runner stays eager. Model code that waits for the device or branches on values of tensors
    inside `forward` cannot be recorded: the first attempt then warns and the runner stays eager; so it does, with a
    warning, while the model has forward hooks, which a graph would not call. A graph reads the weights where they lay
    when it was recorded: change them in place, or start with a new cache.

    The kernels have run through Triton's interpreter and been compiled for sm_80, sm_90 and sm_100; the tests that replay
    a graph need a GPU.
    """

    def __init__(self) -> None:
        self._capture: _Capture | None = None
        self._warm: tuple[int, bool] | None = None  # batch size and kind of the step that has run eagerly
        self._refused = False
        self._in_vain = 0  # recordings in a row that were not replayed again
        self.running = False

    @staticmethod
    def why_not(model: torch.nn.Module, cache: KIVICache) -> str | None:
        """What keeps steps of `model` over `cache` from being replayed; None where nothing does."""
        if not torch.cuda.is_available():
            return "there is no GPU"
        if "eager" in (model.config._attn_implementation or ""):
            return "eager attention rebuilds the keys and values, by lengths that the host knows"
        if cache.offloading:
            return "the cache is offloaded"
        layers = cache.layers
        if not all(isinstance(layer, KIVICacheLayer) and layer.store is not None for layer in layers):
            return "some layers are not packed, or hold no prompt yet"
        if any(layer.backend.name != "triton" for layer in layers):
            return "some layers do not use the Triton backend"
        if cache.ledger.fewest_packed == 0 and any(layer.store.key.wide for layer in layers):
            return "some sequences may be too short to have their wide key channels chosen"
        if len({layer.device for layer in layers}) > 1:
            return "its layers are on several devices"
        return None

    @as_data
    def step(
        self,
        model: torch.nn.Module,
        cache: KIVICache,
        input_ids: torch.Tensor,
        step: Step,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[B, q, vocabulary]` after storing the tokens `input_ids`, int64 `[B, q]`, in `cache`.

        Positions, int64 `[B or 1, q]`, are where None those of the cache: as many as each sequence has tokens. From a graph (`q = 1`) the logits are a buffer that the next step overwrites; clone them to keep them. Gives no
        gradients.

        Raises:
            ValueError: where the cache is full, or packed states that its metadata cannot hold (seen some tokens later).
        """
        self.running = True
        try:
            if position_ids is None:
                position_ids = cache.next_positions(step, input_ids.shape[0], input_ids.device)
            position_ids = position_ids.expand(input_ids.shape[0], -1)
            run = self._replay if self._can_replay(model, cache, input_ids, step) else self._eager
            return run(model, cache, input_ids, position_ids, step)
        finally:
            self.running = False

    def _can_replay(self, model: torch.nn.Module, cache: KIVICache, input_ids: torch.Tensor, step: Step) -> bool:
        if step.length != 1 or self._refused or self.why_not(model, cache) is not None:
            return False
        if any(map(_is_called, _hooks_of(model))):
            _warn_of_hooks()
            return False
        kind, before = (input_ids.shape[0], step.all_real), self._warm
        self._warm = kind
        return kind == before

    def _replay(
        self,
        model: torch.nn.Module,
        cache: KIVICache,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        cache.ledger.check_room(step)
        for layer in cache.kivi_layers:
            if layer.store is not None:
                layer.store.make_room(step)  # not within a graph, which could not allocate for keeps
        if self._capture is None or not self._capture.fits(cache, input_ids, step):
            self._in_vain += 1
            self._refused = self._in_vain > _MOST_IN_VAIN
            self._capture = None  # its memory is free before the next one takes its own
            self._capture = None if self._refused else self._record(model, cache, input_ids, position_ids, step)
        else:
            self._in_vain = 0
        capture = self._capture
        if capture is None:
            return self._eager(model, cache, input_ids, position_ids, step)
        capture.input_ids.copy_(input_ids)
        capture.positions.copy_(position_ids)
        if capture.real is not None:
            capture.real.copy_(step.real)
        capture.graph.replay()
        cache.finish_replay(step)
        return capture.logits

    @staticmethod
    def _eager(
        model: torch.nn.Module,
        cache: KIVICache,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        output = model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, kivi_step=step
        )
        return output.logits

    def _record(
        self,
        model: torch.nn.Module,
        cache: KIVICache,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        step: Step,
    ) -> _Capture | None:
        """Record a step without running it: the host's side of the ledger stays where it is."""
        ledger, device = cache.ledger, input_ids.device
        ledger.counts(device)  # before the recording, which may not copy from the host
        ids, positions = input_ids.clone(), position_ids.clone()
        still = dataclasses.replace(step, real=None if step.real is None else step.real.clone())
        graph, moves = torch.cuda.CUDAGraph(), ledger.moves
        try:
            with _recording(graph, device), ledger.recording():
                logits = self._eager(model, cache, ids, positions, still)
        except Exception as error:  # what is wrong with the step itself, the eager one that follows says
            self._refused = True
            warnings.warn(
                f"decoding stays eager: the step could not be recorded in a CUDA graph ({error}).", stacklevel=3
            )
            return None
        return _Capture(graph, ids, positions, still.real, logits, moves)


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


def _hooks_of(model: torch.nn.Module) -> list[dict[int, Callable]]:
    return [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _is_called(hooks: dict[int, Callable]) -> bool:
    """Whether there is a hook among a module's that would be missed. transformers' own, which collect the outputs that a
    call asks for, stay in place once installed; such a call is not replayed."""
    return any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks.values())


@functools.cache
def _warn_of_hooks() -> None:
    warnings.warn("decoding stays eager: the model has forward hooks, which a CUDA graph would not call.", stacklevel=5)
