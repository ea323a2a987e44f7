"""What the kernels are written for, and that no tensor reaches one that does not fit."""

from __future__ import annotations

import torch

from modules.options import WIDE_CHANNELS
from modules.store.layer import PackedLayer
from modules.store.step import Step

HEAD_DIMS = (64, 96, 128, 256)
GROUP_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDE = max(most for _, most in WIDE_CHANNELS.values())  # more spill registers, so the defaults have no more
MOST_ELEMENTS = 1 << 31  # from the first to the last state of a sequence: kernels count in int32 within one


def why_not(layer: PackedLayer) -> str | None:
    """What of the shapes of `layer` the kernels are not written for; None where they are."""
    window = layer.key.window
    head_dim, dtype = window.shape[3], window.dtype
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is not one of {HEAD_DIMS}"
    if dtype not in DTYPES:
        return f"{dtype} is not a type the kernels take"
    return None if layer.ledger.geometry.at_once else _why_not_in_groups(layer, head_dim)


def _why_not_in_groups(layer: PackedLayer, head_dim: int) -> str | None:
    if layer.group_size not in GROUP_SIZES:
        return f"group_size={layer.group_size} is not one of {GROUP_SIZES}"
    if layer.value.group_size not in GROUP_SIZES or head_dim % layer.value.group_size:
        return f"v_group_size={layer.value.group_size} is not one of {GROUP_SIZES} that divides head_dim={head_dim}"
    if layer.key.wide > MAX_WIDE:
        return f"{layer.key.wide} wide key channels are more than {MAX_WIDE}"
    return None


def _check(what: str, states: torch.Tensor, shape: tuple[int, ...], window: torch.Tensor) -> None:
    """Raise `ValueError` where `states` have not that shape, or not the dtype and device of the layer."""
    if states.shape != shape:
        raise ValueError(f"{what} must be {list(shape)} to go with the layer and the step; got {list(states.shape)}.")
    if states.dtype != window.dtype or states.device != window.device:
        raise ValueError(
            f"{what} must be {window.dtype} on {window.device}, as the layer is; got {states.dtype} on {states.device}."
        )
    if (shape[1] - 1) * states.stride(1) + (shape[2] - 1) * states.stride(2) + shape[3] > MOST_ELEMENTS:
        raise ValueError(
            f"{what} of a sequence must lie within {MOST_ELEMENTS} elements; got shape {list(shape)} with strides "
            f"{list(states.stride())}. Give the new tokens in smaller pieces."
        )


def check_new_tokens(layer: PackedLayer, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
    """Raise `ValueError` where the states of new tokens do not fit the layer and the step."""
    window = layer.key.window
    batch, kv_heads, _, head_dim = window.shape
    layer.ledger.check_batch(batch)
    for what, states in (("keys", key), ("values", value)):
        _check(what, states, (batch, kv_heads, step.length, head_dim), window)


def check_query(layer: PackedLayer, query: torch.Tensor, step: Step) -> None:
    """Raise `ValueError` where the queries do not fit the layer and the step."""
    window = layer.key.window
    batch, kv_heads, _, head_dim = window.shape
    heads = query.shape[1] if query.dim() == 4 else 0
    if heads < 1 or heads % kv_heads:
        raise ValueError(
            f"queries must be [B, heads, q, D] with a multiple of the layer's {kv_heads} KV heads; got {list(query.shape)}."
        )
    _check("queries", query, (batch, heads, step.length, head_dim), window)


def check_room(layer: PackedLayer, step: Step) -> None:
    """Raise `ValueError` where a group that the step fills has no room in the packed part."""
    need = layer.ledger.capacity_for(step)
    room = min(layer.key.capacity, layer.value.capacity)
    if need > room:
        raise ValueError(f"there is room for {room} packed tokens and the step needs {need}; call make_room first.")
