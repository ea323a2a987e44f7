"""Bits chosen layer by layer: a short text says which layers' keys and values cost most when they alone are quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from modules.evaluation.candidates import kivi
from modules.evaluation.quality import Progress, measure_quality
from modules.evaluation.streaming import CHUNK
from modules.options import FULL_PRECISION_BITS, KIVIOptions, head_dim_of

TOKENS = 1024
EXTRA_BITS = 0.125
SIDES = ("k_bits", "v_bits")


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """KL from full precision (nats) with 2 bits in one side of one layer and full precision in all others.

    Attributes:
        k_bits, v_bits: of the keys and of the values, an entry a layer.
        head_dim: channels.
    """

    k_bits: tuple[float, ...]
    v_bits: tuple[float, ...]
    head_dim: int

    @property
    def candidates(self) -> int:
        """Caches that were measured."""
        return len(self.k_bits) + len(self.v_bits)


def _alone(side: str, layer: int, layers: int) -> dict[str, Any]:
    """Options with 2 bits in one side of one layer."""
    options = {name: [FULL_PRECISION_BITS] * layers for name in SIDES}
    options[side][layer] = 2
    return options


def measure_layers(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    chunk: int = CHUNK,
    skip: int | None = None,
    progress: Progress | None = None,
) -> LayerCosts:
    """Stream a text through a cache for every side of every layer, quantized alone.

    Args:
        model, input_ids, chunk, progress: as for `measure_quality`.
        skip: tokens before the first measured prediction; None for a quarter of the text.
        options: KIVI options other than bits.

    Raises:
        ValueError: as `measure_quality`, and for options that are not allowed.
    """
    layers = model.config.num_hidden_layers
    skip = input_ids.shape[-1] // 4 if skip is None else skip
    caches = [
        kivi(f"{side} {layer}", {**(options or {}), **_alone(side, layer, layers)})
        for side in SIDES
        for layer in range(layers)
    ]
    rows = measure_quality(model, input_ids, caches, chunk=chunk, skip=skip, progress=progress).rows[1:]
    costs = [row.kl for row in rows if row.kl is not None]  # every KIVI cache is measured
    return LayerCosts(tuple(costs[:layers]), tuple(costs[layers:]), head_dim_of(model.config))


def choose_bits(
    costs: LayerCosts, extra_bits: float = EXTRA_BITS, options: Mapping[str, Any] | None = None
) -> dict[str, list[int]]:
    """`k_bits` and `v_bits`, an entry a layer: 4 where it saves most KL a stored bit, else 2.

    Args:
        costs: from `measure_layers`.
        extra_bits: what a quantized element may take on average beyond 2 bits everywhere, metadata included.
        options: KIVI options other than bits.

    Raises:
        ValueError: for `extra_bits` below 0, and options that are not allowed.
    """
    if extra_bits < 0:
        raise ValueError(f"extra_bits must be 0 or more; got {extra_bits}. 2 bits are the least a layer can have.")
    chosen_options = KIVIOptions.from_config(None, options)
    layers = len(costs.k_bits)
    low, high = (chosen_options.stored_bits(bits, bits, costs.head_dim) for bits in (2, 4))
    more = {side: after - before for side, before, after in zip(SIDES, low, high)}
    spare = extra_bits * 2 * layers
    places = [(getattr(costs, side)[layer] / more[side], side, layer) for side in SIDES for layer in range(layers)]
    chosen = {side: [2] * layers for side in SIDES}
    for _, side, layer in sorted(places, reverse=True):
        if more[side] <= spare:
            chosen[side][layer] = 4
            spare -= more[side]
    return chosen
