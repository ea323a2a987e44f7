"""Attention of new tokens over one packed layer on a GPU, in Triton: one launch over splits of the tokens, one to combine.

Nothing is ever dequantized. With the metadata folded into the small operands,

- scores of a group of tokens: `q·k = (q∘scale)·code + q·minimum`,
- output: `Σ p v = Σ (p·scale) code + Σ p·minimum`,

and a code enters the tensor cores as it lies in memory, see `modules.kernels.triton.codes`. Lengths are read from device
tensors: nothing here waits for the device or branches on a length on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from modules.kernels.triton import launch, tuning
from modules.kernels.triton.arguments import Rows, Side
from modules.kernels.triton.checks import check_new_tokens, check_query
from modules.kernels.triton.combine import combine_splits
from modules.kernels.triton.full import attend_full
from modules.kernels.triton.packed import attend_packed
from modules.kernels.triton.queries import query_rows
from modules.kernels.triton.softmax import Partial
from modules.store.layer import PackedLayer
from modules.store.ledger import LENGTH, PACKED
from modules.store.side import PackedSide
from modules.store.step import Step

LOG2_E = 1.4426950408889634
FORCE_PLAIN = False  # for tests: no inline assembly on a GPU either
_LENGTH = tl.constexpr(LENGTH)
_PACKED = tl.constexpr(PACKED)


@triton.jit
def _new_of_head(new, sequence, kv_head):
    """The new keys or values of one head."""
    first = sequence.to(tl.int64) * new.stride_b + kv_head * new.stride_h
    return Rows(new.states + first, new.stride_b, new.stride_h, new.stride_t)


@triton.jit
def _keys_of_head(side, head, capacity, TILE: tl.constexpr):
    """The stored keys of one head, scales of 8 bits as words."""
    D: tl.constexpr = TILE.D
    head64 = head.to(tl.int64)
    token = head64 * capacity
    row = token // TILE.G * D
    return Side(
        codes=side.codes + token * TILE.K_WIDTH,
        scale=side.scale + (row // 4 if TILE.K_SMALL_METADATA else row),
        minimum=side.minimum + row,
        extra=side.extra + token * (TILE.WIDE // 4),
        order=side.order + head64 * D,
        sinks=side.sinks + head64 * (TILE.SINK * D),
        window=side.window + head64 * (TILE.RING * D),
    )


@triton.jit
def _values_of_head(side, head, capacity, TILE: tl.constexpr):
    """The stored values of one head, codes as pairs of bytes, scales and minima of 8 bits as words."""
    D: tl.constexpr = TILE.D
    WORDS: tl.constexpr = TILE.V_GROUPS // TILE.META_PER_WORD
    MINIMA: tl.constexpr = WORDS if TILE.V_SMALL_METADATA else TILE.V_GROUPS
    head64 = head.to(tl.int64)
    token = head64 * capacity
    return Side(
        codes=side.codes + token * (TILE.V_WIDTH // TILE.V_PARTS),
        scale=side.scale + token * WORDS,
        minimum=side.minimum + token * MINIMA,
        extra=side.extra,
        order=side.order,
        sinks=side.sinks + head64 * (TILE.SINK * D),
        window=side.window + head64 * (TILE.RING * D),
    )


# Numbers that change as a cache grows: one compilation serves all, so that no later step waits for another.
@triton.jit(do_not_specialize=["splits", "row_blocks"])
def attend_splits(
    query,
    new_keys,
    new_values,
    keys,
    values,
    counts,
    new_lengths,
    partial,
    factor,
    sequences,
    capacity,
    new_tokens,
    splits,
    row_blocks,
    ALL_NEW: tl.constexpr,
    TILE: tl.constexpr,
):
    """One split of the tokens of one KV head and one block of query rows; split 0 has the full-precision tokens.

    Grid: row blocks of the KV heads of every sequence, splits + 1.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row_block, head = block % row_blocks, block // row_blocks
    sequence, kv_head = head // TILE.KV_HEADS, head % TILE.KV_HEADS
    packed = tl.load(counts + _PACKED * sequences + sequence)
    rows = query_rows(query, sequence, kv_head, row_block, new_tokens, TILE)
    out_at = block * (splits + 1) + split
    if split == 0:
        attend_full(
            rows,
            _keys_of_head(keys, head, capacity, TILE),
            _values_of_head(values, head, capacity, TILE),
            _new_of_head(new_keys, sequence, kv_head),
            _new_of_head(new_values, sequence, kv_head),
            partial,
            out_at,
            tl.load(counts + _LENGTH * sequences + sequence),
            packed,
            new_tokens if ALL_NEW else tl.load(new_lengths + sequence),
            factor,
            TILE,
        )
    else:
        steps = tl.cdiv(packed, TILE.BATCH * TILE.T)
        share = tl.cdiv(steps, splits)
        first = (split - 1) * share
        attend_packed(
            rows,
            _keys_of_head(keys, head, capacity, TILE),
            _values_of_head(values, head, capacity, TILE),
            partial,
            out_at,
            packed,
            first,
            tl.minimum(first + share, steps),
            factor,
            TILE,
        )


