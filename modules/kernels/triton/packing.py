"""Quantizing and packing on a GPU, in Triton: whole groups of a prompt, and the one token of a decode step.

The arithmetic is that of `modules.codecs.grouped` (`quantize_keys`, `quantize_values`), written straight into the cache's
buffers. `append_token` reads and advances the lengths on the device: it stores the token among the sinks or in the ring,
packs the oldest group where the window is full, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from modules.codecs.grouped import CLIPPED, FLOAT16_MAX, LSQ_ROUNDS, LSQ_START
from modules.options import FULL_PRECISION_BITS
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide

_LARGEST = tl.constexpr(FLOAT16_MAX)
_ROUNDS = tl.constexpr(LSQ_ROUNDS)
_START = tl.constexpr(LSQ_START)
_MARGIN = tl.constexpr((1 - CLIPPED) / 2)
_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it off rounds a small float32 to an integer
_COLUMNS = 16  # bytes of a token that are packed at a time
_TOKENS = 32  # tokens whose values are packed at a time
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # of every kernel for GPUs


@triton.jit
def _as_stored(x):
    """`x` as float16 will give it back."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _reciprocal(x):
    """`1 / x`, correctly rounded but for rare last bits: one Newton step behind the fast division, which calls nothing."""
    one = tl.full(x.shape, 1.0, tl.float32)
    near = one / x
    return tl.fma(near, tl.fma(-near, x, one), near)


@triton.jit
def _quotient(x, divisor, inverse):
    """`x / divisor`, rounded likewise, by the reciprocal of the divisor (Markstein, IBM J. Res. Dev. 34, 1990)."""
    near = x * inverse
    return tl.fma(tl.fma(-near, divisor, x), inverse, near)


@triton.jit
def _round_to_codes(x, scale, minimum, BITS: tl.constexpr):
    """Codes as float32: `round((x - minimum) / scale)` to even, within `0…2**BITS - 1`; one division a group."""
    safe = tl.where(scale > 0.0, scale, 1.0)
    inverse = tl.broadcast_to(_reciprocal(safe), x.shape)
    codes = _quotient(x - minimum, tl.broadcast_to(safe, x.shape), inverse)
    codes = tl.minimum(tl.maximum(codes, 0.0), (1 << BITS) - 1)
    return (codes + _HALF_EVEN) - _HALF_EVEN


@triton.jit
def _error(x, codes, scale, minimum, AXIS: tl.constexpr):
    difference = codes * scale + minimum - x
    return tl.sum(difference * difference, AXIS)


