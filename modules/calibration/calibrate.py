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
from modules.options import check_count

SIDES = ("keys", "values")


def calibrate(
    model: nn.Module,
    spec: str | Path | Mapping[str, Any] | Sequence[Any] | Spec,
    batches: Iterable[Any],
    *,
    context: int | None = None,
    make_cache: Callable[[], Any] | None = None,
    progress: bool = True,
) -> StaticParameters:
    """The static INT8 parameters of a model's cache, from the keys and values that it computes of some texts.

    The states are observed as they are, in full precision, and each sequence runs alone without its padding. So the result is
    the same for one batch or ten, in any order, padded or not.

    Rotary positions turn pairs of key channels, some of them by less than a circle in thousands of tokens: what such a channel
    holds at position 3,000 is not to be seen at 500. So the texts are read at positions that are spread evenly over `context`.
    Attention within a text depends on distances alone, so that its values stay what they are.

    Args:
        model: any whose attention modules are named `self_attn` and call `cache.update(key_states, value_states, layer_idx)`
            of a cache that is passed to their forward.
        spec: which layers, and how; a path, or what `load_spec` takes.
        batches: ids `[batch, tokens]`, or what a tokenizer gives (`input_ids`, `attention_mask`).
        context: tokens that a cache is to hold; None for as many as the model's config allows. 0 reads every text from
            position 0 on.
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
    if context is not None:
        check_count("context", context, 0)
    texts = [ids for number, batch in enumerate(batches) for ids in sequences(batch, f"batch {number}")]
    if not texts:
        raise ValueError("there are no batches, so nothing was observed; give texts of some hundred tokens at least.")
    observers = _Observers(chosen)
    reader = _Reader(model, make_cache)
    with _evaluating(model), Interception({path: modules[path] for path in chosen}, observers) as interception:
        placed = list(spread(texts, _longest(model) if context is None else context))
        shown = track(placed, "calibrating", console=Console(stderr=True), disable=not progress, transient=True)
        for ids, first in shown:
            reader.read(ids, first)
    observers.check_complete(interception.got_cache)
    layers = dict(sorted(observers.layers.items()))
    return StaticParameters(
        layers={index: (key.scales(), value.scales()) for index, (key, value) in layers.items()},
        model=model_facts(model.config),
        spec=spec.as_data(),
        ranges={index: (*key.range, *value.range) for index, (key, value) in layers.items()},
        tokens=sum(ids.shape[1] for ids in texts),
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


def spread(texts: Sequence[torch.Tensor], context: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Texts `[1, tokens]`, each with its first position: spread evenly over `context`, in an order that only the texts give."""
    ordered = sorted(texts, key=lambda ids: ids[0].tolist())
    for number, ids in enumerate(ordered):
        room = max(0, context - ids.shape[1])
        yield ids, room * number // max(1, len(ordered) - 1)


def _longest(model: nn.Module) -> int:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0


class _Reader:
    """Forwards of a model for the sake of its cache alone."""

    def __init__(self, model: nn.Module, make_cache: Callable[[], Any] | None) -> None:
        self.model, self.make_cache = model, make_cache
        if make_cache is None and isinstance(model, PreTrainedModel):
            self.make_cache = lambda: DynamicCache(config=model.config)
        parameters = inspect.signature(model.forward).parameters
        self.takes = set(parameters)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            self.takes |= {"use_cache", "past_key_values", "position_ids"}

    def read(self, ids: torch.Tensor, first: int) -> None:
        """A sequence `[1, tokens]` from position `first` on, where the model takes positions."""
        positions = torch.arange(first, first + ids.shape[1]).unsqueeze(0)
        wanted = {
            "use_cache": True,
            "past_key_values": self.make_cache and self.make_cache(),
            "position_ids": positions.to(self.device),
            "logits_to_keep": 1,  # a vocabulary is wide
        }
        given = {name: value for name, value in wanted.items() if name in self.takes and value is not None}
        self.model(input_ids=ids.to(self.device), **given)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


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