def _words(metadata: torch.Tensor, per_word: int) -> torch.Tensor:
    """Metadata read as integers of `per_word` entries."""
    size = metadata.element_size() * per_word
    return metadata.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def _keys(side: PackedSide, tile: launch.AttentionTile) -> Side:
    """The tensors of the keys as the kernel reads them."""
    tensors = Side.of(side)
    return tensors._replace(scale=_words(side.scale, 4)) if tile.K_SMALL_METADATA else tensors


def _values(side: PackedSide, tile: launch.AttentionTile) -> Side:
    """The tensors of the values as the kernel reads them."""
    tensors = Side.of(side)
    if not side.grouped:
        return tensors
    minimum = _words(side.minimum, tile.META_PER_WORD) if tile.V_SMALL_METADATA else side.minimum
    return tensors._replace(
        codes=side.codes.view(torch.int16), scale=_words(side.scale, tile.META_PER_WORD), minimum=minimum
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PackedLayer,
    scaling: float,
    step: Step,
    splits: int | None = None,
    pipeline: launch.Pipeline | None = None,
) -> torch.Tensor:
    """Attention of new tokens over a layer on a GPU; its lengths are read on the device.

    Args and result are those of `modules.kernels.backend.Backend.attend`, and

        splits: parts the packed tokens are attended in, side by side; None chooses by device and capacity.
        pipeline: how programs walk over them; None: as tuned for the device, else the default.

    Raises:
        ValueError: for tensors whose shapes, dtypes or devices do not fit the layer.
    """
    check_new_tokens(layer, key, value, step)
    check_query(layer, query, step)
    batch, heads, new_tokens, head_dim = query.shape
    device, shape = query.device, launch.Shape.of(layer, heads)
    rows = new_tokens * shape.group
    many_rows, item = rows > launch.FEW_ROWS, query.element_size()
    if pipeline is None:
        pipeline = tuning.pipeline(device, shape, many_rows, item)
    tile = launch.attention_tile(shape, many_rows, pipeline, item, query.is_cuda and not FORCE_PLAIN)
    row_blocks, all_heads = -(-rows // tile.N), batch * shape.kv_heads
    programs = all_heads * row_blocks
    if splits is None:
        splits = launch.number_of_splits(device, programs, layer.key.capacity, tile, pipeline.programs)
    counts = layer.ledger.counts(device)
    new_lengths = counts if step.all_real else step.lengths_on(device)
    # Two numbers a row beside the sums, in one buffer.
    size = programs * (splits + 1) * tile.N
    scratch = torch.empty(size * (head_dim + 2), dtype=torch.float32, device=device)
    partial = Partial(scratch[: size * head_dim], scratch[size * head_dim :])
    out = torch.empty(batch, new_tokens, heads, head_dim, dtype=query.dtype, device=device)
    with torch.cuda.device_of(query):
        attend_splits[launch.grid(programs, splits + 1)](
            Rows.of(query),
            Rows.of(key),
            Rows.of(value),
            _keys(layer.key, tile),
            _values(layer.value, tile),
            counts,
            new_lengths,
            partial,
            scaling * LOG2_E,
            batch,
            layer.key.capacity,
            new_tokens,
            splits,
            row_blocks,
            ALL_NEW=step.all_real,
            TILE=tile,
            **launch.attention_options(tile),
        )
        combine_splits[launch.grid(rows * all_heads)](
            partial,
            new_lengths,
            out,
            splits + 1,
            row_blocks,
            new_tokens,
            D=head_dim,
            D_PAD=tile.D_PAD,
            N=tile.N,
            KV_HEADS=shape.kv_heads,
            GROUP=shape.group,
            ALL_NEW=step.all_real,
            PARTS=launch.COMBINED,
            **launch.OPTIONS,
        )
    return out
