"""What kernels are called with: the tensors of a layer and of a step, gathered so that no list of them is written twice.

A kernel gets such a tuple as one argument; Triton (3.6 and later) takes it apart and gives the fields their names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from modules.store.side import PackedSide


class Rows(NamedTuple):
    """New states `[B, heads, q, D]` with channels side by side; strides in elements."""

    states: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any

    @classmethod
    def of(cls, states: torch.Tensor) -> Rows:
        """The states, copied where their channels do not lie side by side."""
        states = states if states.stride(-1) == 1 else states.contiguous()
        return cls(states, *states.stride()[:3])


class Side(NamedTuple):
    """The tensors of a `modules.store.side.PackedSide`; any tensor stands for a part that there is not."""

    codes: Any
    scale: Any
    minimum: Any
    extra: Any
    order: Any
    sinks: Any
    window: Any

    @classmethod
    def of(cls, side: PackedSide, rows: slice = slice(None)) -> Side:
        """The sequences `rows` of `side`."""
        named = side.tensors()
        return cls(*(named.get(name, side.codes)[rows] for name in cls._fields))
