"""Packing on the CPU, compiled by Numba: whole groups of states straight into the codes and metadata of a side."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from modules.codecs.codec import Packed
from modules.codecs.grouped import FLOAT16_MAX, refuse_unrepresentable
from modules.codecs.kivi import EIGHT_BIT_METADATA
from modules.kernels.checks import check_groups
from modules.kernels.numba.compiling import Kernel, compiled
from modules.kernels.numba.fields import PackingFields
from modules.kernels.numba.packing_control import packing
from modules.kernels.numba.packing_spec import Packing, packing_of
from modules.kernels.numba.threads import allowed_threads, buffer, check_pool, run
from modules.store.side import PackedSide

_LARGEST_BITS = int(np.float32(FLOAT16_MAX).view(np.int32))
_SERIAL_ELEMENTS = 1 << 16  # below which starting threads costs more than it saves


def pack(side: PackedSide, rows: slice, start: int, states: torch.Tensor) -> None:
    """Store whole groups, see `modules.kernels.backend.Backend.pack`.

    Raises:
        ValueError: for states that do not fit the side, and for NaN, infinite or too large ones.
    """
    check_groups(side, rows, start, states)
    spec = _spec(side) if side.grouped else None
    if spec is None:
        side.write(rows, start, side.codec.encode(states, None if side.order is None else side.order[rows]))
        return
    states = states.detach()
    states = states if states.stride(3) == 1 else states.contiguous()
    targets = Packed(*(None if t is None else t[rows] for t in (side.codes, side.scale, side.minimum, side.extra)))
    jobs = [(row, 0, start) for row in range(states.shape[0])]
    _run(spec, side.what, states, targets, None if side.order is None else side.order[rows], jobs, states.shape[2])


def pack_window(side: PackedSide, group_size: int, rows: list[int], slots: list[int], starts: list[int]) -> None:
    """Pack the group in the ring's `slots[i]…` of each sequence `rows[i]` as packed tokens `starts[i]…`."""
    spec = _spec(side) if side.grouped else None
    if spec is None:
        for row, slot, start in zip(rows, slots, starts):
            pack(side, slice(row, row + 1), start, side.window[row : row + 1, :, slot : slot + group_size])
        return
    targets = Packed(side.codes, side.scale, side.minimum, side.extra)
    _run(spec, side.what, side.window, targets, side.order, list(zip(rows, slots, starts)), group_size)


def _run(
    spec: Packing,
    what: str,
    states: torch.Tensor,
    targets: Packed,
    order: torch.Tensor | None,
    jobs: list[tuple[int, int, int]],
    tokens: int,
) -> None:
    """For each job `(row, source token, packed token)` pack `tokens` of `states` `[b, H, *, D]` into `targets`, of as many rows."""
    _, heads, _, head_dim = states.shape
    groups = tokens // spec.tokens
    units = len(jobs) * heads * groups
    if not units:
        return
    threads = allowed_threads() if units * spec.tokens * head_dim > _SERIAL_ELEMENTS else 1
    check_pool(threads)
    scratch, largest = buffer("packing", threads * spec.scratch_floats), np.empty(units, np.int32)
    table = np.array(jobs, np.int64)
    row, head, token = (stride * states.element_size() for stride in states.stride()[:3])
    scale, minimum = targets.metadata
    fields = PackingFields(
        heads=heads,
        groups=groups,
        source=states.data_ptr(),
        source_row=row,
        source_head=head,
        source_token=token,
        capacity=targets.codes.shape[2],
        codes=targets.codes.data_ptr(),
        scale=scale.data_ptr(),
        minimum=minimum.data_ptr(),
        extra=0 if targets.extra is None else targets.extra.data_ptr(),
        order=0 if order is None else order.data_ptr(),
        jobs=table.ctypes.data,
        job_count=len(jobs),
        scratch=scratch.address,
        largest=largest.ctypes.data,
    )
    run(_compiled(spec), ctypes.addressof(fields), units, threads)
    if largest.max() > _LARGEST_BITS:
        for job_row, first, _ in jobs:
            refuse_unrepresentable(states[job_row, :, first : first + tokens], what)


@functools.cache
def _compiled(spec: Packing) -> Kernel:
    return compiled(packing, spec)


def _spec(side: PackedSide) -> Packing | None:
    """What is to be compiled for a side; None where there is no kernel for it, or its tensors are not contiguous."""
    window = side.window
    small = side.codec.layout == EIGHT_BIT_METADATA
    how = side.what, side.bits, side.group_size, side.method
    spec = packing_of(*how, window.dtype, window.shape[3], side.wide, small)
    whole = all(t.is_contiguous() for t in side.tensors().values())
    return spec if whole else None
