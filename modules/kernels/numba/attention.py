"""Attention over a packed layer on the CPU, compiled by Numba: several new tokens, or one that is stored by the same call.

The shapes of the inner loops are constants of a `Plan`, so that one plan is one compilation. A model needs one plan for
decoding and one more for several new tokens.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref

import torch

from modules.codecs.full_precision import FULL_PRECISION
from modules.codecs.kivi import EIGHT_BIT_METADATA
from modules.codecs.static_codec import STATIC
from modules.kernels.checks import check_layer, check_new_states
from modules.kernels.numba import packing
from modules.kernels.numba.compiling import Kernel, compiled
from modules.kernels.numba.control import DENSE_TILES, attention
from modules.kernels.numba.fields import AttentionFields
from modules.kernels.numba.host import FLOAT_NAMES, host_is_supported
from modules.kernels.numba.plan import MAX_ROWS, Plan, plan_of
from modules.kernels.numba.threads import allowed_threads, buffer, check_pool, run
from modules.kernels.reference.attention import attend as attend_in_torch
from modules.kernels.reference.rebuilt import attend as attend_rebuilt
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step

_MANY_TOKENS = 1 << 10  # new ones from which on it is faster to rebuild keys and values
_LOG2_E = math.log2(math.e)
_SERIAL_WORK = 1 << 21  # multiply-adds below which starting threads costs more than it saves


def why_not(layer: PackedLayer) -> str | None:
    """What keeps the kernels from attending over `layer`; None where nothing does."""
    if not host_is_supported():
        return "this CPU does not convert float16"
    window = layer.key.window
    if window.dtype not in FLOAT_NAMES:
        return f"its kernels know float32, bfloat16 and float16, and the model has {window.dtype}"
    if _plan(layer, rows=1) is None:  # which asks for the longest vectors
        return (
            f"its kernels take no head_dim={window.shape[-1]} in groups of {layer.group_size} tokens and "
            f"{layer.value.group_size} channels"
        )
    return None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PackedLayer,
    scaling: float,
    step: Step,
) -> torch.Tensor:
    """Attention of new tokens over a layer on the CPU.

    Args and result are those of `modules.kernels.backend.Backend.attend`; states are float32, bfloat16 or float16.

    Raises:
        ValueError: for states that do not fit the layer.
    """
    check_new_states(query, key, value, layer, step)
    check_layer(layer)
    if query.shape[2] >= _MANY_TOKENS:
        return attend_rebuilt(query, key, value, layer, scaling, step)
    plan = _plan(layer, _rows(query, key))
    if plan is None:
        return attend_in_torch(query, key, value, layer, scaling, step)
    query = query if query.stride(3) == 1 else query.contiguous()
    key, value = (t if _tokens_lie_side_by_side(t) else t.contiguous() for t in (key, value))
    call = _Call(plan, query, key, value, layer)
    return call.run(query, key, value, layer, scaling, step.lengths)


def decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer, scaling: float
) -> torch.Tensor | None:
    """One new token of every sequence, see `modules.kernels.backend.Backend.decode`.

    Attention and what is kept in full precision are one call, which no operation of torch follows in most steps. Sequences
    whose window is full then have a group packed, straight from the ring.

    Returns:
        `[B, 1, num_attention_heads, D]`; None for a layout the kernel does not know, and then nothing has been done.

    Raises:
        ValueError: for states that do not fit the layer, and for NaN, infinite or too large ones; nothing is stored then.
    """
    at_once = layer.ledger.geometry.at_once
    if at_once and max(layer.packed) >= layer.key.capacity:
        _make_room(layer)  # the call itself stores behind what is packed
    memory = _memory(query, key, value, layer)
    bound = _decoding.get(layer)
    if bound is None or bound[0] != memory:
        check_new_states(query, key, value, layer, Step(1, counted=[1] * query.shape[0]))
        check_layer(layer)
        plan = _plan(layer, _rows(query, key))
        if plan is None or any(t.stride(3) != 1 for t in (query, key, value)):
            return None
        bound = _decoding[layer] = memory, _Call(plan, query, key, value, layer, stores=True)
    call = bound[1]
    out = call.run(query, key, value, layer, scaling, call.one_each)
    layer.key.check_magnitude(call.fields.k_largest)
    layer.value.check_magnitude(call.fields.v_largest)
    full = [] if at_once else _full_windows(layer)
    if full or layer.observes:
        _observe_and_pack(layer, query, full, call.step)
    return out


_decoding: weakref.WeakKeyDictionary[PackedLayer, tuple[tuple, _Call]] = weakref.WeakKeyDictionary()


def _full_windows(layer: PackedLayer) -> list[int]:
    """Sequences that have a whole group to pack after one more token; see `Geometry.packed_after`."""
    geometry = layer.ledger.geometry
    most = geometry.sink_length + geometry.window - 1
    return [row for row, (length, packed) in enumerate(zip(layer.lengths, layer.packed)) if length - packed >= most]


@torch.inference_mode(False)
def _make_room(layer: PackedLayer) -> None:
    layer.make_room(Step(1, counted=[1] * len(layer.lengths)))


@torch.inference_mode(False)  # what it stores serves steps in every mode
@torch.no_grad()
def _observe_and_pack(layer: PackedLayer, query: torch.Tensor, rows: list[int], step: Step) -> None:
    """Count the queries in, then pack the oldest group of the window of the sequences `rows`, the new token included."""
    layer.observe(query, step)
    if not rows:
        return
    layer.make_room(step)
    starts = [layer.packed[row] for row in rows]
    slots = [start % layer.ring for start in starts]
    first = [row for row, start in zip(rows, starts) if not start]
    if first and layer.key.wide:
        layer.choose_wide(first, layer.key.window[first, :, : layer.group_size])
    for side in layer.sides:
        packing.pack_window(side, layer.group_size, rows, slots, starts)


def _memory(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer) -> tuple:
    """What the call of a decode step depends on and rarely changes: layouts, and where the layer lies."""
    layouts = query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()
    kinds = query.dtype, key.dtype, value.dtype, query.is_cpu and key.is_cpu and value.is_cpu, len(layer.lengths)
    return *layouts, *kinds, layer.key.capacity, layer.value.capacity, *_addresses(layer)


def _addresses(layer: PackedLayer) -> list[int]:
    """Where the tensors of a layer lie, in the order of `_ADDRESSES`."""
    key, value = layer.sides
    of_key = key.codes, key.scale, key.minimum, key.extra, key.order, key.sinks, key.window
    of_value = value.codes, value.scale, value.minimum, value.sinks, value.window
    return [0 if t is None else t.data_ptr() for t in (*of_key, *of_value)]


_ADDRESSES = (
    *("k_codes", "k_scale", "k_minimum", "k_extra", "k_order", "k_sinks", "k_window"),
    *("v_codes", "v_scale", "v_minimum", "v_sinks", "v_window"),
)


class _Call:
    """The kernel's arguments for tokens of one layout over a layer.

    Decoding keeps them from token to token: over a short context the kernel takes less time than putting them together.

    Attributes:
        fields: what the kernel is called with.
        step: one token of every sequence, `one_each` of them.
    """

    def __init__(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: PackedLayer,
        stores: bool = False,
    ) -> None:
        batch, heads, queries, head_dim = query.shape
        kv_heads = key.shape[1]
        row_tiles = -(-queries * (heads // kv_heads) // plan.rows)
        self.plan, self.kernel = plan, _compiled(plan)
        self.tiles, self.work = batch * kv_heads * row_tiles, batch * heads * queries * head_dim
        self.one_each = [1] * batch
        self.step = Step(1, counted=self.one_each)
        self.static = _static_of(layer) if stores else None
        self.lengths = (ctypes.c_int64 * (3 * batch))()
        self.fields = AttentionFields(
            batch=batch,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            queries=queries,
            capacity=layer.key.capacity,
            sinks=layer.sink_length,
            ring=layer.ring,
            row_tiles=row_tiles,
            lengths=ctypes.addressof(self.lengths),
            stores=stores,
            rotates=layer.rotates,
            at_once=stores and layer.ledger.geometry.at_once,
            **({} if self.static is None else dict(zip(("k_static", "v_static"), (t.data_ptr() for t in self.static)))),
            k_limit=layer.key.codec.limit,
            v_limit=layer.value.codec.limit,
            **_strides("query", query, 3),
            **_strides("new_key", key, 2),
            **_strides("given_value", value, 2),
            **dict(zip(_ADDRESSES, _addresses(layer))),
        )
        self.address = ctypes.addressof(self.fields)
        self.rotated = torch.empty(batch, kv_heads, 1, head_dim, dtype=value.dtype) if stores else None
        for name, stride in _strides("new_value", value if self.rotated is None else self.rotated, 2).items():
            setattr(self.fields, name, stride)

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: PackedLayer,
        scaling: float,
        new_lengths: list[int],
    ) -> torch.Tensor:
        """What the new tokens attended, `[B, q, num_attention_heads, D]`, in the dtype of `query`."""
        lengths, packed, plan, fields = layer.lengths, layer.packed, self.plan, self.fields
        most_packed = max(packed)
        if most_packed > fields.capacity:
            raise ValueError(f"the ledger counts {most_packed} packed tokens in a capacity of {fields.capacity}.")
        threads = allowed_threads() if self.work * (max(lengths) + query.shape[2]) > _SERIAL_WORK else 1
        check_pool(threads)
        splits = _splits(self.tiles, -(-most_packed // plan.tile_tokens) + DENSE_TILES, threads)
        units = self.tiles * splits
        self.lengths[:] = [*lengths, *packed, *new_lengths]
        scratch = buffer("scratch", threads * plan.scratch_floats)
        partial = buffer("partial", units * plan.partial_floats)
        out = torch.empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3], dtype=torch.float32)
        fields.query, fields.new_key, fields.given_value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        fields.new_value = fields.given_value if self.rotated is None else self.rotated.data_ptr()
        fields.units, fields.splits, fields.scaling = units, splits, scaling * _LOG2_E
        fields.scratch, fields.partial, fields.out = scratch.address, partial.address, out.data_ptr()
        fields.k_largest = fields.v_largest = 0.0
        run(self.kernel, self.address, units, threads)
        return out if query.dtype == torch.float32 else out.to(query.dtype)


def _static_of(layer: PackedLayer) -> list[torch.Tensor] | None:
    """`k_static` and `v_static` of `AttentionFields`; None where a layer is not in code space."""
    if layer.scales is None:
        return None
    return [torch.stack([scales.scale, scales.inverse, scales.offset]) for scales in layer.scales]


def _strides(name: str, t: torch.Tensor, count: int) -> dict[str, int]:
    """The first strides of new states, in bytes, by the names of `ATTENTION`."""
    size = t.element_size()
    return {f"{name}_{dim}": stride * size for dim, stride in zip(("batch", "head", "token"), t.stride()[:count])}


@functools.cache
def _compiled(plan: Plan) -> Kernel:
    return compiled(attention, plan)


def _rows(query: torch.Tensor, key: torch.Tensor) -> int:
    """Query rows that share each load."""
    group = query.shape[1] // key.shape[1]
    return group if query.shape[2] == 1 and group <= MAX_ROWS else MAX_ROWS


def _plan(layer: PackedLayer, rows: int) -> Plan | None:
    """The plan for a layer, None where there is none."""
    window, groups = layer.key.window, (layer.group_size, layer.value.group_size)
    formats = _format(layer.key), _format(layer.value)
    small = tuple(side.codec.layout == EIGHT_BIT_METADATA for side in layer.sides)
    sizes = rows, window.shape[3], groups, layer.key.wide
    return plan_of(formats, window.dtype, *sizes, small, not layer.exact_products)


def _format(side: PackedSide) -> int | str:
    """What its packed tokens are, see `Plan`."""
    rows_of_numbers = {FULL_PRECISION: FLOAT_NAMES.get(side.window.dtype, ""), STATIC: "int8"}
    return rows_of_numbers.get(side.codec.layout, side.bits)


def _splits(units: int, shares: int, threads: int) -> int:
    """Shares of the tokens each unit is cut into, so that all threads have equally much to do."""
    if threads == 1 or units >= 4 * threads and units % threads == 0:
        return 1
    step = threads // math.gcd(threads, units)
    return max(1, min(-(-2 * threads // (units * step)) * step, shares))


def _tokens_lie_side_by_side(states: torch.Tensor) -> bool:
    return states.stride(3) == 1 and (states.shape[2] == 1 or states.stride(2) == states.shape[3])
