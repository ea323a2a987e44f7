"""The Hadamard rotation that spreads a value over its channels before it is quantized."""

from __future__ import annotations

import functools

import torch

_SLICE_ELEMENTS = 1 << 21  # rotated at a time: bounds the float32 temporaries of a long prompt


@functools.cache
@torch.inference_mode(False)
def hadamard(size: int, device: torch.device | None = None) -> torch.Tensor:
    """Orthonormal and symmetric `[size, size]`, float32: Sylvester's Hadamard blocks of the largest power of two.

    One tensor a size and device, shared: not to be written to.
    """
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while size % (2 * matrix.shape[0]) == 0:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return torch.block_diag(*[matrix] * (size // matrix.shape[0]))


def rotate(states: torch.Tensor) -> torch.Tensor:
    """`states` `[B, H, T, D]` times `hadamard(D)`, in their dtype; its own inverse. The product is in float32."""
    rotation = hadamard(states.shape[-1], states.device)  # symmetric, so `linear` may take it for its transpose
    step = max(1, _SLICE_ELEMENTS * states.shape[2] // max(1, states.numel()))
    if states.shape[2] <= step:
        return torch.nn.functional.linear(states.float(), rotation).to(states.dtype)
    out = torch.empty_like(states)
    for start in range(0, states.shape[2], step):
        part = states[:, :, start : start + step]
        out[:, :, start : start + step] = torch.nn.functional.linear(part.float(), rotation)
    return out
