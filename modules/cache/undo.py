"""What it takes to undo a step that failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from modules.cache.layer import KIVICacheLayer
from modules.store.layer import PackedLayer
from modules.store.ledger import Ledger
from modules.store.step import Step


class Savepoint:
    """A cache before a step of `length` new columns.

    What packed layers write lies behind the lengths of the ledger and is dead once those are back; only slots of the
    window that several new tokens reuse are kept here, and the states that linear-attention layers write over.
    """

    def __init__(self, layers: list[Any], ledger: Ledger, step: Step) -> None:
        self._layers, self._ledger, self.length = layers, ledger, step.length
        self._count, self._lengths = len(layers), ledger.save()
        self._packed = [_PackedLayer(layer, step) if isinstance(layer, KIVICacheLayer) else None for layer in layers]
        self._others = [
            None if isinstance(layer, KIVICacheLayer) else (dict(layer.__dict__), _written_in_place(layer))
            for layer in layers
        ]

    def restore(self) -> None:
        """Put the cache back as it was."""
        del self._layers[self._count :]
        self._ledger.restore(self._lengths, self.length)
        for layer, packed, other in zip(self._layers, self._packed, self._others):
            if packed is not None:
                packed.restore(layer)
            elif other is not None:
                attributes, tensors = other
                layer.__dict__.clear()
                layer.__dict__.update(attributes)
                _put_back(layer, tensors)


class _PackedLayer:
    """A packed layer before a step: its store, what its queries were, and the window where it will be overwritten.

    A store without tokens, as reset() may leave one, is not kept: a step of another batch takes its place.
    """

    def __init__(self, layer: KIVICacheLayer, step: Step) -> None:
        self.store: PackedLayer | None = layer.store if layer.ledger.seq_length else None
        self.energy: torch.Tensor | None = None
        self.newest_energy: list[tuple[int, torch.Tensor]] = []
        self.windows: list[torch.Tensor] = []
        if self.store is not None:
            self.energy, self.newest_energy = self.store.query_energy, list(self.store.newest_energy)
            if self.store.overwrites(step):
                self.windows = [side.window.clone() for side in self.store.sides]

    def restore(self, layer: KIVICacheLayer) -> None:
        if self.store is None:
            if layer.store is not None:
                layer.forget()
            return
        self.store.query_energy, self.store.newest_energy = self.energy, self.newest_energy
        for side, window in zip(self.store.sides, self.windows):
            side.window.copy_(window)


def _written_in_place(layer: CacheLayerMixin) -> dict[str, Any]:
    """Copies of the states of a linear-attention layer, by attribute: transformers writes over them.

    A dict there holds tensors by number.
    """
    saved: dict[str, Any] = {}
    for name, value in layer.__dict__.items():
        if isinstance(value, dict):
            saved[name] = {key: t.clone() if isinstance(t, torch.Tensor) else t for key, t in value.items()}
        elif name.endswith("_states") and isinstance(value, torch.Tensor):
            saved[name] = value.clone()
    return saved


def _put_back(layer: CacheLayerMixin, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        setattr(layer, name, value)


__all__: Sequence[str] = ["Savepoint"]
