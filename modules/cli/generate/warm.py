"""What is compiled once is compiled before the first turn, not in the middle of an answer."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from modules.kivi_cache_general import KIVICache
from modules.options import head_dim_of
from modules.store.step import Step

TURN_TOKENS = 8  # a later turn's tokens attend by a kernel of their own


def warm_up(model: PreTrainedModel, cache: KIVICache) -> None:
    """Attend and pack once in a layer of each kind of a scratch `cache`, in the shapes of `model` and with random states."""
    config = model.config.get_text_config(decoder=True)
    options, heads, head_dim = cache.options, config.num_key_value_heads, head_dim_of(config)
    kinds = {(layer.bits, layer.options.wide_channels): layer for layer in cache.kivi_layers}
    layers = list(kinds.values())
    generator = torch.Generator().manual_seed(0)
    for length in (options.sink_length + options.residual_length + options.group_size, TURN_TOKENS, 1):
        step = Step.of(None, 1, length)
        query, key, value = (
            torch.randn(1, count, length, head_dim, generator=generator).to(model.device, model.dtype)
            for count in (config.num_attention_heads, heads, heads)
        )
        for layer in layers:
            if cache.ledger.seq_length:
                layer.attend(query, key, value, head_dim**-0.5, step)
            else:
                layer.append(key, value, step, query)
        cache.ledger.commit(step)
