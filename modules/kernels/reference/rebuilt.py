"""Attention of many new tokens on a CPU: the past is rebuilt in float32 block by block, and torch's fused kernel attends to each.

Unpacking a key costs the same for one query and for a thousand, and a matrix product of floats is then the fastest there is. What
the blocks give is put together by their log-sum-exps, as parts of a softmax are (Rabe & Staats, arXiv 2112.05682); no scores are
kept, so memory grows with the new tokens and not with those that are stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step

_BLOCK_FLOATS = 1 << 20  # of keys, and as many of values, rebuilt at a time: 4 MiB each
# What `scaled_dot_product_attention` runs on a CPU; called by name it also gives the log-sum-exp.
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PackedLayer,
    scaling: float,
    step: Step,
) -> torch.Tensor:
    """See `modules.kernels.backend.Backend.attend`; for tensors on a CPU."""
    batch, heads, length, head_dim = query.shape
    out = query.new_zeros(batch, length, heads, head_dim)
    for sequences, count in layer.ledger.equally_long(step.lengths):
        if count:
            queries, keys, values = (states[sequences, :, :count] for states in (query, key, value))
            out[sequences, :count] = _attend_rows(queries, keys, values, layer, sequences, scaling).transpose(1, 2)
    return out


def _attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer, sequences: slice, scaling: float
) -> torch.Tensor:
    """Equally long sequences: query `[b, heads, q, D]` to `[b, heads, q, D]`, float32."""
    group = query.shape[1] // key.shape[1]
    by_head = query.float().reshape(-1, group, *query.shape[2:])  # the KV heads of all sequences, the queries of each
    out, weight = _fused(by_head, key.float(), value.float(), scaling, is_causal=True)
    for keys, values in _past(layer, sequences):
        out, weight = _merged(out, weight, *_fused(by_head, keys, values, scaling))
    return out.reshape(query.shape)


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What queries `[b * H, g, q, D]` attend to over `[b, H, T, D]`, and the log-sum-exp of their scores `[b * H, g, q, 1]`."""
    group = query.shape[1]
    keys, values = (t.flatten(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for t in (keys, values))
    out, weight = _FUSED(query, keys, values, 0.0, is_causal, scale=scaling)
    return out, weight.unsqueeze(-1)


def _merged(
    out: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of one softmax put together, in place of the first: `out` and the log-sum-exps."""
    both = torch.logaddexp(weight, other_weight)
    return out.lerp_(other, (other_weight - both).exp_()), both


def _past(layer: PackedLayer, sequences: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all stored tokens, float32 `[b, H, T, D]`, in blocks; the first has those in full precision as well."""
    sequence = sequences.start or 0
    length, packed = layer.lengths[sequence], layer.packed[sequence]
    if not length:
        return
    batch, heads, _, head_dim = layer.key.window[sequences].shape
    tokens = _BLOCK_FLOATS // (batch * heads * head_dim)
    tokens = max(layer.group_size, tokens // layer.group_size * layer.group_size)
    for start in range(0, max(packed, 1), tokens):
        stop = min(start + tokens, packed)
        yield tuple(_block(layer, side, sequences, start, stop) for side in layer.sides)


def _block(layer: PackedLayer, side: PackedSide, sequences: slice, start: int, stop: int) -> torch.Tensor:
    """The packed tokens `start…stop` of a side, behind the sinks and the window where they are the first."""
    parts = [] if start else layer.full_precision(side, sequences)
    if stop > start:
        parts.append(side.read(sequences, start, stop, torch.float32))
    return torch.cat([part.float() for part in parts], dim=2) if len(parts) > 1 else parts[0].float()
