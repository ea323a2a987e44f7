"""Grouped asymmetric quantization to 2, 4 and 8 bits: `x ≈ scale * code + minimum`, packed into bytes.

Keys share a scale and minimum per channel over a group of tokens, values per token over a group of channels
(KIVI, arXiv 2402.02750, section 3). Both are float16 in every model: bfloat16 has too few bits for a channel whose
offset is much larger than its range.

A byte holds `P = 8 / bits` codes, one of each of `P` planes along the head: byte `j` has the channels
`j, j + D/P, j + 2D/P, …`, the first in its lowest bits. A shift and a mask then give a contiguous slice of channels.
"""

from __future__ import annotations

import functools

import torch

from modules.codecs.codec import Packed
from modules.codecs.metadata import FLOAT16, Metadata, numbers_of

FLOAT16_MAX = 65504.0
LSQ_ROUNDS = 4
LSQ_START = 0.8
CLIPPED = 0.85
LOW_BITS = 2  # that a wide channel has more than the others
SMALLEST = 1e-30  # a mean to divide by
_SLICE_ELEMENTS = 1 << 21  # quantized at a time: bounds the temporaries of a long prefill
Fitted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes, scale and minimum


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8 `[..., D]` below `2**bits`, into bytes: uint8 `[..., D*bits/8]`."""
    planes = codes.chunk(8 // bits, dim=-1)
    packed = planes[0].clone()
    for number, plane in enumerate(planes[1:], start=1):
        packed |= plane << (bits * number)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_codes`: bytes, uint8 `[..., D*bits/8]`, into codes, uint8 `[..., D]`."""
    mask = (1 << bits) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _round_to_codes(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: int) -> torch.Tensor:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((x - minimum) / safe).round_().clamp_(0, levels)


def _fit(x: torch.Tensor, dim: int, bits: int, method: str, metadata: Metadata, shares: torch.Tensor | float) -> Fitted:
    """Codes (float32, like `x`), scale and minimum (float32 as they will be read, size 1 along `dim`) of groups.

    "minmax" spans each group; "clipped" the range shrunk to `CLIPPED` about its centre. "lsq" alternates rounding with the
    least-squares refit of scale and minimum, from the range shrunk to `LSQ_START` about its centre, and keeps the best of all
    it saw, min-max included; `shares`, which add up to 1 along `dim`, are what squared errors count.
    """
    levels = (1 << bits) - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if method == "clipped":
        margin = (high - low) * ((1 - CLIPPED) / 2)
        low, high = low + margin, high - margin
    scale, minimum = metadata.stored((high - low) / levels, low, bits)
    codes = _round_to_codes(x, scale, minimum, levels)
    if method != "lsq":
        return codes, scale, minimum

    def mean(of: torch.Tensor) -> torch.Tensor:
        return (of * shares).sum(dim, keepdim=True)

    best_error = mean((codes * scale + minimum).sub_(x).square_())
    best_scale, best_minimum = scale, minimum
    mean_x = mean(x)
    scale, minimum = (high - low) * (LSQ_START / levels), (low + high) / 2 - (high - low) * (LSQ_START / 2)
    scale, minimum = metadata.stored(scale, minimum, bits)
    for _ in range(LSQ_ROUNDS):
        codes = _round_to_codes(x, scale, minimum, levels)
        mean_c = mean(codes)
        centred = codes - mean_c
        refit = mean(centred * (x - mean_x)) / mean(centred.square()).clamp_min(1e-12)
        scale, minimum = _refit(refit, mean_x, mean_c, bits, metadata)
        codes = _round_to_codes(x, scale, minimum, levels)
        error = mean((codes * scale + minimum).sub_(x).square_())
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return _round_to_codes(x, best_scale, best_minimum, levels), best_scale, best_minimum


