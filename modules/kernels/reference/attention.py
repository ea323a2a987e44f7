"""Attention of new tokens over one packed layer in plain torch: sinks, codes, window and the new tokens under one softmax.

It runs on any device and is what the other backends are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from modules.codecs.grouped import LOW_BITS, low_codes, place_channels
from modules.codecs.metadata import numbers_of
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step

_PLANE_ELEMENTS = 1 << 19  # floats of one plane of codes at a time: 2 MiB stay in a core's cache
_SCORE_ELEMENTS = 1 << 20  # floats of scores held at a time
_NEW_SCORES = 1 << 24  # floats of scores of new tokens on each other held at a time
_SHARE_OF_CACHE = 8  # a plane takes at most this share of the bytes the layer would take unpacked
_FLOAT_BYTES = 4
_SMALL_BLOCK = 64  # tokens times planes that are never worth cutting


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PackedLayer,
    scaling: float,
    step: Step,
) -> torch.Tensor:
    """See `modules.kernels.backend.Backend.attend`."""
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    out = query.new_zeros(batch, length, heads, head_dim)
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    for sequences, count in layer.ledger.equally_long(step.lengths):
        if not count:
            continue
        queries, keys, values = (t[sequences, ..., :count, :] for t in (grouped, key, value))
        for first in range(0, count, size := _queries_at_once(queries)):
            stop = min(first + size, count)
            attended = _attend_rows(
                queries[..., first:stop, :], keys[:, :, :stop], values[:, :, :stop], layer, sequences, scaling
            )
            out[sequences, first:stop] = attended.flatten(1, 2).transpose(1, 2).to(query.dtype)
    return out


def _queries_at_once(queries: torch.Tensor) -> int:
    """New tokens of `[b, Hkv, g, q, D]` whose scores on all new ones stay within bounds."""
    return max(1, _NEW_SCORES // queries.shape[:4].numel())


def _attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer, sequences: slice, scaling: float
) -> torch.Tensor:
    """Equally long sequences: query `[b, Hkv, g, q, D]`, the last of the new tokens, to `[b, Hkv, g, q, D]`, float32."""
    batch, kv_heads, group, length, head_dim = query.shape
    folded = (query.float() * scaling).flatten(2, 3)  # the queries of one KV head share each load
    softmax = _OnlineSoftmax()
    sequence = sequences.start or 0

    keys, values = (
        torch.cat([part.float() for part in (*layer.full_precision(side, sequences), new)], dim=2)
        for side, new in ((layer.key, key), (layer.value, value))
    )
    scores = folded @ keys.transpose(-1, -2)
    if length > 1:
        scores.masked_fill_(_future(length, group, keys.shape[2], query.device), -torch.inf)
    softmax.add(softmax.weights(scores) @ values)

    for start, stop in _blocks(layer, sequence, batch * kv_heads, group * length, head_dim):
        weights = softmax.weights(_scores(folded, layer.key, sequences, start, stop))
        softmax.add(_weighted_sum(weights, layer.value, sequences, start, stop))
    return softmax.result().unflatten(2, (group, length))


def _future(length: int, group: int, keys: int, device: torch.device) -> torch.Tensor:
    """True where a new token would look at a later one: `[group * length, keys]`, the last `length` keys being new."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)
    return torch.nn.functional.pad(hidden, (keys - length, 0)).repeat(group, 1)


