"""What was tried for keys and values, as functions of states: fake quantization of one layer of a sequence.

Keys `[H, T, D]` meet queries `[H, N, D]`, which say which channels matter; the wide channels are chosen by the first of both,
as a cache would. Every variant gives the states back in float32, and says what an element would take.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from modules.codecs.grouped import CLIPPED, LSQ_ROUNDS, LSQ_START, token_shares
from modules.codecs.metadata import EIGHT_BIT_KEYS, EIGHT_BIT_VALUES, FLOAT16, Metadata, scale_codes, scales_of
from modules.codecs.rotation import hadamard

FIRST = 128  # tokens by which channels are chosen
_LLOYD_MAX = (-1.5104, -0.4528, 0.4528, 1.5104)  # of a normal distribution (Max, IRE Trans. Inf. Theory 6, 1960)
_TRELLIS_BITS = 8  # of a window of codes, by which a level is looked up
_FEEDBACK_DAMPING = 0.01  # of the mean energy, added to each channel's

Fake = Callable[["States"], torch.Tensor]
Choose = Callable[["States", int], torch.Tensor]
Store = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class States:
    """Of one layer: queries `[H, g, T, D]` of the `g` query heads of each KV head, times the scaling of scores, keys and values
    `[H, T, D]`, and the output projection `[H, g, D, hidden_size]`."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    projection: torch.Tensor

    def first_queries(self) -> torch.Tensor:
        """Those of the tokens by which channels are chosen, and of as many more."""
        return self.queries[:, :, : 2 * FIRST].flatten(1, 2)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to store a side: `fake` gives its states, `bits` what an element takes; `correction` is of `measure`."""

    name: str
    side: str
    bits: float
    fake: Fake
    correction: float = 0.0


def _fit(
    x: torch.Tensor, levels: torch.Tensor, shares: torch.Tensor, store: Store
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of keys `[H, n, G, D]` as `modules.codecs.grouped` finds them, with `levels` that may differ by channel."""

    def mean(of: torch.Tensor) -> torch.Tensor:
        return (of * shares).sum(2, keepdim=True)

    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    centre, half = (low + high) / 2, (high - low) / 2
    best_scale, best_minimum = store(2 * half / levels, low)
    best_error = mean((_rounded(x, best_scale, best_minimum, levels) - x).square())
    scale, minimum = store(2 * half * LSQ_START / levels, centre - half * LSQ_START)
    middle = mean(x)
    for _ in range(LSQ_ROUNDS):
        codes = _codes(x, scale, minimum, levels)
        centred = codes - mean(codes)
        scale = mean(centred * (x - middle)) / mean(centred.square()).clamp_min(1e-9)
        scale, minimum = store(scale, middle - scale * mean(codes))
        error = mean((_rounded(x, scale, minimum, levels) - x).square())
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_minimum = torch.where(error < best_error, minimum, best_minimum)
        best_error = torch.minimum(error, best_error)
    return best_scale, best_minimum