@triton.jit
def _fit(x, AXIS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, METHOD: tl.constexpr):
    """Scale and minimum of groups of `COUNT` along `AXIS` of `x`, float32 `[M, N]`, as `quantization._fit` finds them."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    low, high = tl.min(x, AXIS), tl.max(x, AXIS)
    if METHOD == "clipped":
        margin = (high - low) * _MARGIN
        low, high = low + margin, high - margin
    levels = tl.full(low.shape, LEVELS, tl.float32)
    best_scale = _as_stored(_quotient(high - low, levels, _reciprocal(levels)))
    best_minimum = _as_stored(low)
    if METHOD == "lsq":
        scale, minimum = tl.expand_dims(best_scale, AXIS), tl.expand_dims(best_minimum, AXIS)
        best_error = _error(x, _round_to_codes(x, scale, minimum, BITS), scale, minimum, AXIS)
        mean_x = tl.sum(x, AXIS) * (1.0 / COUNT)
        next_scale = _as_stored((high - low) * (_START / LEVELS))
        next_minimum = _as_stored((low + high) * 0.5 - (high - low) * (_START / 2))
        for _ in range(_ROUNDS):
            codes = _round_to_codes(x, tl.expand_dims(next_scale, AXIS), tl.expand_dims(next_minimum, AXIS), BITS)
            mean_c = tl.sum(codes, AXIS) * (1.0 / COUNT)
            centred = codes - tl.expand_dims(mean_c, AXIS)
            variance = tl.sum(centred * centred, AXIS)
            covariance = tl.sum(centred * (x - tl.expand_dims(mean_x, AXIS)), AXIS)
            variance = tl.maximum(variance, 1e-12)
            next_scale = _as_stored(_quotient(covariance, variance, _reciprocal(variance)))
            next_minimum = _as_stored(mean_x - next_scale * mean_c)
            wide_scale, wide_minimum = tl.expand_dims(next_scale, AXIS), tl.expand_dims(next_minimum, AXIS)
            error = _error(x, _round_to_codes(x, wide_scale, wide_minimum, BITS), wide_scale, wide_minimum, AXIS)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best_scale = tl.where(better, next_scale, best_scale)
            best_minimum = tl.where(better, next_minimum, best_minimum)
    return best_scale, best_minimum


@triton.jit
def _mark_unrepresentable(x, mark):
    bad = tl.where(tl.abs(x) <= _LARGEST, 0, 1)
    tl.store(mark, 1, mask=tl.max(tl.max(bad, 1), 0) > 0)


@triton.jit
def _high_bits(x, G: tl.constexpr, METHOD: tl.constexpr):
    """The high two bits of the codes of wide channels, with the scale they take, and their minimum."""
    s, m = _fit(x, 0, G, 4, METHOD)
    return s * 4.0, m, _round_to_codes(x, s[None, :], m[None, :], 4).to(tl.int32) >> 2


@triton.jit
def _pack_keys(
    states, stride_t, codes, scale, minimum, order, mark, first_column, D: tl.constexpr, G: tl.constexpr,
    BITS: tl.constexpr, METHOD: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One group of keys, bytes `first_column…` of each token; the pointers are those of the group's first row.

    With `WIDE` channels, they are stored in the `order` given and the first `WIDE` are fitted with 4 bits
    (`quantization.WIDE_BITS`), of which the high two go here.
    """
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = D // PLANES
    token = tl.arange(0, G)
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    packed = tl.zeros([G, COLUMNS], tl.int32)
    for plane in tl.static_range(PLANES):
        at = plane * WIDTH + column
        channel = at
        if WIDE > 0:
            channel = tl.load(order + at, mask=inside, other=0).to(tl.int32)
        x = tl.load(states + token[:, None] * stride_t + channel[None, :], mask=inside[None, :], other=0.0)
        x = x.to(tl.float32)
        _mark_unrepresentable(x, mark)
        if (plane + 1) * WIDTH <= WIDE:
            s, m, plane_codes = _high_bits(x, G, METHOD)
        else:
            s, m = _fit(x, 0, G, BITS, METHOD)
            plane_codes = _round_to_codes(x, s[None, :], m[None, :], BITS).to(tl.int32)
            if plane * WIDTH < WIDE:
                is_wide = at < WIDE
                fine_s, fine_m, fine = _high_bits(x, G, METHOD)
                plane_codes = tl.where(is_wide[None, :], fine, plane_codes)
                s, m = tl.where(is_wide, fine_s, s), tl.where(is_wide, fine_m, m)
        tl.store(scale + at, s.to(tl.float16), mask=inside)
        tl.store(minimum + at, m.to(tl.float16), mask=inside)
        packed |= plane_codes << (BITS * plane)
    tl.store(codes + token[:, None] * WIDTH + column[None, :], packed.to(tl.uint8), mask=inside[None, :])


