"""Pauses in the forward of a prompt, in which answers that are being made go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def pausing(model: PreTrainedModel, tokens: int, pause: Callable[[], None]) -> Iterator[None]:
    """Within it a forward of `model` calls `pause` between its layers, each time it has done the work of so many tokens.

    A layer's share of a token's work is one part in as many as there are layers. Nothing is cut: the forward gives what it gives
    without pauses. `pause` may run the model over other caches, and may raise, which ends the forward.
    """
    layers = layers_of(model)
    done, paused = 0.0, False

    def before_layer(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal done, paused
        if paused:  # a forward within the pause
            return
        if done >= tokens:
            done, paused = 0.0, True
            try:
                pause()
            finally:
                paused = False
        states = inputs[0] if inputs else named["hidden_states"]  # [B, T, hidden_size]
        done += states.shape[1] / len(layers)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before_layer, with_kwargs=True).remove)
        yield


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The layers of a decoder, by whatever name it has them; none where they are in no list, and then there are no pauses."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (part for part in model.get_decoder().modules() if isinstance(part, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), ())