def _blocks(layer: PackedLayer, sequence: int, heads: int, queries: int, head_dim: int) -> list[tuple[int, int]]:
    """Ranges of packed tokens for which a plane of codes, as floats, and the scores stay within bounds."""
    packed, planes = layer.packed[sequence], min(layer.key.planes, layer.value.planes)
    dense_bytes = 2 * packed * layer.key.window.element_size()  # keys and values of one channel, unpacked
    tokens = min(
        _PLANE_ELEMENTS * planes // (heads * head_dim),
        _SCORE_ELEMENTS // (heads * queries),
        max(dense_bytes // _SHARE_OF_CACHE // _FLOAT_BYTES, _SMALL_BLOCK) * planes,
    )
    step = max(layer.group_size, tokens // layer.group_size * layer.group_size)
    return [(start, min(start + step, packed)) for start in range(0, packed, step)]


def _planes(codes: torch.Tensor, bits: int) -> Iterator[torch.Tensor]:
    """The planes of packed codes, one at a time, float32 `[b, H, T, D*bits/8]`; each may be written to."""
    if bits == 8:
        yield codes.float()
        return
    mask = (1 << bits) - 1
    by_word = codes.shape[-1] % 4 == 0
    if by_word:  # four bytes at a time; the mask drops what a shift brings in from the next byte or from the sign
        codes, mask = codes.view(torch.int32), mask * 0x01010101
    for shift in range(0, 8, bits):
        plane = (codes >> shift if shift else codes) & mask
        yield (plane.view(torch.uint8) if by_word else plane).float()


def _scores(query: torch.Tensor, side: PackedSide, sequences: slice, start: int, stop: int) -> torch.Tensor:
    """`query` `[b, H, n, D]` on packed keys: `q·k = q·(scale∘code) + q·minimum`, float32 `[b, H, n, T]`."""
    stored = side.stored(sequences, start, stop)
    if stored.scale is None:
        return query @ stored.codes.float().transpose(-1, -2)
    if side.order is not None:
        query = place_channels(query, side.order[sequences])
    scale, minimum = numbers_of(stored, side.bits)
    scores = (query @ minimum.transpose(-1, -2)).repeat_interleave(side.group_size, dim=-1)
    width = stored.codes.shape[-1]
    for number, plane in enumerate(_planes(stored.codes, side.bits)):
        channels = slice(number * width, (number + 1) * width)
        _add_scores(scores, query[..., channels], plane, scale[..., channels])
    if stored.extra is not None:
        step = max(4, width // 4 * 4)  # channels: as much as a plane
        for first in range(0, side.wide, step):
            channels = slice(first, min(first + step, side.wide))
            low = low_codes(stored.extra[..., first // 4 : channels.stop // 4])
            _add_scores(scores, query[..., channels], low, scale[..., channels] / (1 << LOW_BITS))
    return scores


def _add_scores(scores: torch.Tensor, query: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Add `query` `[b, H, n, C]` on `codes` `[b, H, T, C]`, which become keys, with a scale for every group of them."""
    codes.unflatten(2, (scale.shape[2], -1)).mul_(scale.unsqueeze(3))
    scores.flatten(0, 1).baddbmm_(query.flatten(0, 1), codes.flatten(0, 1).transpose(1, 2))


def _weighted_sum(weights: torch.Tensor, side: PackedSide, sequences: slice, start: int, stop: int) -> torch.Tensor:
    """`weights` `[b, H, n, T]` of packed values, float32 `[b, H, n, D]`: `Σ p v = Σ (p·scale) (code − m) + Σ p·middle`.

    `m` is half the largest code and `middle` the value that goes with it: about zero, both sums stay as small as their
    total, which is often much smaller than the values, and float32 stays exact.
    """
    stored = side.stored(sequences, start, stop)
    if stored.scale is None:
        return weights @ stored.codes.float()
    width, parts, scaled_by, scaled = stored.codes.shape[-1], [], -1, weights
    segment = math.gcd(width, side.group_size)  # channels of one plane and one group
    half = ((1 << side.bits) - 1) / 2
    scale, minimum = numbers_of(stored, side.bits)
    for number, plane in enumerate(_planes(stored.codes, side.bits)):
        plane.sub_(half)
        for first in range(0, width, segment):
            group = (number * width + first) // side.group_size
            if group != scaled_by:
                scaled, scaled_by = weights * scale[..., group].unsqueeze(-2), group
            parts.append(scaled @ plane[..., first : first + segment])
    middle = torch.add(minimum, scale, alpha=half)
    offsets = (weights @ middle).unsqueeze(-1)
    return torch.cat(parts, dim=-1).unflatten(-1, (-1, side.group_size)).add_(offsets).flatten(-2)


class _OnlineSoftmax:
    """softmax(scores) values over blocks of keys, with a running maximum (Milakov & Gimelshein, arXiv 1805.02867).

    Every query must see a key of the first block.
    """

    maximum: torch.Tensor  # these three from the first block on
    total: torch.Tensor
    sum: torch.Tensor

    def __init__(self) -> None:
        self.begun = False

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Unnormalized weights `[b, H, n, T]` of the next block, in place of its scores."""
        highest = scores.amax(-1, keepdim=True)
        if not self.begun:
            self.maximum = highest
            weights = scores.sub_(highest).exp_()
            self.total = weights.sum(-1, keepdim=True)
            return weights
        maximum = torch.maximum(self.maximum, highest)
        weights = scores.sub_(maximum).exp_()
        decay = self.maximum.sub_(maximum).exp_()
        self.total.mul_(decay).add_(weights.sum(-1, keepdim=True))
        self.sum.mul_(decay)
        self.maximum = maximum
        return weights

    def add(self, weighted_values: torch.Tensor) -> None:
        """The values `[b, H, n, D]` of that block, summed with those weights."""
        self.sum = self.sum.add_(weighted_values) if self.begun else weighted_values
        self.begun = True

    def result(self) -> torch.Tensor:
        return self.sum / self.total
