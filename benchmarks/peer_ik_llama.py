"""Decode steps of ik_llama.cpp, a fork of llama.cpp for CPUs, over a cache of any length that is filled by copying.

The library is that of the package `ik-llama-cpp-python`, called below its Python class, which chooses no type of the cache. A
prompt of 30,000 tokens would take a quarter of an hour, mostly its attention. Here a short piece is run, what it left in the cache
is copied as often as it takes, and every cell is given to sequence 0, which attends to them all from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = "ik-llama-cpp-python"
CACHES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # values of `enum ggml_type`
PIECE = 512  # tokens of a piece of the prompt
ROOM = 256  # tokens beside the prompt


class Context:
    """A loaded model and its cache."""

    def __init__(self, model: Path, cache: str, tokens: int, threads: int) -> None:
        """Place for `tokens`, and `ROOM` more.

        Raises:
            ModuleNotFoundError: without the package.
            ValueError: where the library cannot open the model; what it says is on stderr.
        """
        from ik_llama_cpp import _ctypes_api as api

        self.api, self.library = api, library()
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = tokens + ROOM, 2 + tokens // PIECE
        parameters.n_batch = parameters.n_ubatch = PIECE
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = CACHES[cache]
        parameters.flash_attn = True  # which quantized values need
        loaded = api.llama_model_load_from_file(str(model).encode(), api.llama_model_default_params())
        self.pointer = loaded and api.llama_init_from_model(loaded, parameters)
        if not self.pointer:
            raise ValueError(f"ik_llama.cpp cannot open {model} with a cache of {cache}; what it said is above.")
        self.batches = {count: api.llama_batch_init(count, 0, 1) for count in (1, PIECE)}

    def decode(self, ids: list[int], position: int, sequence: int) -> None:
        """Run tokens of one sequence, to their end; the logits of the last one are computed."""
        batch: Any = self.batches[1 if len(ids) == 1 else PIECE]
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, position + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = place == len(ids) - 1
        status = self.api.llama_decode(self.pointer, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self.library.llama_synchronize(self.pointer)

    def fill(self, tokens: int) -> None:
        """Put `tokens` tokens into the cache, all of them of sequence 0: copies of the same `PIECE`, the last one cut.

        The piece is run in an empty cache: the library aborts where it meets a block of cells none of which a token attends to.
        """
        random_ids = random.Random(0)
        self.decode([random_ids.randrange(1000, 20000) for _ in range(PIECE)], 0, 1)
        pieces = -(-tokens // PIECE)
        self.copy(1, range(2, pieces + 1))
        self.library.llama_kv_cache_seq_rm(self.pointer, pieces, tokens - (pieces - 1) * PIECE, -1)
        for sequence in range(1, pieces + 1):
            self.library.llama_kv_cache_seq_cp(self.pointer, sequence, 0, -1, -1)

    def copy(self, sequence: int, others: Iterable[int]) -> None:
        """Copy the cells of a sequence into others.

        Raises:
            RuntimeError: where the library has copied none.
        """
        size = self.library.llama_state_seq_get_size(self.pointer, sequence, 0)
        state = ctypes.create_string_buffer(size)
        self.library.llama_state_seq_get_data(self.pointer, state, size, sequence, 0)
        for other in others:
            if not self.library.llama_state_seq_set_data(self.pointer, state, size, other, 0):
                raise RuntimeError(f"the cells of sequence {sequence} could not be copied into sequence {other}")


@functools.cache
def library() -> ctypes.CDLL:
    """The library, with what the package does not declare."""
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._lib_loader import load_shared_library

    loaded, integer = load_shared_library(), ctypes.c_int32
    loaded.llama_kv_cache_seq_cp.argtypes = [ctypes.c_void_p, integer, integer, integer, integer]
    loaded.llama_kv_cache_seq_cp.restype = None
    loaded.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p, integer, integer, integer]
    loaded.llama_kv_cache_seq_rm.restype = ctypes.c_bool
    for name, arguments in (
        ("get_size", [integer, ctypes.c_uint32]),
        ("get_data", [ctypes.c_char_p, ctypes.c_size_t, integer, ctypes.c_uint32]),
        ("set_data", [ctypes.c_char_p, ctypes.c_size_t, integer, ctypes.c_uint32]),
    ):
        function = getattr(loaded, f"llama_state_seq_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p, *arguments], ctypes.c_size_t
    loaded.llama_synchronize.argtypes, loaded.llama_synchronize.restype = [ctypes.c_void_p], None
    loaded.llama_print_system_info.restype = ctypes.c_char_p
    api.llama_backend_init()
    return loaded


def decode_step(model: Path, cache: str, tokens: int, threads: int) -> Callable[[], None]:
    """A function that decodes one token after `tokens` others, the next time one more."""
    with silenced():
        context = Context(model, cache, tokens, threads)
    context.fill(tokens)
    positions = iter(range(tokens, tokens + ROOM))
    return lambda: context.decode([1000], next(positions), 0)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep back what a library writes to the process's stderr, hundreds of lines, unless something fails."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except Exception:
            log.seek(0)
            os.write(stderr, log.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def version() -> str:
    """The package, and the vector instructions it was built for."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}{vectors(library().llama_print_system_info().decode())}"


def vectors(system: str) -> str:
    """The vector instructions in llama.cpp's line on the system, which has a part "AVX2 = 1" for each."""
    parts = (part.rpartition(":")[2].split("=") for part in system.split("|"))
    found = [part[0].strip() for part in parts if len(part) == 2 and part[1].strip() == "1" and "AVX" in part[0]]
    return f", built for {', '.join(found)}" if found else ""
