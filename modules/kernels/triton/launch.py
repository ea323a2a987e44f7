"""What kernels are compiled for and launched with: tiles, stages, warps, registers, grids. All of it stands here.

Numbers of tables come from compiled kernels (`benchmarks/compile_report.py`): the most that does not spill registers. What was
found faster on a GPU is in `modules.kernels.triton.tuning`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton

from modules.codecs.grouped import LOW_BITS
from modules.codecs.kivi import EIGHT_BIT_METADATA
from modules.options import FULL_PRECISION_BITS
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # of every kernel
FEW_ROWS = 8  # query rows of a program; more than that many take 16
COMBINED = 16  # splits merged at a time
HEADS_OF_16_ROWS = (64, 128)  # head_dims at which 16 query rows fit the registers
KEY_SEGMENTS = (32, 48, 16)  # bytes of a token in one product, the first that divides them
PIPELINES = ((3, 64), (2, 64), (2, 32), (1, 32))  # stages, tokens a warp handles at a time; the first that fits
WIDE_PIPELINE_OF_16_ROWS = (3, 32)
CROWDED_PIPELINE = (2, 32)  # of heads that leave few registers, and of int8 that is converted there
MOST_REGISTERS = {8: 255, 16: None}  # by query rows, see `attention_options`
BLOCK_AT_ONCE = 32  # tokens of a block where they are packed one by one
FULL_SEGMENT = 32  # channels of a full-precision tile where a whole head would spill
LEAST_SEGMENT = 16  # the same where 32 would
LEAST_TOKENS = 16  # of a block: the least a product takes
MOST_TOKENS = 32  # of a block
PACK_BYTES = 16  # of a token that are packed at a time
PACK_TOKENS = 32  # whose values are packed at a time
MOST_SPLITS = 128
PROGRAMS_PER_PROCESSOR = 2  # what registers and shared memory allow
LEAST_SPLIT_STEPS = 2  # a split of fewer steps costs more to merge than it saves
SHARED_H100 = 233472  # bytes of shared memory of a multiprocessor, where no device says otherwise
_LEAST_SHARED = 102400  # of the consumer chips; PyTorch before 2.6 does not tell
_PROCESSORS_WITHOUT_A_GPU = 2


class Shape(NamedTuple):
    """What decides how attention is compiled: everything but the numbers of sequences and tokens.

    Bits are 16 where packed tokens are rows of numbers: states, or `static` codes.
    """

    head_dim: int
    group_size: int
    k_bits: int
    v_bits: int
    kv_heads: int
    group: int  # query heads a KV head
    sink_length: int
    ring: int
    value_group_size: int
    wide: int = 0  # key channels with two bits more
    static: bool = False  # the numbers of the rows are int8
    at_once: bool = False  # tokens are packed one by one, so that the last block may be cut
    k_small_metadata: bool = False  # scales have 8 bits
    v_small_metadata: bool = False  # scales and minima have

    @classmethod
    def of(cls, layer: PackedLayer, heads: int) -> Shape:
        """The shape of attention with `heads` query heads over `layer`."""
        _, kv_heads, _, head_dim = layer.key.window.shape
        at_once = layer.ledger.geometry.at_once
        return cls(
            head_dim=head_dim,
            group_size=BLOCK_AT_ONCE if at_once else layer.group_size,
            k_bits=_bits(layer.key),
            v_bits=_bits(layer.value),
            kv_heads=kv_heads,
            group=heads // kv_heads,
            sink_length=layer.sink_length,
            ring=layer.ring,
            value_group_size=BLOCK_AT_ONCE if at_once else layer.value.group_size,
            wide=layer.key.wide,
            static=layer.scales is not None,
            at_once=at_once,
            k_small_metadata=_small_metadata(layer.key),
            v_small_metadata=_small_metadata(layer.value),
        )


def _bits(side: PackedSide) -> int:
    return side.bits if side.grouped else FULL_PRECISION_BITS


def _small_metadata(side: PackedSide) -> bool:
    return side.codec.layout == EIGHT_BIT_METADATA


class Pipeline(NamedTuple):
    """How programs walk over packed tokens; another one gives the same attention, in another time."""

    stages: int  # of the pipeline that fetches codes ahead
    tokens: int  # that a warp handles at a time
    warps: int  # of a program
    programs: int  # that run side by side on a multiprocessor: the splits are as many as fill the device with them


# Kernels give the constants they use a name of their own: Triton 3.6 takes no field of a tuple where it wants a constant.
class AttentionTile(NamedTuple):
    """The constants `attend_splits` is compiled for; "width" is bytes a token, or elements at 16 bits."""

    D: int  # channels of a head
    D_PAD: int  # the same, as a power of two, as are all `_PAD`
    KV_HEADS: int
    GROUP: int  # query heads a KV head
    G: int  # tokens of a group of keys
    SINK: int
    RING: int
    N: int  # query rows of a program
    T: int  # tokens of a block
    U: int  # blocks a warp handles a step
    WARPS: int
    BATCH: int  # blocks of a step, U * WARPS
    STAGES: int  # of the pipeline that fetches codes ahead
    K_BITS: int
    K_WIDTH: int
    K_SEG: int  # of the width, in one product
    K_FOLD: int  # planes in one product
    K_USED: int  # channels in one product, K_SEG * K_FOLD
    K_USED_PAD: int
    K_SEGS: int
    K_PLANES: int  # products of a segment
    WIDE: int  # channels with two bits more
    WIDE_PAD: int
    V_BITS: int
    VALUE_G: int  # channels of a group of values
    V_GROUPS: int
    V_WIDTH: int
    V_SEG: int
    V_FOLD: int
    V_COLS: int  # rows of one product: pairs of bytes, or elements, padded
    V_SEGS: int
    V_PLANES: int
    V_PARTS: int  # bytes of an int16, 1 at 16 bits
    V_PRODUCTS: int  # of all segments, planes and parts
    META_PER_WORD: int  # scales of values read as one integer, and minima of 8 bits
    K_SMALL_METADATA: bool
    V_SMALL_METADATA: bool
    EARLY_MINIMA: bool  # of values, loaded before the codes, where that spills fewer registers
    AT_ONCE: bool  # the last block may be cut
    FULL_SEG: int  # channels of a full-precision tile
    FULL_T: int  # tokens of one
    ASM: bool  # with inline assembly, which the interpreter cannot run


class PackTile(NamedTuple):
    """The constants of one side that packing is compiled for."""

    KEYS: bool
    D: int
    D_PAD: int
    G: int  # tokens (keys) or channels (values) of a group
    BITS: int
    WIDTH: int  # bytes a token, or elements at 16 bits
    WIDTH_PAD: int
    METHOD: str
    METADATA: str  # "float16", "8-bit keys" or "8-bit values"
    WIDE: int
    WIDE_PAD: int
    WIDE_BITS: int
    ROTARY: int  # channels that positions rotate in pairs
    COLUMNS: int  # bytes of a token of keys that a program packs at a time
    COLUMN_BLOCKS: int  # of them, and one for the low bits of wide channels
    TOKENS: int  # tokens of values that a program packs at a time


def query_rows(shape: Shape, many_rows: bool, item: int) -> int:
    """Query rows of a program: 16 where there are more than `FEW_ROWS` and the registers hold them."""
    return 16 if many_rows and shape.head_dim in HEADS_OF_16_ROWS and item == 2 else FEW_ROWS


@functools.cache
def default_pipeline(shape: Shape, many_rows: bool, item: int = 2, shared: int = SHARED_H100) -> Pipeline:
    """What nobody had to measure: the first of `PIPELINES` of which two programs fit `shared` bytes; args as `attention_tile`'s.

    All buffers but one are filled ahead. A token takes its codes, its share of the key metadata, and of the value metadata 2
    bytes a group and, but for minima of 8 bits, a row of 16; operands on their way take 20 bytes a channel and query row, and
    72 more a wide channel. Heads padded to a power of two, 16 query rows, wide channels and int8 leave fewer registers, the
    widest heads only for one block at a time.
    """
    d, g, k_bits, v_bits = shape[:4]
    n, warps = query_rows(shape, many_rows, item), OPTIONS["num_warps"]
    of_rows = 8 if shape.static else 8 * item
    stored_bits = sum(of_rows if bits == FULL_PRECISION_BITS else bits for bits in (k_bits, v_bits))
    key_metadata, minima = 3 if shape.k_small_metadata else 4, 0 if shape.v_small_metadata else 32
    token = d * stored_bits // 8 + key_metadata * d // g + 2 * d // shape.value_group_size + minima + shape.wide
    for stages, tokens in PIPELINES:
        if warps * tokens * token * max(0, stages - 1) + (20 * d + 72 * shape.wide) * n <= shared // 2 - 1024:
            break
    if n > FEW_ROWS:
        stages, tokens = WIDE_PIPELINE_OF_16_ROWS if shape.wide else (min(stages, 2), tokens)
    padded = d != triton.next_power_of_2(d)
    if padded or shape.static or (d == 256 and (k_bits, v_bits) != (2, 2)):
        stages, tokens = CROWDED_PIPELINE
    if padded and 4 in (k_bits, v_bits):
        tokens = LEAST_TOKENS
    return Pipeline(stages, tokens, warps, PROGRAMS_PER_PROCESSOR)


def _is_widest(shape: Shape) -> bool:
    """Whether wide channels of the widest heads take their last registers."""
    return shape.head_dim == 256 and shape.k_bits == 4 and shape.wide > 0


def _full_segment(head_dim: int, k_bits: int, item: int) -> int:
    """Channels of a full-precision tile: a power of two, the whole head where that does not spill."""
    if item == 4:
        return LEAST_SEGMENT if head_dim in (96, 256) else head_dim
    crowded = head_dim == 256 and k_bits in (4, 8)
    return FULL_SEGMENT if crowded or head_dim in (64, 96) else head_dim


@functools.cache
def attention_tile(shape: Shape, many_rows: bool, pipeline: Pipeline, item: int = 2, asm: bool = True) -> AttentionTile:
    """The tile of `attend_splits`.

    Args:
        shape: what the kernel is compiled for.
        many_rows: more than `FEW_ROWS` query rows a KV head, that is new tokens times `shape.group`.
        pipeline: `default_pipeline`'s or a tuned one.
        item: bytes of a number of the states.
        asm: with inline assembly.
    """
    d, g, k_bits, v_bits = shape[:4]
    value_g, warps = shape.value_group_size, pipeline.warps
    k_width, v_width = d * min(k_bits, 8) // 8, d * min(v_bits, 8) // 8
    k_seg = next((seg for seg in KEY_SEGMENTS if k_width % seg == 0), k_width)
    # Planes of 16 bytes (2 bits, 64 channels) fill half a tile: two go into one product.
    k_fold, v_fold = (2 if width == 16 else 1 for width in (k_width, v_width))
    if v_bits == FULL_PRECISION_BITS:
        v_seg = v_columns = 32
    else:
        v_seg = value_g if v_width % value_g == 0 and v_fold == 1 else v_width
        v_columns = max(16, triton.next_power_of_2(v_seg // 2))
    n = query_rows(shape, many_rows, item)
    v_segs, v_planes = v_width // v_seg, d // v_width // v_fold
    v_parts = 1 if v_bits == FULL_PRECISION_BITS else 2
    block_tokens = min(g, pipeline.tokens, MOST_TOKENS)
    blocks = pipeline.tokens // block_tokens
    return AttentionTile(
        D=d,
        D_PAD=triton.next_power_of_2(d),
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        G=g,
        SINK=shape.sink_length,
        RING=shape.ring,
        N=n,
        T=block_tokens,
        U=blocks,
        WARPS=warps,
        BATCH=blocks * warps,
        STAGES=pipeline.stages,
        K_BITS=k_bits,
        K_WIDTH=k_width,
        K_SEG=k_seg,
        K_FOLD=k_fold,
        K_USED=k_seg * k_fold,
        K_USED_PAD=triton.next_power_of_2(k_seg * k_fold),
        K_SEGS=k_width // k_seg,
        K_PLANES=d // k_width // k_fold,
        WIDE=shape.wide,
        WIDE_PAD=max(16, triton.next_power_of_2(shape.wide)),
        V_BITS=v_bits,
        VALUE_G=value_g,
        V_GROUPS=d // value_g,
        V_WIDTH=v_width,
        V_SEG=v_seg,
        V_FOLD=v_fold,
        V_COLS=v_columns,
        V_SEGS=v_segs,
        V_PLANES=v_planes,
        V_PARTS=v_parts,
        V_PRODUCTS=v_segs * v_planes * v_parts,
        META_PER_WORD=math.gcd(8 if shape.v_small_metadata else 4, d // value_g),
        K_SMALL_METADATA=shape.k_small_metadata,
        V_SMALL_METADATA=shape.v_small_metadata,
        EARLY_MINIMA=n > FEW_ROWS or _is_widest(shape),
        AT_ONCE=shape.at_once,
        FULL_SEG=LEAST_SEGMENT if _is_widest(shape) else _full_segment(d, k_bits, item),
        FULL_T=LEAST_TOKENS,
        ASM=asm,
    )


def attention_options(tile: AttentionTile) -> dict[str, int | bool | None]:
    """What the compiler is told of `attend_splits` beside its tile.

    Without a limit on the registers it spills some to fit a third program on a multiprocessor, which the shared memory has
    no room for; at 16 query rows, with heads of 256 at 4 and 8 bits, and in float32 where registers are scarce, it is
    the limit that spills some.
    """
    crowded = (tile.D == 256 and min(tile.K_BITS, tile.V_BITS) >= 4) or tile.FULL_SEG == LEAST_SEGMENT
    return OPTIONS | {"num_warps": tile.WARPS, "maxnreg": None if crowded else MOST_REGISTERS[tile.N]}


def pack_tile(side: PackedSide, tokens: int) -> PackTile:
    """The tile that packs groups of `side`, `tokens` tokens of values in blocks of equal size."""
    head_dim, block = side.window.shape[3], math.gcd(PACK_TOKENS, tokens)
    how = side.group_size, _bits(side), side.method, side.wide, block, side.codec.rotary, _small_metadata(side)
    return pack_tile_of(side.what == "keys", head_dim, *how)


@functools.cache
def pack_tile_of(
    keys: bool,
    head_dim: int,
    group_size: int,
    bits: int,
    method: str,
    wide: int = 0,
    tokens: int = PACK_TOKENS,
    rotary: int = 0,
    small_metadata: bool = False,
) -> PackTile:
    """The same from numbers; `tokens` of values are packed at a time."""
    small = "8-bit keys" if keys else "8-bit values"
    width = head_dim * min(bits, 8) // 8
    columns = min(PACK_BYTES, triton.next_power_of_2(width))
    return PackTile(
        KEYS=keys,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        G=group_size,
        BITS=bits,
        WIDTH=width,
        WIDTH_PAD=triton.next_power_of_2(width),
        METHOD=method,
        METADATA=small if small_metadata else "float16",
        WIDE=wide,
        WIDE_PAD=max(4, triton.next_power_of_2(wide)),
        WIDE_BITS=bits + LOW_BITS,
        ROTARY=rotary,
        COLUMNS=columns,
        COLUMN_BLOCKS=-(-width // columns) + (wide > 0),
        TOKENS=tokens,
    )


def grid(programs: int, others: int = 1) -> tuple[int, int]:
    """A grid of `programs`, which grow with new tokens and sequences, by `others`, which do not.

    CUDA allows 2³¹ - 1 programs in the first dimension of a grid and 65,535 in the second.
    """
    return programs, others


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor."""
    if device.type != "cuda":
        return SHARED_H100
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", _LEAST_SHARED)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_A_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def number_of_splits(
    device: torch.device, programs: int, capacity: int, tile: AttentionTile, side_by_side: int = PROGRAMS_PER_PROCESSOR
) -> int:
    """Splits that fill the device once, whatever the lengths: from the capacity, which the host knows.

    Args:
        programs: that attend to each split.
        side_by_side: how many of a multiprocessor run at a time.
    """
    most = min(MOST_SPLITS, -(-capacity // (tile.BATCH * tile.T * LEAST_SPLIT_STEPS)))
    return max(min(1, most), min(most, processors(device) * side_by_side // programs))
