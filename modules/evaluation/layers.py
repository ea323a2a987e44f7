"""What storing the keys or the values of one layer in each of a few ways costs a model's predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from modules.codecs.grouped import choose_order
from modules.codecs.kivi import codecs_of
from modules.codecs.rotation import rotate
from modules.evaluation.curvature import LayerStates
from modules.options import KIVIOptions

TOKENS = 1024
FIRST = 128  # tokens by whose keys wide channels are chosen; queries of as many more count
KEYS: tuple[dict[str, Any], ...] = (
    {"k_bits": 2, "wide_channels": 0.0},
    {"k_bits": 2, "wide_channels": 0.0625},
    {"k_bits": 2, "wide_channels": 0.125},
    {"k_bits": 2, "wide_channels": 0.25},
    {"k_bits": 2, "wide_channels": 0.5},
    {"k_bits": 4, "wide_channels": 0.0},
    {"k_bits": 4, "wide_channels": 0.25},
    {"k_bits": 8, "wide_channels": 0.0},
)
VALUES: tuple[dict[str, Any], ...] = ({"v_bits": 2}, {"v_bits": 4}, {"v_bits": 8})
Progress = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class SideCosts:
    """Of the keys or the values of all layers.

    Attributes:
        choices: options of a layer, by name, the one of fewest bits first.
        bits: that an element then takes, with its share of scale and minimum, an entry a choice.
        kl: from full precision (nats) with this side of one layer stored so and all else in full precision, an entry a choice
            for every layer.
    """

    choices: tuple[dict[str, Any], ...]
    bits: tuple[float, ...]
    kl: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """Of all layers; `options` are those that all of them have."""

    options: dict[str, Any]
    keys: SideCosts
    values: SideCosts


def measure_layers(
    states: Sequence[LayerStates], options: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> LayerCosts:
    """What each of `KEYS` and `VALUES` costs in each layer.

    Args:
        states: of the layers, from `record_layers`.
        options: KIVI options that all layers have, by name.
        progress: called after each layer.

    Raises:
        ValueError: for options that are not allowed or do not fit a head, and a text with nothing to store.
    """
    shared = dict(options or {})
    tokens, head_dim = states[0].keys.shape[1:]
    sides = [[KIVIOptions.from_config(None, {**shared, **choice}) for choice in of_side] for of_side in (KEYS, VALUES)]
    for chosen in (*sides[0], *sides[1]):
        chosen.check_head_dim(head_dim)
    least = sides[0][0].sink_length + max(_unit(sides[0][0]), sides[0][0].residual_length + 1)
    if tokens <= least:
        raise ValueError(f"{tokens} tokens leave nothing to store; give more than {least}.")
    kl: tuple[list, list] = ([], [])
    with torch.inference_mode():
        for layer in states:
            attention = _Attention(layer, sides[0][0])
            kl[0].append(tuple(layer.cost(attention.miss_of_keys(chosen)) for chosen in sides[0]))
            kl[1].append(tuple(layer.cost(attention.miss_of_values(chosen)) for chosen in sides[1]))
            if progress is not None:
                progress()
    bits = [
        tuple(one.stored_bits(*one.bits_of_layer(0, 1), head_dim)[side] for one in sides[side]) for side in range(2)
    ]
    return LayerCosts(shared, SideCosts(KEYS, bits[0], tuple(kl[0])), SideCosts(VALUES, bits[1], tuple(kl[1])))


def _unit(options: KIVIOptions) -> int:
    """Tokens that groups, and those by which channels are chosen, divide."""
    return math.lcm(FIRST, options.group_size)


class _Attention:
    """One layer's attention, with tokens stored behind the sinks where they are far from the query."""

    def __init__(self, states: LayerStates, options: KIVIOptions) -> None:
        tokens, sinks = states.keys.shape[1], options.sink_length
        whole = (tokens - sinks) // _unit(options) * _unit(options) + sinks
        position = torch.arange(tokens, device=states.keys.device)
        distance = position[:, None] - position
        self.states, self.packed = states, slice(sinks, whole)
        self.far = (distance >= options.residual_length) & (position >= sinks) & (position < whole)
        scores = states.queries @ states.keys.transpose(1, 2).unsqueeze(1)
        self.scores = scores.masked_fill(distance < 0, -torch.inf)
        self.weights = self.scores.softmax(-1)

    def miss_of_keys(self, options: KIVIOptions) -> torch.Tensor:
        """The error `[H, g, T, D]` of what is attended with keys stored by the options of a layer."""
        states = self.states
        key, _ = codecs_of(options, options.bits_of_layer(0, 1), states.keys.shape[2], states.rotary)
        exact, order = states.keys[None, :, self.packed], None
        if key.wide:
            energy = states.queries[:, :, self.packed][:, :, : 2 * FIRST].square().sum((1, 2))
            order = choose_order(exact[:, :, :FIRST], key.wide, key.group_size, energy[None], key.rotary)
        keys = states.keys.clone()
        keys[:, self.packed] = key.decode(key.encode(exact, order), order, torch.float32)[0]
        scores = torch.where(self.far, states.queries @ keys.transpose(1, 2).unsqueeze(1), self.scores)
        return (scores.softmax(-1) - self.weights) @ states.values.unsqueeze(1)

    def miss_of_values(self, options: KIVIOptions) -> torch.Tensor:
        """The error `[H, g, T, D]` of what is attended with values stored by the options of a layer."""
        states, bits = self.states, options.bits_of_layer(0, 1)
        _, value = codecs_of(options, bits, states.values.shape[2])
        exact = states.values[None, :, self.packed]
        turned = rotate(exact) if options.rotates_values(bits[1]) else exact
        found = value.decode(value.encode(turned, None), None, torch.float32)
        errors = torch.zeros_like(states.values)
        errors[:, self.packed] = ((rotate(found) if options.rotates_values(bits[1]) else found) - exact)[0]
        return (self.weights * self.far) @ errors.unsqueeze(1)
