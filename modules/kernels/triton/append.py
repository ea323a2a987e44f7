"""The one token of a decode step, stored by a kernel that reads the lengths on the device.

It goes among the sinks or into the ring, and the oldest group is packed where it fills the window. Nothing waits for the
device or depends on a length on the host, so that the step can be captured in a CUDA graph; the ledger counts the token in
once all layers have stored theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from modules.kernels.triton import launch
from modules.kernels.triton.arguments import Rows, Side
from modules.kernels.triton.checks import check_new_tokens, check_room
from modules.kernels.triton.pack import (
    group_of_side,
    mark_unrepresentable,
    pack_keys,
    pack_low_bits,
    pack_values,
    token_shares,
)
from modules.store.layer import PackedLayer
from modules.store.ledger import LENGTH, MARK, PACKED
from modules.store.step import Step

_LENGTH = tl.constexpr(LENGTH)
_PACKED = tl.constexpr(PACKED)
_MARK = tl.constexpr(MARK)
_BLOCK = tl.constexpr(16)  # tokens, and channels, looked at together in choosing the wide channels


@triton.jit
def _costs(group, energy, channel, known, G: tl.constexpr, D: tl.constexpr):
    """What quantizing each channel of a group costs, the square of its range times the energy of the queries, where that is
    known; -1 beyond the head."""
    inside = channel < D
    token = tl.arange(0, _BLOCK)
    low = tl.full(channel.shape, float("inf"), tl.float32)
    high = tl.full(channel.shape, float("-inf"), tl.float32)
    for start in range(0, G, _BLOCK):
        at = (start + token)[:, None] * D + channel[None, :]
        x = tl.load(group + at, mask=inside[None, :], other=0.0).to(tl.float32)  # [_BLOCK, channels]
        low, high = tl.minimum(low, tl.min(x, 0)), tl.maximum(high, tl.max(x, 0))
    cost = (high - low) * (high - low)
    cost = tl.where(known, cost * tl.load(energy + channel, mask=inside, other=0.0), cost)
    return tl.where(inside, cost, -1.0)


@triton.jit
def _pair_costs(group, energy, channel, known, TILE: tl.constexpr):
    """`_costs`, of both channels of a pair that positions rotate together."""
    G: tl.constexpr = TILE.G
    D: tl.constexpr = TILE.D
    ROTARY: tl.constexpr = TILE.ROTARY
    cost = _costs(group, energy, channel, known, G, D)
    if ROTARY > 1:
        HALF: tl.constexpr = ROTARY // 2
        partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
        paired = channel < 2 * HALF
        partner = tl.where(paired, partner, channel)
        cost = tl.where(paired, cost + _costs(group, energy, partner, known, G, D), cost)
    return cost


@triton.jit
def _choose_order(group, energy, order, TILE: tl.constexpr):
    """`modules.codecs.grouped.choose_order` for the first group `[G, D]` of a head: of two equal costs the first channel's
    counts more."""
    D: tl.constexpr = TILE.D
    D_PAD: tl.constexpr = TILE.D_PAD
    WIDE: tl.constexpr = TILE.WIDE
    channel = tl.arange(0, D_PAD)
    known = tl.max(tl.load(energy + channel, mask=channel < D, other=0.0), 0) > 0.0
    cost = _pair_costs(group, energy, channel, known, TILE)
    rank = tl.zeros([D_PAD], tl.int32)
    for start in range(0, D, _BLOCK):
        other = start + tl.arange(0, _BLOCK)
        theirs = _pair_costs(group, energy, other, known, TILE)[None, :]
        first = (theirs > cost[:, None]) | ((theirs == cost[:, None]) & (other[None, :] < channel[:, None]))
        rank += tl.sum(first.to(tl.int32), 1)
    is_wide = (rank < WIDE) & (channel < D)
    wide = tl.cumsum(is_wide.to(tl.int32), 0)  # wide ones up to each channel
    tl.store(order + tl.where(is_wide, wide - 1, WIDE + channel - wide), channel.to(tl.int64), mask=channel < D)


@triton.jit
def _pack_group(states, group, energy, mark, packed, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Pack the group `[TOKENS, D]` of one head, choosing the wide channels where it is the sequence's first."""
    D: tl.constexpr = TILE.D
    D_PAD: tl.constexpr = TILE.D_PAD
    if TILE.BITS == 16:
        d = tl.arange(0, D_PAD)
        token = tl.arange(0, TOKENS)
        at = token[:, None] * D + d[None, :]
        x = tl.load(states + at, mask=(d < D)[None, :], other=0.0)
        if group.codes.dtype.element_ty == tl.int8:  # whole numbers, NaN where a state was not finite
            mark_unrepresentable(x.to(tl.float32), mark)
        tl.store(group.codes + at, x.to(group.codes.dtype.element_ty), mask=(d < D)[None, :])
    elif TILE.KEYS:
        if TILE.WIDE > 0:  # noqa: SIM102 - a constant: without wide channels the rest is not compiled
            if packed == 0:
                _choose_order(states, energy, group.order, TILE)
                tl.debug_barrier()  # packing reads the order
        shares = token_shares(states, D, group.order, TILE)
        if TILE.WIDE > 0:
            pack_low_bits(states, D, group, shares, TILE)
        for column in range(0, TILE.WIDTH, TILE.COLUMNS):
            pack_keys(states, D, group, shares, mark, column, TILE)
    else:
        for start in range(0, TOKENS, TILE.TOKENS):
            pack_values(states + start * D, D, group_of_side(group, start, 0, TILE), mark, TILE)


