"""Attention over a KIVI cache, storing included, as an operator of torch, `kivi::attend`, that compilers leave whole."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

from modules.cache.cache import KIVICache
from modules.store.step import Step

_NAME = "kivi::attend"
_running: contextvars.ContextVar[tuple[KIVICache, Step]] = contextvars.ContextVar("running step of a KIVI cache")


@contextlib.contextmanager
def running(cache: KIVICache, step: Step) -> Iterator[None]:
    """Within it, the operator is about `step`, the open step of `cache`."""
    token = _running.set((cache, step))
    try:
        yield
    finally:
        _running.reset(token)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
    """`KIVICache.attend` of the layer with the number `layer`, over the cache whose step is running."""
    return torch.ops.kivi.attend(query, key, value, layer, scaling)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
    cache, step = _running.get()
    return cache.attend(query, key, value, cache.layers[layer], scaling, step)


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim)


torch.library.define(_NAME, "(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor")
torch.library.impl(_NAME, "CPU", _attend)
torch.library.register_fake(_NAME, _shape)
