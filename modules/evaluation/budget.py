"""Options a layer that cost least within so many stored bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from modules.evaluation.layers import LayerCosts, SideCosts

BITS = 3.0
BUDGETS = (BITS, 2.4, 4.5)  # of the report
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Choice:
    """Of all layers.

    Attributes:
        options: of the cache, those by layer as lists.
        bits: that an element takes on average, with its share of scale and minimum.
        kl: the costs of all layers together (nats).
        keys, values: the cost of each layer's.
    """

    options: dict[str, Any]
    bits: float
    kl: float
    keys: tuple[float, ...]
    values: tuple[float, ...]


def choose(costs: Iterable[LayerCosts], bits: float = BITS) -> Choice:
    """Of each of `costs` the choice of every layer's keys and values by which they cost least together, and the best of these.

    The step that saves most a stored bit is taken again and again, while there are bits to spend.

    Args:
        costs: of the same layers with other options, such as groups of another size.
        bits: a stored element may take on average.

    Raises:
        ValueError: for fewer bits than any options take.
    """
    costs = list(costs)
    found = [choice for each in costs if (choice := _within(each, bits)) is not None]
    if not found:
        least = min((each.keys.bits[0] + each.values.bits[0]) / 2 for each in costs)
        raise ValueError(f"bits must be at least {least:.4g} with these options; got {bits}.")
    return min(found, key=lambda choice: choice.kl)


def _within(costs: LayerCosts, bits: float) -> Choice | None:
    """The choice within `bits`; None where there is none."""
    sides, layers = (costs.keys, costs.values), len(costs.keys.kl)
    chosen = [[0] * layers for _ in sides]
    spare = layers * (2 * bits - sum(side.bits[0] for side in sides))
    if spare < -_ROUNDING:
        return None
    while steps := [
        (gain, number, layer, choice, more)
        for number, side in enumerate(sides)
        for layer, now in enumerate(chosen[number])
        for gain, choice, more in _steps(side, layer, now)
        if more <= spare + _ROUNDING
    ]:
        _, number, layer, choice, more = max(steps)
        chosen[number][layer] = choice
        spare -= more
    keys, values = (tuple(side.kl[layer][at] for layer, at in enumerate(own)) for side, own in zip(sides, chosen))
    return Choice(
        options={**costs.options, **_lists(costs.keys, chosen[0]), **_lists(costs.values, chosen[1])},
        bits=bits - spare / (2 * layers),
        kl=sum(keys) + sum(values),
        keys=keys,
        values=values,
    )


def _steps(side: SideCosts, layer: int, now: int) -> Iterator[tuple[float, int, float]]:
    """What each choice of more bits saves a bit, its number and the bits."""
    kl = side.kl[layer]
    for choice in range(now + 1, len(side.choices)):
        more = side.bits[choice] - side.bits[now]
        if kl[choice] < kl[now] and more > 0:
            yield (kl[now] - kl[choice]) / more, choice, more


def _lists(side: SideCosts, chosen: list[int]) -> dict[str, list]:
    """The options of a side, an entry a layer."""
    return {name: [side.choices[number][name] for number in chosen] for name in side.choices[0]}
