"""Decode steps of llama.cpp and of its fork ik_llama.cpp, over a cache of any length that is filled in seconds.

The libraries are those of the packages `llama-cpp-py-sync` and `ik-llama-cpp-python`, called below their Python classes, which
choose no type of the cache. A prompt of 30,000 tokens would take them a quarter of an hour, mostly its attention. Here pieces of
it are sequences of their own, each of which attends to itself alone; then every cell of the cache is given to sequence 0 as well,
which attends to them all from then on. The time of a step depends on how many cells there are and not on what is in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

CACHES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # values of `enum ggml_type`
PIECE = 512  # tokens of a piece of the prompt; there are at most 64 sequences
ROOM = 256  # tokens beside the prompt
_SEED = 0


class Library(Protocol):
    """What both libraries can do; `context` is theirs."""

    package: str

    def open(self, model: Path, cache: str, tokens: int, threads: int) -> Any:
        """A context with place for `tokens`."""

    def batch(self, count: int) -> Any:
        """A `llama_batch` for so many tokens of one sequence."""

    def decode(self, context: Any, batch: Any) -> None:
        """Run a batch, to its end."""

    def share(self, context: Any, sequence: int) -> None:
        """Give the cells of `sequence` to sequence 0 as well."""

    def instructions(self) -> str:
        """The sets of vector instructions that the library was built for."""


class LlamaCpp:
    """llama.cpp, by the package llama-cpp-py-sync."""

    package = "llama-cpp-py-sync"

    def __init__(self) -> None:
        from llama_cpp_py_sync import _cffi_bindings as bindings

        self.ffi, self.lib = bindings.get_ffi(), bindings.get_lib()
        self.lib.llama_backend_init()

    def open(self, model: Path, cache: str, tokens: int, threads: int) -> Any:
        parameters = self.lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = tokens, 2 + tokens // PIECE, True
        parameters.n_batch = parameters.n_ubatch = PIECE
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = CACHES[cache]
        parameters.flash_attn_type = 1
        loaded = self.lib.llama_model_load_from_file(str(model).encode(), self.lib.llama_model_default_params())
        return checked(loaded and self.lib.llama_init_from_model(loaded, parameters), model)

    def batch(self, count: int) -> Any:
        return self.lib.llama_batch_init(count, 0, 1)

    def decode(self, context: Any, batch: Any) -> None:
        check_status(self.lib.llama_decode(context, batch))
        self.lib.llama_synchronize(context)

    def share(self, context: Any, sequence: int) -> None:
        self.lib.llama_memory_seq_cp(self.lib.llama_get_memory(context), sequence, 0, -1, -1)

    def instructions(self) -> str:
        return built_for(self.ffi.string(self.lib.llama_print_system_info()).decode())


class IkLlama:
    """ik_llama.cpp, by the package ik-llama-cpp-python."""

    package = "ik-llama-cpp-python"

    def __init__(self) -> None:
        from ik_llama_cpp import _ctypes_api as bindings
        from ik_llama_cpp._lib_loader import load_shared_library

        self.api, self.lib = bindings, load_shared_library()
        integer = ctypes.c_int32
        self.lib.llama_kv_cache_seq_cp.argtypes = [ctypes.c_void_p, integer, integer, integer, integer]
        self.lib.llama_kv_cache_seq_cp.restype = None
        self.lib.llama_synchronize.argtypes, self.lib.llama_synchronize.restype = [ctypes.c_void_p], None
        self.lib.llama_print_system_info.restype = ctypes.c_char_p
        self.api.llama_backend_init()

    def open(self, model: Path, cache: str, tokens: int, threads: int) -> Any:
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = tokens, 2 + tokens // PIECE
        parameters.n_batch = parameters.n_ubatch = PIECE
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = CACHES[cache]
        parameters.flash_attn = True
        loaded = self.api.llama_model_load_from_file(str(model).encode(), self.api.llama_model_default_params())
        return checked(loaded and self.api.llama_init_from_model(loaded, parameters), model)

    def batch(self, count: int) -> Any:
        return self.api.llama_batch_init(count, 0, 1)

    def decode(self, context: Any, batch: Any) -> None:
        check_status(self.api.llama_decode(context, batch))
        self.lib.llama_synchronize(context)

    def share(self, context: Any, sequence: int) -> None:
        self.lib.llama_kv_cache_seq_cp(context, sequence, 0, -1, -1)

    def instructions(self) -> str:
        return built_for(self.lib.llama_print_system_info().decode())


LIBRARIES: dict[str, Callable[[], Library]] = {"llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlama}


def checked(context: Any, model: Path) -> Any:
    """A context that is one.

    Raises:
        ValueError: where the library gave none; why is in its log.
    """
    if not context:
        raise ValueError(f"the library cannot open {model}; what it said is above.")
    return context


def check_status(status: int) -> None:
    """Raise `RuntimeError` where a batch was not run."""
    if status:
        raise RuntimeError(f"llama_decode returned {status}")


def built_for(system: str) -> str:
    """The vector instructions that a library names in its line on the system."""
    sets = [part.split("=") for part in system.replace("|", ":").split(":") if "=" in part]
    return ", ".join(name.strip() for name, value in sets if value.strip() == "1" and "AVX" in name)


def load_batch(batch: Any, ids: list[int], position: int, sequence: int) -> None:
    """Put tokens of one sequence into a batch; the logits of the last one are computed."""
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, position + place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        batch.logits[place] = place == len(ids) - 1


def fill(library: Library, context: Any, tokens: int) -> None:
    """Put `tokens` random tokens into the cache, all of them of sequence 0."""
    ids = random.Random(_SEED)
    batch = library.batch(PIECE)
    for sequence, start in enumerate(range(0, tokens, PIECE), 1):
        count = min(PIECE, tokens - start)
        load_batch(batch, [ids.randrange(1000, 20000) for _ in range(count)], start, sequence)
        library.decode(context, batch)
        library.share(context, sequence)


def decode_step(library: Library, model: Path, cache: str, tokens: int, threads: int) -> Callable[[], None]:
    """A function that decodes one token after `tokens` others, the next time one more.

    Raises:
        ValueError: where the library cannot open the model.
    """
    with quiet():
        context = library.open(model, cache, tokens + ROOM, threads)
        fill(library, context, tokens)
    batch, positions = library.batch(1), iter(range(tokens, tokens + ROOM))

    def step() -> None:
        load_batch(batch, [1000], next(positions), 0)
        library.decode(context, batch)

    return step


def version(library: Library) -> str:
    """The package with its version, and what it was built for."""
    return f"{library.package} {importlib.metadata.version(library.package)} ({library.instructions()})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a library writes to the process's stderr, which is hundreds of lines, until something fails."""
    import tempfile

    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except Exception:
            log.seek(0)
            os.write(kept, log.read()[-4000:])
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
