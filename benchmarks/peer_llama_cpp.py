"""Decode steps of llama.cpp, by the server in the package `xllamacpp`, which runs in this process.

The server knows nothing but whole requests: the prompt is run as a user's would be, once, and later requests find it in the
cache. At 30,000 tokens that takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable
from pathlib import Path

from peer_ik_llama import vectors

PACKAGE = "xllamacpp"
CACHES = ("f16", "q8_0", "q4_0")
NEW = 17  # tokens of a request; the first one comes with the prompt
MOST_TOKENS = 8000  # of a prompt
ROOM = 256


def request_steps(model: Path, cache: str, tokens: int, threads: int) -> Callable[[], float]:
    """A function that asks for `NEW` tokens after `tokens` others and gives the mean milliseconds of a step.

    Raises:
        ModuleNotFoundError: without the package.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_parallel = tokens + ROOM, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_type_k = parameters.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.verbosity = 0
    server, ids = xllamacpp.Server(parameters), random.Random(0)
    prompt = [ids.randrange(1000, 20000) for _ in range(tokens)]
    request = {"prompt": prompt, "n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": True}

    def steps() -> float:
        timings = server.handle_completions(request)["timings"]
        return timings["predicted_ms"] / (timings["predicted_n"] - 1)

    steps()  # runs the prompt
    return steps


def version() -> str:
    """The package, and the vector instructions it was built for."""
    import xllamacpp

    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}{vectors(xllamacpp.get_system_info())}"
