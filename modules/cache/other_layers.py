"""The state of transformers' own cache layers (sliding windows, linear attention) as tensors and plain values, and back.

Their attributes are tensors, numbers and dicts of both by number; what they are called differs between the kinds of layer and
the versions of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import CacheLayerMixin

from modules.cache.fingerprint import dtype_name
from modules.store.live import converted

Plain: TypeAlias = bool | int | float | str | None
_DTYPE = "dtype:"


def state_of(layer: CacheLayerMixin) -> tuple[dict[str, torch.Tensor], dict[str, Plain]]:
    """The tensors, on the CPU, and the plain values of a layer by the names of its attributes, `name.number` in dicts.

    Raises:
        ValueError: for a layer that has something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Plain] = {}
    for name, value in _flat(vars(layer)):
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
        elif isinstance(value, torch.dtype):
            plain[name] = _DTYPE + dtype_name(value)
        elif isinstance(value, Plain):
            plain[name] = value
        elif not isinstance(value, torch.device):  # where it is loaded decides
            raise ValueError(
                f"a {type(layer).__name__} cannot be saved: its {name!r} is a {type(value).__name__}. A cache of full attention, "
                "sliding windows and linear attention can."
            )
    return tensors, plain


def restore(
    layer: CacheLayerMixin,
    names: list[str],
    tensor: Callable[[str], torch.Tensor],
    plain: dict[str, Plain],
    device: torch.device,
    dtype: Callable[[torch.dtype], torch.dtype],
) -> None:
    """Give a new layer the state that `state_of` gave.

    Args:
        names: of the tensors.
        dtype: which dtype a tensor of a dtype is to have.

    Raises:
        ValueError: for a layer that has no such attributes.
    """
    for name in names:
        saved = tensor(name)
        states = converted(name, saved, dtype(saved.dtype)) if saved.is_floating_point() else saved
        _set(layer, name, states.to(device, copy=True))
    for name, value in plain.items():
        _set(layer, name, value)
    if (saved_dtype := dtype_in(plain)) is not None:
        layer.dtype = dtype(saved_dtype)
    if names:
        layer.device = device


def dtype_in(plain: dict[str, Plain]) -> torch.dtype | None:
    """The dtype of a layer's states, by its plain values; None before its first tokens."""
    name = plain.get("dtype")
    return getattr(torch, name.removeprefix(_DTYPE)) if isinstance(name, str) else None


def _flat(attributes: dict[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in attributes.items():
        flat += (
            [(f"{name}.{number}", item) for number, item in value.items()]
            if isinstance(value, dict)
            else [(name, value)]
        )
    return flat


def _set(layer: CacheLayerMixin, name: str, value: Any) -> None:
    attribute, _, number = name.partition(".")
    if attribute not in vars(layer) and attribute != "dtype":  # which a layer without tokens may not have yet
        raise ValueError(f"a {type(layer).__name__} has no {attribute!r} in this version of transformers.")
    if number:
        getattr(layer, attribute)[int(number)] = value
    else:
        setattr(layer, attribute, value)
