"""KVarN, variance-normalized quantization of tiles of 128 tokens (Müller et al., arXiv 2606.03458): a reference.

A tile of a head is rotated by a Hadamard matrix along its channels, then scaled per channel and per token by turns until
the standard deviations along both axes agree, then rounded to nearest between minimum and maximum: keys per channel over
the tile's tokens, values per token over the channels. The first tile and the unfinished one stay in full precision.

Written from the paper's summary and from the constants that the authors' own repository (huawei-csl/KVarN) shows in the
test of its kernel: 16 rounds, standard deviations held within 1e-3 and 1e3, logarithms of scales within -0.3 and 10, the
scales of the most even round kept. Not checked: the paper's text, whether its experiments keep the first tile as the
released kernels do, and any clipping of the range other than by the minimum and maximum.
"""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from modules.codecs.rotation import rotate
from modules.evaluation.rounded import Scheme, head_dim_of, rounded_cache

TILE = 128
ROUNDS = 16
METADATA_BITS = 16
STD_RANGE = (1e-3, 1e3)
LOG_SCALE_RANGE = (-0.3, 10.0)


def spread(tile: torch.Tensor) -> torch.Tensor:
    """How uneven the standard deviations of `[..., R, C]` are: largest by smallest, of columns and of rows, added, `[...]`."""
    parts = (tile.std(dim) for dim in (-2, -1))
    return sum(part.amax(-1) / part.amin(-1).clamp_min(1e-8) for part in parts)


def balance(tile: torch.Tensor, rounds: int = ROUNDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the columns `[..., 1, C]` and the rows `[..., R, 1]` of a tile `[..., R, C]`, float32, that even out its
    standard deviations: Sinkhorn's alternation on logarithms, the most even round kept."""
    tile = tile.float()
    logs = [torch.zeros_like(tile[..., :1, :]), torch.zeros_like(tile[..., :1])]
    current, best, least = tile, [log.exp() for log in logs], spread(tile)
    for _ in range(rounds):
        for axis, dim in enumerate((-2, -1)):
            deviation = current.std(dim, keepdim=True).clamp(*STD_RANGE)
            logs[axis] = (logs[axis] + deviation.log()).clamp(*LOG_SCALE_RANGE)
            current = tile / logs[0].exp() / logs[1].exp()
        now = spread(current)
        better = (now <= least)[..., None, None]
        best = [torch.where(better, log.exp(), old) for log, old in zip(logs, best)]
        least = torch.minimum(now, least)
    return best[0], best[1]


def round_rows(tile: torch.Tensor, bits: int) -> torch.Tensor:
    """What the codes of a tile `[..., R, C]` give back, float32: balanced, then each row rounded between its minimum and
    maximum; scales and minimum have 16 bits."""
    columns, rows = balance(tile)
    even = tile.float() / columns / rows
    low, high = even.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-10)
    codes = ((even - low) / step).round().clamp(0, 2**bits - 1)
    scale, zero, column = ((rows * step).half(), (rows * low).half(), columns.half())
    return (codes * scale.float() + zero.float()) * column.float()


def round_keys(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Tiles of keys `[..., TILE, D]` as their codes give them back: a scale and a minimum a channel, a scale a token."""
    return rotate(round_rows(rotate(states.float()).transpose(-2, -1), bits).transpose(-2, -1)).to(states.dtype)


def round_values(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Tiles of values `[..., TILE, D]` as their codes give them back: a scale and a minimum a token, a scale a channel."""
    return rotate(round_rows(rotate(states.float()), bits)).to(states.dtype)


def stored_bits(head_dim: int, k_bits: int, v_bits: int) -> float:
    """Bits an element of K and V on average, with scales and minima of 16 bits: 2.375 for 2 and 2 with 128 channels."""
    keys = k_bits + METADATA_BITS * (2 * head_dim + TILE) / (head_dim * TILE)
    values = v_bits + METADATA_BITS * (head_dim + 2 * TILE) / (head_dim * TILE)
    return (keys + values) / 2


def kvarn_cache(config: PreTrainedConfig, k_bits: int, v_bits: int) -> Cache:
    """An empty cache of KVarN's states for a model.

    Raises:
        ValueError: for a model with layers that are not full attention.
    """
    key, value = functools.partial(round_keys, bits=k_bits), functools.partial(round_values, bits=v_bits)
    bits = stored_bits(head_dim_of(config), k_bits, v_bits)
    return rounded_cache(config, Scheme(key, value, bits, group=TILE, sinks=TILE))
