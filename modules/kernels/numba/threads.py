"""Kernels on several threads, those of Numba's pool; and the memory each thread of ours works in."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

import numpy as np
import torch
from numba import get_num_threads, get_thread_id, njit, prange, set_num_threads, threading_layer, types
from numba.np.ufunc import parallel

from modules.kernels.numba.compiling import ALL, COMBINE, TAKE_IN, UNITS, Kernel, call_kernel, with_cache

_KEPT_FLOATS = 1 << 20  # the largest buffer that a thread keeps: 4 MiB
_local = threading.local()


class _Pool:
    """What is known of Numba's pool in this process.

    Attributes:
        lost: the pool was started before a fork and is not there in this process.
        lock: held while it works, where it takes one caller at a time (Numba's "workqueue").
    """

    def __init__(self) -> None:
        self.lost, self.lock = False, threading.Lock()

    def after_fork(self) -> None:
        """In the child: threads do not survive a fork, and only TBB starts them again."""
        self.lock = threading.Lock()
        self.lost = self.lost or (parallel._is_initialized and threading_layer() != "tbb")


_pool = _Pool()
os.register_at_fork(after_in_child=_pool.after_fork)


def allowed_threads() -> int:
    """Threads a kernel may use: no more than torch was told to, nor Numba. One of them never starts Numba's pool."""
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    most = get_num_threads()
    if torch.get_num_threads() != threads:  # starting the pool told OpenMP, which torch shares, to use all threads
        torch.set_num_threads(threads)
    return min(threads, most)


def run(kernel: Kernel, address: int, units: int, threads: int) -> None:
    """All stages of a kernel, its `units` shared out to `threads` threads.

    Raises:
        RuntimeError: for several threads in a process that was forked from one in which they ran.
    """
    if threads == 1:
        kernel.run(None, address, ALL, 0, units, 0)
        return
    with _numba_threads(threads):
        kernel.run(None, address, TAKE_IN, 0, units, 0)
        _shared_out()(kernel.address, address, units)
        kernel.run(None, address, COMBINE, 0, units, 0)


def check_pool(threads: int) -> None:
    """Raise `RuntimeError` where several threads cannot run."""
    if threads > 1 and _pool.lost:
        raise RuntimeError(
            "this process was forked from one in which Numba's threads ran, and they do not survive a fork: call "
            "torch.set_num_threads(1) in it, or start it with multiprocessing's method 'spawn'."
        )


@contextlib.contextmanager
def _numba_threads(threads: int) -> Iterator[None]:
    """Within it, Numba uses `threads` threads."""
    check_pool(threads)
    before = get_num_threads()
    with _pool.lock if threading_layer() == "workqueue" else contextlib.nullcontext():
        set_num_threads(threads)
        try:
            yield
        finally:
            set_num_threads(before)


def _share_out(kernel, address, units):
    for unit in prange(units):
        call_kernel(kernel, address, UNITS, np.int64(unit), np.int64(unit) + 1, np.int64(get_thread_id()))


@functools.cache
def _shared_out():
    """`_share_out`, compiled: the only loop over threads there is."""
    signature = (types.int64, types.int64, types.int64)

    def compile(cache: bool):
        loop = njit(cache=cache, parallel=True, nogil=True)(_share_out)
        loop.compile(signature)
        return loop.overloads[signature].entry_point

    return with_cache(compile, "the loop over threads")


class Buffer:
    """Float32 memory that starts on a cache line.

    Attributes:
        floats: how many there is room for.
        address: where it starts.
    """

    def __init__(self, floats: int) -> None:
        self.floats, self._memory = floats, np.empty(floats + 16, np.float32)
        self.address = -(-self._memory.ctypes.data // 64) * 64


def buffer(name: str, floats: int) -> Buffer:
    """A buffer of this thread; a small one is kept for the next call."""
    kept = getattr(_local, name, None)
    if kept is None or kept.floats < floats:
        kept = Buffer(floats)
        if floats <= _KEPT_FLOATS:
            setattr(_local, name, kept)
    return kept