def _refit(
    scale: torch.Tensor, mean_x: torch.Tensor, mean_c: torch.Tensor, bits: int, metadata: Metadata
) -> tuple[torch.Tensor, torch.Tensor]:
    """A refitted scale as it will be read, and the best minimum beside that one."""
    rounded, _ = metadata.stored(scale, mean_x - scale * mean_c, bits)
    return metadata.stored(rounded, mean_x - rounded * mean_c, bits)


def refuse_unrepresentable(x: torch.Tensor, what: str) -> None:
    """Raise `ValueError` for states that float16 metadata cannot describe."""
    largest = x.abs().amax().item() if x.numel() else 0.0
    if not largest <= FLOAT16_MAX:
        raise ValueError(
            f"{what} to quantize must be finite and at most {FLOAT16_MAX:.0f} in magnitude (their scale and minimum are "
            f"float16); got {largest}. Keep this side in full precision with bits 16, or look for the overflow upstream."
        )


def check_layout(x: torch.Tensor, size: int, what: str, bits: int, group_size: int, method: str) -> None:
    """Raise `ValueError` for bits, method or shapes that do not fit; `size` is of the dimension that is cut into groups."""
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8; got {bits!r}.")
    if method not in ("minmax", "lsq", "clipped"):
        raise ValueError(f"the range must be 'minmax', 'lsq' or 'clipped'; got {method!r}.")
    if group_size < 1 or size % group_size:
        raise ValueError(f"{what} come in groups: {size} is not a multiple of group_size={group_size}.")
    if x.shape[-1] % (8 // bits):
        raise ValueError(f"head_dim={x.shape[-1]} must be a multiple of {8 // bits} at {bits} bits.")


def _check(x: torch.Tensor, size: int, what: str, bits: int, group_size: int, method: str) -> None:
    check_layout(x, size, what, bits, group_size, method)
    refuse_unrepresentable(x, what)


def token_shares(groups: torch.Tensor) -> torch.Tensor:
    """What the error of each token of groups of keys `[..., G, D]` counts in their fit, `[..., G, 1]`, 1 together.

    A token that lies apart from its group is one that attention picks out, or rests on when it has nothing to pick, and weighs more
    in what is attended. With its squared distance `d` from the group's mean it counts in proportion to `1 + d³ / mean(d³)`.
    """
    apart = (groups - groups.mean(-2, keepdim=True)).square_().sum(-1, keepdim=True)
    cubed = (apart / apart.mean(-2, keepdim=True).clamp_min(SMALLEST)).pow(3)
    weights = 1 + cubed / cubed.mean(-2, keepdim=True).clamp_min(SMALLEST)
    return weights / weights.sum(-2, keepdim=True)


def quantize_keys(
    keys: torch.Tensor, bits: int, group_size: int, method: str = "lsq", metadata: Metadata = FLOAT16, wide: int = 0
) -> Packed:
    """Quantize keys per channel over groups of `group_size` tokens.

    Args:
        keys: float `[..., T, D]`, `T` a multiple of `group_size`.
        bits: 2, 4 or 8.
        group_size: tokens that share a scale and minimum.
        method: "lsq" or "minmax".
        metadata: how scale and minimum are stored.
        wide: the first channels, `W` of them, a multiple of 4, which get `LOW_BITS` more, and by which "lsq" tells tokens that
            lie apart (`token_shares`); 0: none, and by all.

    Returns:
        `Packed`: codes `[..., T, D*bits/8]`, scale and minimum `[..., T/G, D]`, and with wide channels `extra` `[..., T, W/4]`.

    Raises:
        ValueError: for bits, method or shapes that do not fit, and for keys that are NaN, infinite or beyond float16.
    """
    _check(keys, keys.shape[-2], "keys", bits, group_size, method)
    head_dim = keys.shape[-1]
    parts = []
    for part in _token_slices(keys, group_size):
        groups = part.float().unflatten(-2, (-1, group_size))
        shares = token_shares(groups[..., : wide or head_dim]) if method == "lsq" else 1 / group_size
        codes, scale, minimum = coarse = _fit(groups, -2, bits, method, metadata, shares)
        low = []
        if wide:
            fine = _fit(groups[..., :wide], -2, bits + LOW_BITS, method, metadata, shares)
            low = [pack_low_codes(_widen(coarse, fine)).flatten(-3, -2)]
        numbers = metadata.pack(scale.squeeze(-2), minimum.squeeze(-2), bits)
        parts.append((pack_codes(codes.to(torch.uint8), bits).flatten(-3, -2), *numbers, *low))
    widths = head_dim * bits // 8, head_dim, *((wide // 4,) if wide else ())
    return _join(parts, widths, keys, metadata)


def _widen(coarse: Fitted, fine: Fitted) -> torch.Tensor:
    """Put the high bits of `fine` codes, with their scale and minimum, in place of the first channels of `coarse` ones; the low
    `LOW_BITS`, uint8.

    `scale * code + minimum` is `(4*scale) * high + scale * low + minimum`: the high bits are codes like those of other channels,
    with a scale four times as large.
    """
    steps = 1 << LOW_BITS
    high = (fine[0] / steps).floor_()
    for all_channels, wide in zip(coarse, (high, fine[1] * steps, fine[2])):
        all_channels[..., : wide.shape[-1]] = wide
    return fine[0].sub_(high, alpha=steps).to(torch.uint8)


def quantize_values(
    values: torch.Tensor, bits: int, group_size: int, method: str = "minmax", metadata: Metadata = FLOAT16
) -> Packed:
    """Quantize values per token over groups of `group_size` channels.

    Args:
        values: float `[..., T, D]`, `D` a multiple of `group_size`.
        bits: 2, 4 or 8.
        group_size: channels that share a scale and minimum.
        method: "minmax", "lsq" or "clipped".
        metadata: how scale and minimum are stored.

    Returns:
        `Packed`: codes `[..., T, D*bits/8]`, scale and minimum `[..., T, D/G]`.

    Raises:
        ValueError: for bits, method or shapes that do not fit, and for values that are NaN, infinite or beyond float16.
    """
    _check(values, values.shape[-1], "values", bits, group_size, method)
    head_dim = values.shape[-1]
    parts = []
    for part in _token_slices(values, 1):
        groups = part.float().unflatten(-1, (-1, group_size))
        codes, scale, minimum = _fit(groups, -1, bits, method, metadata, 1 / group_size)
        numbers = metadata.pack(scale.squeeze(-1), minimum.squeeze(-1), bits)
        parts.append((pack_codes(codes.to(torch.uint8).flatten(-2), bits), *numbers))
    return _join(parts, (head_dim * bits // 8, head_dim // group_size), values, metadata)


def _token_slices(x: torch.Tensor, multiple: int) -> list[torch.Tensor]:
    tokens = x.shape[-2]
    per_token = max(1, x.numel() // max(1, tokens))
    step = max(multiple, _SLICE_ELEMENTS // per_token // multiple * multiple)
    return [x[..., start : start + step, :] for start in range(0, tokens, step)]


def _join(
    parts: list[tuple[torch.Tensor, ...]], widths: tuple[int, ...], like: torch.Tensor, metadata: Metadata
) -> Packed:
    """The parts of slices of tokens, one behind another; `widths` are those of codes, of scale and minimum, and of `extra`."""
    if not parts:
        codes, numbers, *extra = widths
        shapes = [(codes, torch.uint8), (numbers, metadata.scale), (numbers, metadata.minimum)]
        shapes += [(width, torch.uint8) for width in extra]
        return Packed(*(torch.empty(*like.shape[:-2], 0, n, dtype=kind, device=like.device) for n, kind in shapes))
    return Packed(*(torch.cat(column, dim=-2) if len(parts) > 1 else column[0] for column in zip(*parts)))


def dequantize_keys(packed: Packed, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys `[..., T, D]` in `dtype` from their packed groups."""
    scale, minimum = numbers_of(packed, bits)
    codes = unpack_codes(packed.codes, bits).to(torch.float32).unflatten(-2, (-1, group_size))
    keys = codes.mul_(scale.unsqueeze(-2)).add_(minimum.unsqueeze(-2))
    return keys.flatten(-3, -2).to(dtype)


def dequantize_values(packed: Packed, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values `[..., T, D]` in `dtype` from their packed groups."""
    scale, minimum = numbers_of(packed, bits)
    codes = unpack_codes(packed.codes, bits).to(torch.float32).unflatten(-1, (-1, group_size))
    values = codes.mul_(scale.unsqueeze(-1)).add_(minimum.unsqueeze(-1))
    return values.flatten(-2).to(dtype)


def choose_order(
    keys: torch.Tensor, wide: int, group_size: int, query_energy: torch.Tensor, rotary: int = 0
) -> torch.Tensor:
    """The order in which the channels of each head are stored: first the `wide` ones whose quantization costs most.

    That cost is the mean squared range of a group times the energy of the queries. Positions rotate the first `rotary`
    channels in pairs, half of them apart, and what a channel costs at the first positions its partner costs at later ones:
    both count with the sum.

    Args:
        keys: float `[b, H, T, D]`, `T` a multiple of `group_size`.
        query_energy: float `[b, H, D]`, proportional to E[q²] of the queries that meet these keys; zeros if unknown.

    Returns:
        Channel numbers, int64 `[b, H, D]`, ascending among the wide ones and among the others.
    """
    costs, count = [], keys.shape[2] // group_size
    for part in _token_slices(keys, group_size):
        groups = part.float().unflatten(2, (-1, group_size))
        costs.append((groups.amax(3) - groups.amin(3)).square())
    cost = costs[0].mean(2) if len(costs) == 1 else sum(part.sum(2) for part in costs) / count
    known = query_energy.amax(-1, keepdim=True) > 0
    cost = cost * torch.where(known, query_energy, torch.ones_like(query_energy))
    half = rotary // 2
    pairs = cost[..., :half] + cost[..., half : 2 * half]
    cost = torch.cat([pairs, pairs, cost[..., 2 * half :]], dim=-1)
    others = torch.ones_like(cost, dtype=torch.uint8).scatter_(-1, cost.topk(wide, dim=-1).indices, 0)
    return others.argsort(dim=-1, stable=True)


def place_channels(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Channels of `x` `[b, H, T, D]` in the `order` `[b, H, D]` in which they are stored."""
    return x.gather(3, order.unsqueeze(2).expand_as(x))


def dequantize_wide_keys(packed: Packed, bits: int, order: torch.Tensor, group_size: int) -> torch.Tensor:
    """Float32 keys `[b, H, T, D]` from those with wide channels, stored in `order` `[b, H, D]`."""
    stored = dequantize_keys(packed, bits, group_size)
    low = low_codes(packed.extra)
    scale = numbers_of(packed, bits)[0][..., : low.shape[-1]] / (1 << LOW_BITS)
    stored[..., : low.shape[-1]] += (low.unflatten(2, (-1, group_size)) * scale.unsqueeze(3)).flatten(2, 3)
    return torch.empty_like(stored).scatter_(3, order.unsqueeze(2).expand_as(stored), stored)


def pack_low_codes(codes: torch.Tensor) -> torch.Tensor:
    """The low two bits of the wide channels, uint8 `[..., T, W]`, into bytes `[..., T, W/4]`, four neighbours in each."""
    return pack_codes(codes.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2), LOW_BITS)


def low_codes(extra: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_low_codes`, float32."""
    return torch.nn.functional.embedding(extra.int(), _codes_of_bytes(extra.device)).flatten(-2)


@functools.cache
@torch.inference_mode(False)
def _codes_of_bytes(device: torch.device) -> torch.Tensor:
    """The four 2-bit codes of each byte, float32 `[256, 4]`: one lookup, where planes would be a few channels wide."""
    return unpack_codes(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1), 2).float()
