"""A cache that was not filled: how large it would be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from modules.cache.cache import KIVICache
from modules.cache.layer import KIVICacheLayer
from modules.options import KIVIOptions, check_count, head_dim_of
from modules.store.step import Step


def planned_cache(
    config: PreTrainedConfig,
    tokens: int,
    *,
    batch_size: int = 1,
    options: KIVIOptions | None = None,
    dtype: torch.dtype = torch.float16,
    chunk: int | None = None,
    reserve: bool = False,
) -> KIVICache:
    """The cache of a model after `tokens` tokens of each sequence, on the meta device: sizes and no memory.

    What allocates and grows a cache that is filled allocates and grows this one, so `get_cache_info()["bytes"]` is the same
    to the byte (on a CPU; on a GPU growth leaves some more room).

    Args:
        config: of the model; gives layers, KV heads and head size.
        tokens: of each sequence.
        batch_size: sequences.
        options: what is stored; None takes what the config carries.
        dtype: of the model.
        chunk: tokens of a forward; None: all of them, in however many pieces the model takes them. With 1 the room for growth is
            that of decoding.
        reserve: room is made for all tokens at the start, as `max_length` and, on a GPU, `generate()` do.

    Raises:
        ValueError: for a number that is not allowed, and for options that do not fit the model.
    """
    check_count("tokens", tokens)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}.")
    if chunk is not None:
        check_count("chunk", chunk)
    text = config.get_text_config(decoder=True)
    chosen = dataclasses.replace(options or KIVIOptions.from_config(text), backend="torch")
    cache = KIVICache(text, chosen)
    if reserve:
        cache.reserve(tokens)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    shape = (batch_size, heads, tokens, head_dim_of(text))
    _fill(cache, torch.empty(shape, dtype=dtype, device="meta"), cache.ledger.pieces(tokens, chunk))
    return cache


def _fill(cache: KIVICache, states: torch.Tensor, pieces: Iterable[int]) -> None:
    """Let the layers grow as they would for so many tokens at a time of the keys or values `states`."""
    for layer in cache.kivi_layers:
        layer.lazy_initialization(states, states)
    others = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    for length in pieces:
        step = Step.of(None, states.shape[0], length)
        for layer in cache.layers:
            if isinstance(layer, KIVICacheLayer) and layer.store is not None:
                layer.store.make_room(step)
        for layer in others:
            layer.update(states[:, :, :length], states[:, :, :length])
        cache.ledger.commit(step)
