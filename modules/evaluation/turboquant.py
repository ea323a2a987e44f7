"""TurboQuant (Zandieh et al., arXiv 2504.19874): a reference.

Each token's key or value of a head is divided by its norm and turned by a random orthogonal matrix; its coordinates then
have a known distribution, that of a coordinate of a random point on the unit sphere, and each is rounded by the quantizer
that is best for it (Lloyd-Max). The norm is stored with 16 bits. For inner products without bias the paper spends one of
the bits on the signs of a random projection of what is left (QJL); keys take that here where it is asked for.

Every token is rounded, in all layers, as the paper says of generated ones. Left out: its fractional bits, which give more
of them to outlier channels, and entropy coding. Not checked: the paper's own rotations and codebooks beyond their
definitions.
"""

from __future__ import annotations

import functools
import math

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from modules.evaluation.rounded import Scheme, head_dim_of, rounded_cache

NORM_BITS = 16
SEED = 42
_GRID = 20000  # points at which the density is summed, an even number: none at 0
_TURNS = 300


@functools.cache
def rotation(size: int, seed: int = SEED) -> torch.Tensor:
    """A random orthogonal `[size, size]`, float32, uniform: QR of a Gaussian matrix, signs by R's diagonal."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


@functools.cache
def projection(size: int, seed: int = SEED + 1) -> torch.Tensor:
    """The Gaussian matrix `[size, size]` of QJL, float32."""
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def codebook(size: int, bits: int) -> torch.Tensor:
    """The 2**bits levels, float32 and rising, with the least mean squared error for a coordinate of a random point on the
    unit sphere of `size` dimensions, whose density is proportional to (1 - x²)^((size - 3) / 2): Lloyd's iteration."""
    x = torch.linspace(-1, 1, _GRID, dtype=torch.float64)
    density = (1 - x * x).clamp_min(0) ** ((size - 3) / 2)
    weights = density / density.sum()
    levels = torch.linspace(-1, 1, 2 ** (bits + 1) + 1, dtype=torch.float64)[1::2] * 3 / math.sqrt(size)
    for _ in range(_TURNS):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, nearest, weights)
        moment = torch.zeros_like(levels).index_add_(0, nearest, weights * x)
        levels = torch.where(mass > 0, moment / mass.clamp_min(1e-300), levels)
    return levels.float()


def round_states(states: torch.Tensor, bits: int) -> torch.Tensor:
    """States `[..., D]` as their codes give them back, float32 (the paper's algorithm for the least squared error)."""
    states = states.float()
    turn, levels = rotation(states.shape[-1]), codebook(states.shape[-1], bits)
    norm = states.norm(dim=-1, keepdim=True)
    turned = states / norm.clamp_min(1e-12) @ turn.T
    return levels[torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)] @ turn * norm.half().float()


def round_with_signs(states: torch.Tensor, bits: int) -> torch.Tensor:
    """States `[..., D]` as `bits` - 1 bits and the signs of a projection of the rest give them back, float32: the paper's
    algorithm for inner products, whose expectation over projections is that of the states."""
    states = states.float()
    rough = round_states(states, bits - 1)
    rest = states - rough
    onto = projection(states.shape[-1])
    signs = torch.where(rest @ onto.T >= 0, 1.0, -1.0)
    norm = rest.norm(dim=-1, keepdim=True).half().float()
    return rough + math.sqrt(math.pi / 2) / states.shape[-1] * norm * (signs @ onto)


def stored_bits(head_dim: int, bits: int, signs: bool = False) -> float:
    """Bits an element of K and V on average: its code and its share of the norm; with signs, keys store a second norm."""
    return bits + NORM_BITS / head_dim * (1.5 if signs else 1)


def turboquant_cache(config: PreTrainedConfig, bits: int, signs: bool = False) -> Cache:
    """An empty cache of TurboQuant's states for a model; with `signs`, keys by the algorithm for inner products.

    Raises:
        ValueError: for a model with layers that are not full attention.
    """
    key = round_with_signs if signs else round_states
    scheme = Scheme(
        lambda states: key(states, bits).to(states.dtype),
        lambda states: round_states(states, bits).to(states.dtype),
        stored_bits(head_dim_of(config), bits, signs),
    )
    return rounded_cache(config, scheme)
