"""Caches of rounded states: what another method's codes would give back, held in full precision.

They show what a scheme costs and save no memory. Tokens are rounded in whole groups, after the forward that brought
them, as transformers' `QuantizedCache` does it: within their own chunk they are seen as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

Round = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a method rounds keys and values.

    Attributes:
        key, value: functions of groups of states `[batch, heads, groups, group, head_dim]` that return what their codes
            give back, the same shape and dtype.
        stored_bits: of an element of K and V on average, with its share of scales and the like.
        group: tokens that are rounded at once; those of an unfinished group stay in full precision.
        sinks: first tokens that are never rounded.
    """

    key: Round
    value: Round
    stored_bits: float
    group: int = 1
    sinks: int = 0


class RoundedLayer(DynamicLayer):
    """One layer's states `[batch, heads, tokens, head_dim]`, whole groups of them rounded by a scheme."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.rounded = scheme.sinks  # tokens up to here are as they will stay

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new states; the whole states, the new ones as given."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        count = max(0, keys.shape[-2] - self.rounded) // self.scheme.group * self.scheme.group
        if count:
            self.keys, self.values = (
                self._round(states, count, how)
                for states, how in ((keys, self.scheme.key), (values, self.scheme.value))
            )
            self.rounded += count
        return keys, values

    def _round(self, states: torch.Tensor, count: int, how: Round) -> torch.Tensor:
        start, stop = self.rounded, self.rounded + count
        tiles = states[..., start:stop, :].unflatten(-2, (-1, self.scheme.group))
        return torch.cat([states[..., :start, :], how(tiles).flatten(-3, -2), states[..., stop:, :]], dim=-2)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: where rounded tokens would go: what stood in their group cannot be had back.
        """
        if self.get_seq_length() - abs(tokens_to_remove) < min(self.rounded, self.get_seq_length()):
            raise ValueError(f"{-tokens_to_remove} tokens cannot be removed: some are rounded in their group already.")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rounded = self.scheme.sinks


def rounded_cache(config: PreTrainedConfig, scheme: Scheme) -> Cache:
    """An empty cache of rounded states for a model.

    Raises:
        ValueError: for a model with layers that are not full attention.
    """
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention"})
    if others:
        raise ValueError(f"reference caches are for models of full attention alone; this one has {', '.join(others)}.")
    return Cache(layers=[RoundedLayer(scheme) for _ in range(text.num_hidden_layers)])


def scheme_bits(cache: Cache) -> float:
    """Stored bits of a cache of rounded states."""
    return cache.layers[0].scheme.stored_bits


def head_dim_of(config: PreTrainedConfig) -> int:
    """Channels of a head."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
