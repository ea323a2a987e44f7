"""Linear layers for few rows, written so that a compiler makes one loop over the weights of each, at the speed of memory.

A step of one token multiplies every weight once: what it takes is reading them. Libraries for matrices lay them out anew or
leave threads idle then, and have no such path for weights of one byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MOST_ROWS = 4  # above which a library's product of matrices is as fast


class FewRows(TorchFunctionMode):
    """Within it, while a program is traced, `F.linear` of few rows is sums of products in float32.

    Quantized weights (torchao) say what they are by a `dequantize()` of their own, which becomes part of the same loop; those that
    have none are multiplied by their own product.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args[0].numel() <= MOST_ROWS * args[0].shape[-1] and _says_what_it_is(args[1]):
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of `input` `[..., in_features]`."""
    halves = _dequantized(weight).float().chunk(2, dim=1)  # two sums at once: one would wait for each of its additions
    rows = input.reshape(-1, input.shape[-1]).float()
    products = [[(half * part).sum(-1) for half, part in zip(halves, row.chunk(2))] for row in rows]
    out = torch.stack([sum(parts[1:], parts[0]) for parts in products])
    if bias is not None:
        out = out + bias
    return out.to(input.dtype).view(*input.shape[:-1], -1)


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight) in (torch.Tensor, torch.nn.Parameter)


def _says_what_it_is(weight: torch.Tensor) -> bool:
    return _is_plain(weight) or type(weight).dequantize is not torch.Tensor.dequantize


def _dequantized(weight: torch.Tensor) -> torch.Tensor:
    return weight if _is_plain(weight) else weight.dequantize()