@triton.jit
def _append_side(
    new,
    side,
    energy,
    mark,
    head,
    length,
    packed,
    capacity,
    SINK: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head of one side: store the token `new`, `[D]`, and pack a group if that makes `WINDOW` unpacked ones."""
    D: tl.constexpr = TILE.D
    D_PAD: tl.constexpr = TILE.D_PAD
    d = tl.arange(0, D_PAD)
    head64 = head.to(tl.int64)
    window = side.window + head64 * (RING * D)
    x = tl.load(new + d, mask=d < D)
    behind = length - SINK  # the token's number after the sinks
    if behind < 0:
        tl.store(side.sinks + head64 * (SINK * D) + length * D + d, x, mask=d < D)
    else:
        tl.store(window + behind % RING * D + d, x, mask=d < D)
        if behind + 1 - packed >= WINDOW:
            tl.debug_barrier()  # without a residual window the group holds the token just stored
            group = group_of_side(side, head64 * capacity + packed, head, TILE)
            _pack_group(window + packed % RING * D, group, energy + head * D, mark, packed, TOKENS, TILE)


@triton.jit
def append_step(
    new_keys,
    new_values,
    keys,
    values,
    energy,
    counts,
    new_lengths,
    sequences,
    heads,
    capacity,
    SINK: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    ALL_NEW: tl.constexpr,
    K_TILE: tl.constexpr,
    V_TILE: tl.constexpr,
):
    """Store one token of every sequence that gets one. Grid: the heads of every sequence, keys and values.

    `counts` is that of `modules.store.ledger.Ledger.counts`, `energy` the layer's `query_energy`. A group has `TOKENS`
    tokens.
    """
    head, side = tl.program_id(0), tl.program_id(1)
    sequence = head // heads
    sequence64, in_sequence = sequence.to(tl.int64), (head % heads).to(tl.int64)
    length = tl.load(counts + _LENGTH * sequences + sequence)
    packed = tl.load(counts + _PACKED * sequences + sequence)
    mark = counts + _MARK * sequences + sequence
    count = 1 if ALL_NEW else tl.load(new_lengths + sequence)
    if count > 0:
        if side == 0:
            new = new_keys.states + sequence64 * new_keys.stride_b + in_sequence * new_keys.stride_h
            _append_side(new, keys, energy, mark, head, length, packed, capacity, SINK, RING, WINDOW, TOKENS, K_TILE)
        else:
            new = new_values.states + sequence64 * new_values.stride_b + in_sequence * new_values.stride_h
            _append_side(new, values, energy, mark, head, length, packed, capacity, SINK, RING, WINDOW, TOKENS, V_TILE)


def append_token(layer: PackedLayer, key: torch.Tensor, value: torch.Tensor, step: Step) -> bool:
    """Store one token of every sequence that gets one, states `[B, H, 1, D]`; False, and nothing done, for other steps.

    There must be room for the group that may be packed. States beyond float16 that a group holds are stored as they come
    out, and the ledger's counts are marked.

    Raises:
        ValueError: for states whose shapes, dtypes or devices do not fit the layer, and where there is no room.
    """
    if step.length != 1:
        return False
    check_new_tokens(layer, key, value, step)
    check_room(layer, step)
    batch, heads, _, _ = key.shape
    device, group_size = key.device, layer.group_size
    counts = layer.ledger.counts(device)
    with torch.cuda.device_of(key):
        append_step[launch.grid(batch * heads, 2)](
            Rows.of(key),
            Rows.of(value),
            Side.of(layer.key),
            Side.of(layer.value),
            counts if layer.query_energy is None else layer.query_energy.contiguous(),
            counts,
            counts if step.all_real else step.lengths_on(device),
            batch,
            heads,
            layer.key.capacity,
            SINK=layer.sink_length,
            RING=layer.ring,
            WINDOW=layer.ledger.geometry.window,
            TOKENS=group_size,
            ALL_NEW=step.all_real,
            K_TILE=launch.pack_tile(layer.key, group_size),
            V_TILE=launch.pack_tile(layer.value, group_size),
            **launch.OPTIONS,
        )
    return True
