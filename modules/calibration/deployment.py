"""Deployment by fake quantization: caches hold what static INT8 codes would give back, in full precision.

It shows what the codes cost, in any model and with any cache, and saves no memory; `KIVICache(static=...)` stores them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from modules.calibration.interception import Interception, attention_modules
from modules.calibration.quantizers import FakeQuantDynamicCache
from modules.codecs.static import StaticParameters


class FakeQuantization:
    """What rounds the states of every layer that has parameters; those of other layers stay as they are."""

    def __init__(self, parameters: StaticParameters) -> None:
        self.layers = {
            index: tuple(FakeQuantDynamicCache(scales) for scales in sides)
            for index, sides in parameters.layers.items()
        }

    def __call__(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states `[batch, heads, tokens, head_dim]` of a layer, rounded."""
        if layer_idx not in self.layers:
            return key_states, value_states
        key, value = self.layers[layer_idx]
        return key(key_states), value(value_states)


def deploy(model: nn.Module, parameters: StaticParameters | str | Path) -> Interception:
    """Let a model's attention layers give their caches fake-quantized states, whatever the caches are.

    with deploy(model, parameters):
        model.generate(**inputs)

    Args:
        parameters: from `calibrate`, or the file they were saved to.

    Returns:
        A handle: `remove()`, or the end of `with`, leaves the model as it was.

    Raises:
        ValueError: for parameters of another model; it says what differs.
    """
    parameters = parameters if isinstance(parameters, StaticParameters) else StaticParameters.load(parameters)
    parameters.check_fits(model.config)
    fake = FakeQuantization(parameters)
    return Interception(attention_modules(model), lambda path, key, value, layer_idx: fake(key, value, layer_idx))


class FakeQuantizedCache(DynamicCache):
    """A `DynamicCache` of fake-quantized states, for one cache beside others on one model.

    Raises:
        ValueError: for parameters of another model.
    """

    def __init__(self, config: PreTrainedConfig, parameters: StaticParameters) -> None:
        super().__init__(config=config)
        parameters.check_fits(config)
        self.fake = FakeQuantization(parameters)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As a `DynamicCache`, of rounded states."""
        return super().update(*self.fake(key_states, value_states, layer_idx), layer_idx, *args, **kwargs)