@triton.jit
def _pack_extra(
    states, stride_t, extra, order, G: tl.constexpr, METHOD: tl.constexpr, WIDE: tl.constexpr, WIDE_PAD: tl.constexpr
):
    """The low two bits of the wide channels of one group, whose first row of bytes `extra` points to; a byte holds four
    neighbours."""
    WIDTH: tl.constexpr = WIDE // 4
    token = tl.arange(0, G)
    column = tl.arange(0, WIDE_PAD // 4)
    inside = column < WIDTH
    packed = tl.zeros([G, WIDE_PAD // 4], tl.int32)
    for neighbour in tl.static_range(4):
        at = tl.load(order + 4 * column + neighbour, mask=inside, other=0)
        x = tl.load(states + token[:, None] * stride_t + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        s, m = _fit(x, 0, G, 4, METHOD)
        packed |= (_round_to_codes(x, s[None, :], m[None, :], 4).to(tl.int32) & 3) << (2 * neighbour)
    tl.store(extra + token[:, None] * WIDTH + column[None, :], packed.to(tl.uint8), mask=inside[None, :])


@triton.jit
def _pack_values(
    states, stride_t, codes, scale, minimum, mark, D: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, METHOD: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """`TOKENS` tokens of values; the pointers are those of the first token's row."""
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = D // PLANES
    GROUPS: tl.constexpr = D // G
    token = tl.arange(0, TOKENS)
    channel = tl.arange(0, G)
    for group in tl.static_range(GROUPS):
        x = tl.load(states + token[:, None] * stride_t + group * G + channel[None, :]).to(tl.float32)
        _mark_unrepresentable(x, mark)
        s, m = _fit(x, 1, G, BITS, METHOD)
        tl.store(scale + token * GROUPS + group, s.to(tl.float16))
        tl.store(minimum + token * GROUPS + group, m.to(tl.float16))
    tl.debug_barrier()  # a plane may hold channels of several groups: their metadata is read back
    column = tl.arange(0, WIDTH_PAD)
    inside = (column < WIDTH)[None, :]
    packed = tl.zeros([TOKENS, WIDTH_PAD], tl.int32)
    for plane in tl.static_range(PLANES):
        at = plane * WIDTH + column
        meta = token[:, None] * GROUPS + (at // G)[None, :]
        y = tl.load(states + token[:, None] * stride_t + at[None, :], mask=inside, other=0.0).to(tl.float32)
        s_y = tl.load(scale + meta, mask=inside, other=1.0).to(tl.float32)
        m_y = tl.load(minimum + meta, mask=inside, other=0.0).to(tl.float32)
        packed |= _round_to_codes(y, s_y, m_y, BITS).to(tl.int32) << (BITS * plane)
    tl.store(codes + token[:, None] * WIDTH + column[None, :], packed.to(tl.uint8), mask=inside)


@triton.jit
def pack_states(
    states, codes, scale, minimum, extra, order, mark, heads, capacity, first_token, stride_b, stride_h, stride_t,
    KEYS: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, METHOD: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PAD: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Whole groups of `states`, `[b, H, T, D]`, into packed tokens `first_token…` of `b` sequences.

    Grid: keys (T / G, b * H, blocks of `COLUMNS` bytes and, with wide channels, one more), values (T / TOKENS, b * H, 1).
    """
    block, head = tl.program_id(0), tl.program_id(1)
    states += (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    token = head.to(tl.int64) * capacity + first_token
    if KEYS:
        token += block * G
        states += block.to(tl.int64) * G * stride_t
        row = token // G * D
        codes += token * (D * BITS // 8)
        order += head * D
        column = tl.program_id(2) * COLUMNS
        if column < D * BITS // 8:
            _pack_keys(
                states, stride_t, codes, scale + row, minimum + row, order, mark, column,
                D, G, BITS, METHOD, WIDE, COLUMNS,
            )  # fmt: skip
        elif WIDE > 0:
            _pack_extra(states, stride_t, extra + token * (WIDE // 4), order, G, METHOD, WIDE, WIDE_PAD)
    else:
        token += block * TOKENS
        states += block.to(tl.int64) * TOKENS * stride_t
        row = token * (D // G)
        codes += token * (D * BITS // 8)
        _pack_values(states, stride_t, codes, scale + row, minimum + row, mark, D, G, BITS, METHOD, TOKENS, WIDTH_PAD)


@triton.jit
def _append_side(
    new, sinks, window, codes, scale, minimum, extra, order, mark, head, length, packed, capacity,
    KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, G: tl.constexpr, VALUE_G: tl.constexpr, BITS: tl.constexpr,
    METHOD: tl.constexpr, WIDE: tl.constexpr, WIDE_PAD: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """One head of one side: store the token `new`, `[D]`, and pack a group if that fills the ring."""
    d = tl.arange(0, D_PAD)
    head64 = head.to(tl.int64)
    sinks += head64 * (SINK * D)
    window += head64 * (RING * D)
    x = tl.load(new + d, mask=d < D)
    behind = length - SINK  # the token's number after the sinks
    if behind < 0:
        tl.store(sinks + length * D + d, x, mask=d < D)
    else:
        tl.store(window + behind % RING * D + d, x, mask=d < D)
        if behind + 1 - packed >= RING:
            tl.debug_barrier()  # without a residual window the group holds the token just stored
            group = window + packed % RING * D
            token = head64 * capacity + packed
            if BITS == 16:
                rows = tl.arange(0, G)
                inside = (d < D)[None, :]
                y = tl.load(group + rows[:, None] * D + d[None, :], mask=inside)
                tl.store(codes + (token + rows[:, None]) * D + d[None, :], y, mask=inside)
            elif KEYS:
                row = token // G * D
                codes += token * (D * BITS // 8)
                order += head * D
                for column in range(0, D * BITS // 8, COLUMNS):
                    _pack_keys(
                        group, D, codes, scale + row, minimum + row, order, mark, column,
                        D, G, BITS, METHOD, WIDE, COLUMNS,
                    )  # fmt: skip
                if WIDE > 0:
                    _pack_extra(group, D, extra + token * (WIDE // 4), order, G, METHOD, WIDE, WIDE_PAD)
            else:
                for start in range(0, G, TOKENS):
                    at = token + start
                    meta = at * (D // VALUE_G)
                    _pack_values(
                        group + start * D, D, codes + at * (D * BITS // 8), scale + meta, minimum + meta, mark,
                        D, VALUE_G, BITS, METHOD, TOKENS, WIDTH_PAD,
                    )  # fmt: skip


@triton.jit
def append_step(
    key, value, k_sinks, k_window, k_codes, k_scale, k_minimum, v_sinks, v_window, v_codes, v_scale, v_minimum,
    extra, order, counts,
    sequences, heads, capacity, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
    D: tl.constexpr, D_PAD: tl.constexpr, G: tl.constexpr, VALUE_G: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, K_METHOD: tl.constexpr, V_METHOD: tl.constexpr, WIDE: tl.constexpr, WIDE_PAD: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, V_WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Store one token of every sequence. Grid: (sequences * heads, 2): keys and values.

    `counts` is int32 `[4, sequences]`: tokens stored, tokens packed, a mark of states beyond float16, and how many
    programs of this launch are done with the sequence; the last one advances the first two.
    """
    head, side = tl.program_id(0), tl.program_id(1)
    sequence = head // heads
    in_sequence = (head % heads).to(tl.int64)
    length = tl.load(counts + sequence)
    packed = tl.load(counts + sequences + sequence)
    mark = counts + 2 * sequences + sequence
    if side == 0:
        key += sequence.to(tl.int64) * k_stride_b + in_sequence * k_stride_h
        _append_side(
            key, k_sinks, k_window, k_codes, k_scale, k_minimum, extra, order, mark, head, length, packed, capacity,
            True, D, D_PAD, G, VALUE_G, K_BITS, K_METHOD, WIDE, WIDE_PAD, SINK, RING, COLUMNS, TOKENS, V_WIDTH_PAD,
        )  # fmt: skip
    else:
        value += sequence.to(tl.int64) * v_stride_b + in_sequence * v_stride_h
        _append_side(
            value, v_sinks, v_window, v_codes, v_scale, v_minimum, extra, order, mark, head, length, packed, capacity,
            False, D, D_PAD, G, VALUE_G, V_BITS, V_METHOD, 0, 4, SINK, RING, COLUMNS, TOKENS, V_WIDTH_PAD,
        )  # fmt: skip
    tl.debug_barrier()  # every warp has read the counts before this program says it is done
    done = tl.atomic_add(counts + 3 * sequences + sequence, 1)
    if done == 2 * heads - 1:
        tl.store(counts + 3 * sequences + sequence, 0)
        tl.store(counts + sequence, length + 1)
        tl.store(counts + sequences + sequence, tl.where(length + 1 - SINK - packed >= RING, packed + G, packed))


def tiles(head_dim: int, bits: int, tokens: int) -> dict[str, int]:
    """The tile sizes of the kernels here, by name, for `tokens` tokens; `bits` of 16 count as bytes of two."""
    width = head_dim * bits // 8
    return {
        "COLUMNS": min(_COLUMNS, triton.next_power_of_2(width)),
        "TOKENS": math.gcd(_TOKENS, tokens),
        "WIDTH_PAD": triton.next_power_of_2(width),
    }


def _wide(side: PackedSide) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """The low bits and the order of channels (any tensor without wide ones), and how many are wide."""
    if not side.wide:
        return side.codes, side.codes, {"WIDE": 0, "WIDE_PAD": 4}
    return side.extra, side.order, {"WIDE": side.wide, "WIDE_PAD": triton.next_power_of_2(side.wide)}


def pack_groups(side: PackedSide, rows: slice, start: int, states: torch.Tensor) -> None:
    """Quantize whole groups `[b, H, T, D]` into packed tokens `start…` of the sequences `rows` of `side`.

    The states must be finite and within float16, which `PackedLayer.check_states` has made sure of; the wide channels, if
    any, have been chosen.
    """
    batch, heads, tokens, head_dim = states.shape
    if not tokens:
        return
    states = states if states.stride(-1) == 1 else states.contiguous()
    tile = tiles(head_dim, side.bits, tokens)
    extra, order, wide_sizes = _wide(side)
    keys = side.what == "keys"
    if keys:
        blocks = -(-head_dim * side.bits // 8 // tile["COLUMNS"]) + (side.wide > 0)
        grid = (tokens // side.group_size, batch * heads, blocks)
    else:
        grid = (tokens // tile["TOKENS"], batch * heads, 1)
    mark = torch.zeros(1, dtype=torch.int32, device=states.device)
    with torch.cuda.device_of(states):
        pack_states[grid](
            states, side.codes[rows], side.scale[rows], side.minimum[rows], extra[rows], order[rows], mark,
            heads, side.capacity, start, *states.stride()[:3],
            KEYS=keys, D=head_dim, G=side.group_size, BITS=side.bits, METHOD=side.method, **wide_sizes, **tile, **LAUNCH_OPTIONS,
        )  # fmt: skip


def _can_append(layer: PackedLayer, new_lengths: list[int]) -> bool:
    """One token each, and no wide channels to choose, which the first group of a sequence decides on the host."""
    if any(new != 1 for new in new_lengths):
        return False
    choosing = any(not packed and layer.packs_at(row, 1) for row, packed in enumerate(layer.packed))
    return not layer.key.wide or not choosing


def append_token(layer: PackedLayer, key: torch.Tensor, value: torch.Tensor, new_lengths: list[int]) -> bool:
    """Store one token of every sequence, states `[B, H, 1, D]`; False, and nothing done, where that is not what is new.

    Advances `layer.counts`, not the lists. There must be room for the group that may be packed.

    Raises:
        ValueError: at the step that packs states beyond float16.
    """
    if key.shape[2] != 1 or not _can_append(layer, new_lengths):
        return False
    batch, heads, _, head_dim = key.shape
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    k, v = layer.key, layer.value
    parts = [t if t is not None else s.codes for s in (k, v) for t in (s.sinks, s.window, s.codes, s.scale, s.minimum)]
    extra, order, wide_sizes = _wide(k)
    k_tile, v_tile = (tiles(head_dim, side.bits, layer.group_size) for side in (k, v))
    with torch.cuda.device_of(key):
        append_step[(batch * heads, 2)](
            key, value, *parts, extra, order, layer.ledger.counts(key.device), batch, heads, k.capacity,
            *key.stride()[:2], *value.stride()[:2],
            D=head_dim, D_PAD=triton.next_power_of_2(head_dim), G=layer.group_size, VALUE_G=v.group_size,
            K_BITS=k.bits, V_BITS=v.bits, K_METHOD=k.method, V_METHOD=v.method, **wide_sizes,
            SINK=layer.sink_length, RING=layer.ring,
            COLUMNS=k_tile["COLUMNS"], TOKENS=v_tile["TOKENS"], V_WIDTH_PAD=v_tile["WIDTH_PAD"], **LAUNCH_OPTIONS,
        )  # fmt: skip
    filled = any(layer.packs_at(row, 1) for row in range(batch))
    if filled and not (key.is_cuda and torch.cuda.is_current_stream_capturing()):
        check_packed(layer)
    return True


def check_packed(layer: PackedLayer) -> None:
    """Raise `ValueError` where a decode step packed states that float16 metadata cannot hold. Waits for the device."""
    quantized = min(layer.key.bits, layer.value.bits) != FULL_PRECISION_BITS
    if quantized and layer.counts is not None and bool(layer.counts[2].any()):
        raise ValueError(
            f"states to quantize must be finite and at most {FLOAT16_MAX:.0f} in magnitude (their scale and minimum are "
            "float16); a decode step packed larger ones. Keep this side in full precision with bits 16, or look for the "
            "overflow upstream."
        )
