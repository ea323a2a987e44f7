"""Calibration: a model reads texts, and the range of every key and value channel is kept."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from modules.calibration.batches import sequences
from modules.calibration.interception import INTERFACE, Interception, attention_modules
from modules.calibration.quantizers import DynamicCacheQuantizer
from modules.calibration.spec import QuantizationConfig, Spec, load_spec
from modules.codecs.static import StaticParameters, model_facts

SIDES = ("keys", "values")


def calibrate(
    model: nn.Module,
    spec: str | Path | Mapping[str, Any] | Sequence[Any] | Spec,
    batches: Iterable[Any],
    *,
    make_cache: Callable[[], Any] | None = None,
    progress: bool = True,
) -> StaticParameters:
    """The static INT8 parameters of a model's cache, from the keys and values that it computes of some texts.

    The states are observed as they are, in full precision, and each sequence runs alone without its padding. So the result is
    the same for one batch or ten, in any order, padded or not.

    Args:
        model: any whose attention modules are named `self_attn` and call `cache.update(key_states, value_states, layer_idx)`
            of a cache that is passed to their forward.
        spec: which layers, and how; a path, or what `load_spec` takes.
        batches: ids `[batch, tokens]`, or what a tokenizer gives (`input_ids`, `attention_mask`).
        make_cache: an empty cache for each sequence; None for a `DynamicCache`, or the model's own choice where it is not
            one of transformers.
        progress: show a bar on stderr.

    Raises:
        ValueError: for a spec that is wrong or does not fit the model, batches without tokens, states that are not finite, and
            caches that are not updated; it says what to do. The model is as it was before, whatever happens.
    """
    spec = load_spec(spec)
    modules = attention_modules(model)
    chosen = spec.choose(list(modules))
    if isinstance(batches, (torch.Tensor, Mapping, str)):
        raise ValueError(
            f"batches must be a list of batches, or another iterable; got a {type(batches).__name__}. Put it in a list."
        )
    make_cache = make_cache or _default_cache(model)
    observers = _Observers(chosen)
    tokens = 0
    with _evaluating(model), Interception({path: modules[path] for path in chosen}, observers) as interception:
        shown = track(batches, "calibrating", console=Console(stderr=True), disable=not progress, transient=True)
        for number, batch in enumerate(shown):
            for ids in sequences(batch, f"batch {number}"):
                _run(model, ids, make_cache)
                tokens += ids.shape[1]
    if not tokens:
        raise ValueError("there are no batches, so nothing was observed; give texts of some hundred tokens at least.")
    observers.check_complete(interception.got_cache)
    layers = dict(sorted(observers.layers.items()))
    return StaticParameters(
        layers={index: (key.scales(), value.scales()) for index, (key, value) in layers.items()},
        model=model_facts(model.config),
        spec=spec.as_data(),
        ranges={index: (*key.range, *value.range) for index, (key, value) in layers.items()},
        tokens=tokens,
    )


class _Observers:
    """A pair of quantizers for each layer, made when it is first updated."""

    def __init__(self, chosen: Mapping[str, QuantizationConfig]) -> None:
        self.chosen = chosen
        self.layers: dict[int, tuple[DynamicCacheQuantizer, DynamicCacheQuantizer]] = {}
        self.paths: dict[int, str] = {}

    def __call__(
        self, path: str, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Observe; the cache gets the states as they are."""
        if self.paths.setdefault(layer_idx, path) != path:
            raise ValueError(
                f"{self.paths[layer_idx]} and {path} both update the layer {layer_idx}; each must pass its own layer_idx."
            )
        if layer_idx not in self.layers:
            symmetric = self.chosen[path].symmetric
            self.layers[layer_idx] = DynamicCacheQuantizer(symmetric), DynamicCacheQuantizer(symmetric)
        for side, quantizer, states in zip(SIDES, self.layers[layer_idx], (key_states, value_states)):
            try:
                quantizer.observe(states)
            except ValueError as error:
                raise ValueError(f"the {side} of {path}: {error}") from None
        return key_states, value_states

    def check_complete(self, got_cache: set[str]) -> None:
        """Raise `ValueError` where a layer was not updated."""
        missing = [path for path in self.chosen if path not in self.paths.values()]
        if not missing:
            return
        without = [path for path in missing if path not in got_cache]
        problem = (
            f"{without[0]} was handed no cache (by one of the names past_key_values, cache, ...)"
            if without
            else f"{missing[0]} was handed a cache and did not call its update()"
        )
        raise ValueError(
            f"the cache was never updated by {len(missing)} of {len(self.chosen)} attention modules: {problem}. Check that "
            f"its forward takes the cache and calls {INTERFACE}; or exclude the layer in the spec."
        )


def _default_cache(model: nn.Module) -> Callable[[], Any] | None:
    return (lambda: DynamicCache(config=model.config)) if isinstance(model, PreTrainedModel) else None


def _run(model: nn.Module, ids: torch.Tensor, make_cache: Callable[[], Any] | None) -> None:
    """One forward of a sequence `[1, tokens]`, of which only the cache is of use."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    wanted: dict[str, Any] = {"use_cache": True} | ({"past_key_values": make_cache()} if make_cache else {})
    given = {name: value for name, value in wanted.items() if anything or name in parameters}
    if "logits_to_keep" in parameters:
        given["logits_to_keep"] = 1  # a vocabulary is wide
    model(input_ids=ids.to(next(model.parameters()).device), **given)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; afterwards each module is in its mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