def _codes(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.minimum(((x - minimum) / safe).round().clamp(min=0), levels)


def _rounded(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return _codes(x, scale, minimum, levels) * scale + minimum


# Keys


def _costs(states: States, group: int, paired: bool) -> torch.Tensor:
    """What quantizing each channel costs, `[H, D]`, see `modules.codecs.grouped.choose_order`."""
    groups = states.keys[:, :FIRST].unflatten(1, (-1, min(group, FIRST)))
    cost = (groups.amax(2) - groups.amin(2)).square().mean(1) * states.first_queries().square().mean(1)
    half = cost.shape[1] // 2
    return (cost[:, :half] + cost[:, half:]).repeat(1, 2) if paired else cost


def wide(share: float, paired: bool, bits: tuple[int, int] = (2, 4)) -> Choose:
    """Bits of each channel `[H, D]`: the second of `bits` for those that cost most."""

    def choose(states: States, group: int) -> torch.Tensor:
        cost = _costs(states, group, paired)
        count = round(share * cost.shape[1])
        chosen = torch.full_like(cost, bits[0])
        return chosen.scatter(1, cost.topk(count, 1).indices, float(bits[1]))

    return choose


def filled(average: float, allowed: tuple[int, ...]) -> Choose:
    """Bits of each channel so that their mean is `average` and the error least: another step goes where it saves most."""

    def choose(states: States, group: int) -> torch.Tensor:
        cost = _costs(states, group, paired=True)
        return torch.stack([_fill(row.tolist(), average, allowed) for row in cost])

    return choose


def _fill(costs: list[float], average: float, allowed: tuple[int, ...]) -> torch.Tensor:
    bits, spare = [0] * len(costs), (average - allowed[0]) * len(costs)

    def gain(channel: int) -> float:
        now, then = allowed[bits[channel]], allowed[bits[channel] + 1]
        return costs[channel] * ((2**now - 1) ** -2 - (2**then - 1) ** -2) / (then - now)

    while open_ := [
        channel
        for channel, step in enumerate(bits)
        if step + 1 < len(allowed) and allowed[step + 1] - allowed[step] <= spare + 1e-9
    ]:
        best = max(open_, key=gain)
        spare -= allowed[bits[best] + 1] - allowed[bits[best]]
        bits[best] += 1
    return torch.tensor([float(allowed[step]) for step in bits])


def keys(
    choose: Choose,
    group: int = 32,
    metadata: Metadata = FLOAT16,
    feedback: bool = False,
    token_scales: bool = False,
    apart: bool = True,
) -> Fake:
    """Keys by channel; with `feedback` a channel's error moves what later ones are rounded to (LDLQ, arXiv 2307.13304), with
    `token_scales` tokens are brought to one size first (KVarN, arXiv 2606.03458), with `apart` the fit goes by `token_shares`."""

    def fake(states: States) -> torch.Tensor:
        bits = choose(states, group)
        groups = states.keys.unflatten(1, (-1, group))
        middle, sizes = 0.0, torch.ones(1)
        if token_scales:
            middle = groups.mean(2, keepdim=True)
            sizes = _token_sizes(groups - middle)
        x, levels = (groups - middle) / sizes, (2**bits - 1)[:, None, None]

        def store(scale: torch.Tensor, minimum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if metadata.exact:
                return scale.half().float(), minimum.half().float()
            rounded = scales_of(scale_codes(scale))
            return rounded, (minimum + (scale - rounded) * levels / 2).half().float()

        shares = torch.full((group, 1), 1 / group)
        if apart:
            shares = token_shares(x * (levels == levels.amax(-1, keepdim=True)))
        scale, minimum = _fit(x, levels, shares, store)
        if feedback:
            energy = states.first_queries()
            found = _fed_back(x, scale, minimum, levels, energy.transpose(1, 2) @ energy)
        else:
            found = _rounded(x, scale, minimum, levels)
        return (found * sizes + middle).flatten(1, 2)

    return fake


def _token_sizes(groups: torch.Tensor) -> torch.Tensor:
    """Sizes of the tokens of groups `[H, n, G, D]` beside those of the channels, found by turns (Sinkhorn)."""
    sizes = torch.ones(*groups.shape[:3], 1)
    for _ in range(4):
        channels = (groups / sizes).square().mean(2, keepdim=True).sqrt().clamp_min(1e-6)
        sizes = (groups / channels).square().mean(3, keepdim=True).sqrt().clamp_min(1e-3)
    return scales_of(scale_codes(sizes))


def _fed_back(
    x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: torch.Tensor, energy: torch.Tensor
) -> torch.Tensor:
    """Rounding of `x` `[H, n, G, D]` so that `error energy errorᵀ` is small, `energy` `[H, D, D]`."""
    mean = energy.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = energy + _FEEDBACK_DAMPING * mean * torch.eye(energy.shape[1])
    lower = torch.linalg.cholesky(damped.flip(1, 2))
    upper = (lower / lower.diagonal(dim1=1, dim2=2).unsqueeze(1)).flip(1, 2)
    error, found = torch.zeros_like(x), torch.empty_like(x)
    scale, minimum, levels = (t.expand_as(x) for t in (scale, minimum, levels))
    for channel in range(x.shape[3]):
        at = (..., slice(channel, channel + 1))
        owed = torch.einsum("hntj,hj->hnt", error[..., :channel], upper[:, :channel, channel]).unsqueeze(3)
        found[at] = _rounded(x[at] + owed, scale[at], minimum[at], levels[at])
        error[at] = x[at] - found[at]
    return found


# Values, rotated


def values(group: int = 64, clip: float = CLIPPED, metadata: Metadata = FLOAT16, bits: int = 2, how: str = "") -> Fake:
    """Values by token. `how`: "symmetric" has no minimum, "centred" takes the mean of the first tokens off, "weighted" feeds
    errors back by the output projection, "shaped" hands a third of a token's error to the next."""

    def fake(states: States) -> torch.Tensor:
        rotation, levels = hadamard(states.values.shape[2]), torch.tensor(2.0**bits - 1)
        x = states.values @ rotation
        middle = x[:, :FIRST].mean(1, keepdim=True) if how == "centred" else torch.zeros(1)
        x = x - middle
        if how == "shaped":
            return _shaped(x, group, clip, levels) @ rotation
        groups = x.unflatten(2, (-1, group))
        scale, minimum = _value_range(groups, clip, levels, metadata, bits, how == "symmetric")
        if how == "weighted":
            projection = rotation @ states.projection
            energy = torch.einsum("hgdx,hgex->hde", projection, projection)
            scale, minimum = (t.expand_as(groups).flatten(2).unsqueeze(1) for t in (scale, minimum))
            return _fed_back(x.unsqueeze(1), scale, minimum, levels, energy)[:, 0] @ rotation
        return (_rounded(groups, scale, minimum, levels).flatten(2) + middle) @ rotation

    return fake


def _value_range(
    groups: torch.Tensor, clip: float, levels: torch.Tensor, metadata: Metadata, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if symmetric:
        scale = scales_of(scale_codes(groups.abs().amax(-1, keepdim=True) * 2 * clip / levels))
        return scale, -scale * levels / 2
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    margin = (high - low) * ((1 - clip) / 2)
    return metadata.stored((high - low - 2 * margin) / levels, low + margin, bits)


def _shaped(x: torch.Tensor, group: int, clip: float, levels: torch.Tensor) -> torch.Tensor:
    found, owed = torch.empty_like(x), torch.zeros_like(x[:, 0])
    for token in range(x.shape[1]):
        wanted = x[:, token] + owed / 3
        groups = wanted.unflatten(1, (-1, group))
        found[:, token] = _rounded(groups, *_value_range(groups, clip, levels, FLOAT16, 2, False), levels).flatten(1)
        owed = wanted - found[:, token]
    return found


def normalized_values(levels_of: Callable[[torch.Tensor], torch.Tensor], metadata_bits: int = 8) -> Fake:
    """Values with one scale a token, so that the levels are those of a normal distribution; the scale lies between the one of
    least error and the one that keeps a value's length, as sums of many values want it."""

    def fake(states: States) -> torch.Tensor:
        rotation = hadamard(states.values.shape[2])
        x = states.values @ rotation
        levels = levels_of(x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9))
        product, square = (x * levels).sum(-1, keepdim=True), levels.square().sum(-1, keepdim=True)
        scale = (product / square + x.square().sum(-1, keepdim=True) / product) / 2
        return levels * (scales_of(scale_codes(scale)) if metadata_bits == 8 else scale.half().float()) @ rotation

    return fake


def lloyd_max(x: torch.Tensor) -> torch.Tensor:
    """The nearest of four levels for a normal distribution."""
    levels = torch.tensor(_LLOYD_MAX)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def trellis(x: torch.Tensor) -> torch.Tensor:
    """Trellis-coded levels of `x` `[..., D]`, 2 bits each (QTIP, arXiv 2406.11235): a level is looked up by the newest bits of
    all codes so far, and the Viterbi algorithm finds the codes."""
    table = _trellis_table()
    count, states = table.numel(), table.numel() // 4
    rows = x.reshape(-1, x.shape[-1])
    cost = torch.full((len(rows), states), torch.inf)
    cost[:, 0] = 0
    came = []
    for channel in range(rows.shape[1]):
        error = (rows[:, channel, None] - table).square() + cost.repeat_interleave(4, 1)
        cost, before = error.view(-1, 4, count // 4).min(1)  # windows that end alike lead to one state
        came.append(before)
    state, found = cost.argmin(1), torch.empty_like(rows)
    for channel in reversed(range(rows.shape[1])):
        window = came[channel].gather(1, state[:, None])[:, 0] * states + state
        found[:, channel] = table[window]
        state = window // 4
    return found.view_as(x)


@functools.cache
def _trellis_table() -> torch.Tensor:
    count = 1 << _TRELLIS_BITS
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()
    return quantiles[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


# The lists


def _keys(name: str, mean_bits: float, fake: Fake, numbers: float = 32 / 32, correction: float = 0.0) -> Variant:
    """Keys with codes of `mean_bits` and `numbers` bits an element for the rest."""
    return Variant(name, "keys", mean_bits + numbers, fake, correction)


def key_variants(head_dim: int) -> list[Variant]:
    """What was tried for keys; the first is what the others are compared with."""
    small, alone, pairs, half = EIGHT_BIT_KEYS, wide(0.25, False), wide(0.25, True), wide(0.5, True)
    quarter = wide(0.25, True, (4, 6))
    return [
        _keys("by channel, a quarter wide", 2.5, keys(alone)),
        _keys("by range and query, no wide ones", 2, keys(wide(0.0, False))),
        _keys("wide ones in rotary pairs", 2.5, keys(pairs)),
        _keys("pairs, scales of 8 bits", 2.5, keys(pairs, metadata=small), 24 / 32),
        _keys("pairs, scales of 8 bits, 3/8 wide", 2.75, keys(wide(0.375, True), metadata=small), 24 / 32),
        _keys("pairs, scales of 8 bits, half wide (the default)", 3, keys(half, metadata=small), 24 / 32),
        _keys("the default, fitted with all tokens alike", 3, keys(half, metadata=small, apart=False), 24 / 32),
        _keys("pairs, groups of 16", 2.5, keys(pairs, 16), 32 / 16),
        _keys("pairs, groups of 64, scales of 8 bits, a quarter wide", 2.5, keys(pairs, 64, small), 24 / 64),
        _keys("pairs, groups of 64, scales of 8 bits, half wide", 3, keys(half, 64, small), 24 / 64),
        _keys("an eighth with 6 bits", 2.5, keys(wide(0.125, False, (2, 6)))),
        _keys("1 to 6 bits, by cost", 2.5, keys(filled(2.5, (1, 2, 3, 4, 5, 6)))),
        _keys("2, 4 or 6 bits, by cost", 2.5, keys(filled(2.5, (2, 4, 6)))),
        _keys("a scale for each token too", 2.5, keys(alone, token_scales=True), 32 / 32 + 8 / head_dim),
        _keys("errors fed back by the queries", 2.5, keys(alone, feedback=True)),
        _keys("softmax corrected for the noise", 2.5, keys(alone), correction=1.0),
        _keys("4 bits", 4, keys(wide(0.0, False, (4, 4)))),
        _keys(
            "4 bits, a quarter with 6, scales of 8 bits (the default at 4 bits)",
            4.5,
            keys(quarter, metadata=small),
            24 / 32,
        ),
        _keys("2 to 8 bits, by cost, 4 on average", 4, keys(filled(4, (2, 3, 4, 5, 6, 7, 8)))),
    ]


def value_variants(head_dim: int) -> list[Variant]:
    """What was tried for values; the first is what the others are compared with."""
    small, group = EIGHT_BIT_VALUES, min(64, head_dim)
    return [
        Variant(f"rotated, groups of {group}", "values", 2 + 32 / group, values(group)),
        Variant("metadata of 8 bits", "values", 2 + 16 / group, values(group, metadata=small)),
        Variant("metadata of 8 bits, groups of 32", "values", 2 + 16 / 32, values(32, metadata=small)),
        Variant("metadata of 8 bits, range cut by 20 %", "values", 2 + 16 / group, values(group, 0.8, small)),
        Variant("a scale of 8 bits and no minimum", "values", 2 + 8 / group, values(group, 0.8, how="symmetric")),
        Variant("centred by the mean of the first tokens", "values", 2 + 32 / group, values(group, how="centred")),
        Variant("errors fed back by the output projection", "values", 2 + 32 / group, values(group, how="weighted")),
        Variant("a third of the error to the next token", "values", 2 + 32 / group, values(group, how="shaped")),
        Variant("levels of Lloyd and Max", "values", 2 + 8 / head_dim, normalized_values(lloyd_max)),
        Variant("trellis-coded levels", "values", 2 + 8 / head_dim, normalized_values(trellis)),
    ]
