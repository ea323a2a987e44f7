"""Quantizing and packing whole groups on a GPU, in Triton, straight into the cache's buffers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from modules.codecs.grouped import FLOAT16_MAX, SMALLEST
from modules.kernels.triton import launch
from modules.kernels.triton.arguments import Rows, Side
from modules.kernels.triton.fit import fit, round_to_codes
from modules.kernels.triton.metadata import load_numbers, store_numbers
from modules.store.side import PackedSide

_LARGEST = tl.constexpr(FLOAT16_MAX)
_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def group_of_side(side, token, head, TILE: tl.constexpr):
    """The packed parts of a side from `token` on, counted over all heads; for keys the first token of a group."""
    D: tl.constexpr = TILE.D
    row = token // TILE.G * D if TILE.KEYS else token * (D // TILE.G)
    return Side(
        codes=side.codes + token * TILE.WIDTH,
        scale=side.scale + row,
        minimum=side.minimum + row,
        extra=side.extra + token * (TILE.WIDE // 4),
        order=side.order + head * D,
        sinks=side.sinks,
        window=side.window,
    )


@triton.jit
def mark_unrepresentable(x, mark):
    """Set `mark` where one of the states `[*, *]`, float32, cannot be stored."""
    bad = tl.where(tl.abs(x) <= _LARGEST, 0, 1)
    tl.store(mark, 1, mask=tl.max(tl.max(bad, 1), 0) > 0)


@triton.jit
def token_shares(states, stride_t, order, TILE: tl.constexpr):
    """What the error of each token of a group of keys counts, `[G, 1]`, see `modules.codecs.grouped.token_shares`."""
    G: tl.constexpr = TILE.G
    WIDE: tl.constexpr = TILE.WIDE
    CHANNELS: tl.constexpr = WIDE if WIDE > 0 else TILE.D
    COLUMNS: tl.constexpr = TILE.COLUMNS
    token = tl.arange(0, G)
    weights = tl.full([G], 1.0, tl.float32)
    if TILE.METHOD == "lsq":
        distance = tl.zeros([G], tl.float32)
        for first in range(0, CHANNELS, COLUMNS):
            channel = first + tl.arange(0, COLUMNS)
            inside = channel < CHANNELS
            if WIDE > 0:
                channel = tl.load(order + channel, mask=inside, other=0).to(tl.int32)
            x = tl.load(states + token[:, None] * stride_t + channel[None, :], mask=inside[None, :], other=0.0)
            x = x.to(tl.float32)
            apart = x - (tl.sum(x, 0) * (1.0 / G))[None, :]
            distance += tl.sum(apart * apart, 1)
        distance /= tl.maximum(tl.sum(distance, 0) * (1.0 / G), _SMALLEST)
        cubed = distance * distance * distance
        weights += cubed / tl.maximum(tl.sum(cubed, 0) * (1.0 / G), _SMALLEST)
    return (weights / tl.sum(weights, 0))[:, None]


@triton.jit
def _fit_wide(x, shares, TILE: tl.constexpr):
    """Codes of wide channels `[G, N]`, int32, with their scale and minimum."""
    BITS: tl.constexpr = TILE.WIDE_BITS
    METHOD: tl.constexpr = TILE.METHOD
    METADATA: tl.constexpr = TILE.METADATA
    s, m = fit(x, shares, 0, BITS, METHOD, METADATA)
    return round_to_codes(x, s[None, :], m[None, :], BITS).to(tl.int32), s, m


@triton.jit
def pack_keys(states, stride_t, group, shares, mark, first_column, TILE: tl.constexpr):
    """One group of keys with its `token_shares`, bytes `first_column…` of each token.

    Wide channels are fitted with two bits more, the low ones of which do not go here, and come first in the order of the group's head.
    """
    G: tl.constexpr = TILE.G
    BITS: tl.constexpr = TILE.BITS
    METHOD: tl.constexpr = TILE.METHOD
    METADATA: tl.constexpr = TILE.METADATA
    WIDE: tl.constexpr = TILE.WIDE
    WIDTH: tl.constexpr = TILE.WIDTH
    COLUMNS: tl.constexpr = TILE.COLUMNS
    token = tl.arange(0, G)
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    packed = tl.zeros([G, COLUMNS], tl.int32)
    for plane in tl.static_range(8 // BITS):
        at = plane * WIDTH + column
        channel = at
        if WIDE > 0:
            channel = tl.load(group.order + at, mask=inside, other=0).to(tl.int32)
        x = tl.load(states + token[:, None] * stride_t + channel[None, :], mask=inside[None, :], other=0.0)
        x = x.to(tl.float32)  # [G, COLUMNS]
        mark_unrepresentable(x, mark)
        if (plane + 1) * WIDTH <= WIDE:
            fine, s, m = _fit_wide(x, shares, TILE)
            s, plane_codes = s * 4.0, fine >> 2
        else:
            s, m = fit(x, shares, 0, BITS, METHOD, METADATA)
            plane_codes = round_to_codes(x, s[None, :], m[None, :], BITS).to(tl.int32)
            if plane * WIDTH < WIDE:
                is_wide = at < WIDE
                fine, fine_s, fine_m = _fit_wide(x, shares, TILE)
                plane_codes = tl.where(is_wide[None, :], fine >> 2, plane_codes)
                s, m = tl.where(is_wide, fine_s * 4.0, s), tl.where(is_wide, fine_m, m)
        store_numbers(group, at, s, m, inside, BITS, METADATA)
        packed |= plane_codes << (BITS * plane)
    tl.store(group.codes + token[:, None] * WIDTH + column[None, :], packed.to(tl.uint8), mask=inside[None, :])


@triton.jit
def pack_low_bits(states, stride_t, group, shares, TILE: tl.constexpr):
    """The low two bits of the wide channels of one group of keys; a byte holds four neighbours."""
    G: tl.constexpr = TILE.G
    BYTES: tl.constexpr = TILE.WIDE // 4
    BYTES_PAD: tl.constexpr = TILE.WIDE_PAD // 4
    token = tl.arange(0, G)
    column = tl.arange(0, BYTES_PAD)
    inside = column < BYTES
    packed = tl.zeros([G, BYTES_PAD], tl.int32)
    for neighbour in tl.static_range(4):
        at = tl.load(group.order + 4 * column + neighbour, mask=inside, other=0)
        x = tl.load(states + token[:, None] * stride_t + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        codes, _, _ = _fit_wide(x, shares, TILE)
        packed |= (codes & 3) << (2 * neighbour)
    tl.store(group.extra + token[:, None] * BYTES + column[None, :], packed.to(tl.uint8), mask=inside[None, :])


@triton.jit
def pack_values(states, stride_t, tokens, mark, TILE: tl.constexpr):
    """`TOKENS` tokens of values into the packed parts `tokens`."""
    D: tl.constexpr = TILE.D
    G: tl.constexpr = TILE.G
    BITS: tl.constexpr = TILE.BITS
    METHOD: tl.constexpr = TILE.METHOD
    METADATA: tl.constexpr = TILE.METADATA
    WIDTH: tl.constexpr = TILE.WIDTH
    WIDTH_PAD: tl.constexpr = TILE.WIDTH_PAD
    TOKENS: tl.constexpr = TILE.TOKENS
    GROUPS: tl.constexpr = D // G
    token = tl.arange(0, TOKENS)
    channel = tl.arange(0, G)
    for group in tl.static_range(GROUPS):
        x = tl.load(states + token[:, None] * stride_t + group * G + channel[None, :]).to(tl.float32)  # [TOKENS, G]
        mark_unrepresentable(x, mark)
        s, m = fit(x, 1.0 / G, 1, BITS, METHOD, METADATA)
        store_numbers(tokens, token * GROUPS + group, s, m, None, BITS, METADATA)
    tl.debug_barrier()  # a plane may hold channels of several groups: their metadata is read back
    column = tl.arange(0, WIDTH_PAD)
    inside = (column < WIDTH)[None, :]
    packed = tl.zeros([TOKENS, WIDTH_PAD], tl.int32)
    for plane in tl.static_range(8 // BITS):
        at = plane * WIDTH + column
        meta = token[:, None] * GROUPS + (at // G)[None, :]
        y = tl.load(states + token[:, None] * stride_t + at[None, :], mask=inside, other=0.0).to(tl.float32)
        s_y, m_y = load_numbers(tokens, meta, inside, BITS, METADATA)
        packed |= round_to_codes(y, s_y, m_y, BITS).to(tl.int32) << (BITS * plane)
    tl.store(tokens.codes + token[:, None] * WIDTH + column[None, :], packed.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def pack_states(new, side, mark, heads, capacity, first_token, blocks, TILE: tl.constexpr):
    """Whole groups of `new` states `[b, H, T, D]` into packed tokens `first_token…` of `b` sequences.

    Grid: `COLUMN_BLOCKS` of keys (1 of values) for every block of tokens (a group of keys, `TOKENS` of values) for every
    head.
    """
    PARTS: tl.constexpr = TILE.COLUMN_BLOCKS if TILE.KEYS else 1
    BLOCK: tl.constexpr = TILE.G if TILE.KEYS else TILE.TOKENS
    part, program = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    block, head = program % blocks, program // blocks
    states = new.states + (head // heads).to(tl.int64) * new.stride_b + (head % heads).to(tl.int64) * new.stride_h
    states += block.to(tl.int64) * BLOCK * new.stride_t
    group = group_of_side(side, head.to(tl.int64) * capacity + first_token + block * BLOCK, head, TILE)
    if TILE.KEYS:
        shares = token_shares(states, new.stride_t, group.order, TILE)
        if part * TILE.COLUMNS < TILE.WIDTH:
            pack_keys(states, new.stride_t, group, shares, mark, part * TILE.COLUMNS, TILE)
        elif TILE.WIDE > 0:
            pack_low_bits(states, new.stride_t, group, shares, TILE)
    else:
        pack_values(states, new.stride_t, group, mark, TILE)


def pack_groups(side: PackedSide, rows: slice, start: int, states: torch.Tensor) -> None:
    """Quantize whole groups `[b, H, T, D]` into packed tokens `start…` of the sequences `rows` of `side`.

    The states must be finite and within float16, which `PackedLayer.check_states` has made sure of; the wide channels, if
    any, have been chosen.
    """
    batch, heads, tokens, _ = states.shape
    if not tokens:
        return
    tile = launch.pack_tile(side, tokens)
    blocks = tokens // (tile.G if tile.KEYS else tile.TOKENS)
    mark = torch.zeros(1, dtype=torch.int32, device=states.device)
    with torch.cuda.device_of(states):
        pack_states[launch.grid((tile.COLUMN_BLOCKS if tile.KEYS else 1) * blocks * batch * heads)](
            Rows.of(states),
            Side.of(side, rows),
            mark,
            heads,
            side.capacity,
            start,
            blocks,
            TILE=tile,
            **launch.OPTIONS,
        )
