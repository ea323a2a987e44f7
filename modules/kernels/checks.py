"""What is looked at before a kernel gets addresses: a wrong shape there reads or writes memory of others."""

from __future__ import annotations

import torch

from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step


def check_new_states(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer, step: Step | None = None
) -> None:
    """Raise `ValueError` where new states do not fit `layer`: its sequences, KV heads, channels, dtype or device.

    Args:
        query: `[B, num_attention_heads, q, D]`.
        key, value: `[B, num_key_value_heads, q, D]`.
        layer: what they are to meet.
        step: which of the tokens are real; all where there is none.
    """
    window = layer.key.window
    batch, kv_heads, _, head_dim = window.shape
    for name, states in (("query", query), ("key", key), ("value", value)):
        if states.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim]; got a shape of {tuple(states.shape)}.")
        facts = [
            ("sequences", states.shape[0], batch),
            ("tokens", states.shape[2], key.shape[2] if step is None else step.length),
            ("channels a head (head_dim)", states.shape[3], head_dim),
            ("dtype", states.dtype, window.dtype),
            ("device", states.device, window.device),
        ]
        if states is not query:
            facts.append(("KV heads (num_key_value_heads)", states.shape[1], kv_heads))
        _compare(name, facts)
    if not query.shape[1] or query.shape[1] % kv_heads:
        raise ValueError(
            f"query has {query.shape[1]} heads; the cache holds {kv_heads} KV heads, which must divide them."
        )
    _check_counts(layer, batch, step)


def _check_counts(layer: PackedLayer, batch: int, step: Step | None) -> None:
    """Raise `ValueError` where ledger and step are not of the sequences that the layer has memory for."""
    counts = step.lengths if step is not None else [0] * batch
    if not len(layer.lengths) == len(layer.packed) == len(counts) == batch:
        raise ValueError(
            f"the layer has memory for {batch} sequences, its ledger counts {len(layer.lengths)} and the step {len(counts)}."
        )
    if step is not None and not 0 <= min(counts, default=0) <= max(counts, default=0) <= step.length:
        raise ValueError(f"each sequence gets between 0 and {step.length} of the new tokens; got {counts}.")


def check_groups(side: PackedSide, sequences: slice, start: int, states: torch.Tensor) -> None:
    """Raise `ValueError` where states `[b, H, T, D]` are no whole groups with a place at packed tokens `start…` of `sequences`."""
    window, group_size = side.window[sequences], side.group_size if side.what == "keys" else 1
    if states.dim() != 4:
        raise ValueError(f"{side.what} must be [batch, heads, tokens, head_dim]; got a shape of {tuple(states.shape)}.")
    facts = [
        ("sequences", states.shape[0], window.shape[0]),
        ("KV heads (num_key_value_heads)", states.shape[1], window.shape[1]),
        ("channels a head (head_dim)", states.shape[3], window.shape[3]),
        ("dtype", states.dtype, window.dtype),
        ("device", states.device, window.device),
    ]
    _compare(side.what, facts)
    if start < 0 or start % group_size or states.shape[2] % group_size:
        raise ValueError(
            f"{side.what} are packed in whole groups of {group_size} tokens; got {states.shape[2]} from {start} on."
        )
    if start + states.shape[2] > side.capacity:
        raise ValueError(
            f"{states.shape[2]} {side.what} from {start} on have no place in a capacity of {side.capacity} tokens."
        )


def check_layer(layer: PackedLayer) -> None:
    """Raise `ValueError` where a tensor of `layer` is not what its codecs and its ledger say."""
    batch, heads, _, head_dim = layer.key.window.shape
    device, dtype = layer.key.window.device, layer.key.window.dtype
    for side in layer.sides:
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "sinks": ((batch, heads, layer.sink_length, head_dim), dtype),
            "window": ((batch, heads, layer.ring, head_dim), dtype),
        }
        for name, part in side.codec.parts(head_dim, dtype).items():
            expected[name] = (batch, heads, layer.key.capacity // part.every, part.width), part.dtype
        if side.codec.wide:
            expected["order"] = (batch, heads, head_dim), torch.int64
        for name, (shape, kind) in expected.items():
            t = getattr(side, name)
            if t is None or t.shape != shape or t.dtype != kind or t.device != device or not t.is_contiguous():
                found = None if t is None else f"{tuple(t.shape)}, {t.dtype}, on {t.device}, strides {t.stride()}"
                raise ValueError(
                    f"{name} of the {side.what} must be {shape}, {kind}, on {device}, contiguous; got {found}."
                )


def _compare(name: str, facts: list[tuple[str, object, object]]) -> None:
    for what, got, held in facts:
        if got != held:
            raise ValueError(
                f"{name} does not fit the cache: {what} {got}, and the cache has {held}. A cache goes on with the model that "
                "filled it; reset() it for another."
            )
