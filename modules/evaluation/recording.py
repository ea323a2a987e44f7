"""What a model's attention is given and gives, recorded on the way through forwards without a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

_RECORDING = "kivi_recording"


class Recorded(NamedTuple):
    """Of one layer and sequence: queries `[heads, T, D]` times the scaling of scores, keys and values `[H, T, D]`, and what was
    attended, `[1, heads, T, D]`."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attended: torch.Tensor


@contextlib.contextmanager
def recording(model: PreTrainedModel, wanted: Container[int]) -> Iterator[dict[int, Recorded]]:
    """The states of the last forward over ids `[1, T]`, by layer, of those that are `wanted`."""
    found: dict[int, Recorded] = {}

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        if module.layer_idx in wanted:
            found[module.layer_idx] = Recorded(query[0] * scaling, key[0], value[0], out)
        return out.transpose(1, 2), None

    AttentionInterface.register(_RECORDING, attend)
    AttentionMaskInterface.register(_RECORDING, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = _RECORDING
    try:
        yield found
    finally:
        model.config._attn_implementation = before
