"""Decode steps of OpenVINO on the CPU, over a cache that is filled with random states.

`openvino-genai` makes OpenVINO's model of the GGUF file; the steps are OpenVINO's own, as the keys and values of a model that it
compiled can be set, which its pipeline does not let one do.
"""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

PACKAGE = "openvino-genai"
CACHES = ("f16", "u8")  # one of u4 ends the process when it is set
_MODEL = "openvino_model.xml"


@functools.cache
def converted(gguf: Path) -> Any:
    """OpenVINO's model of a GGUF file.

    Raises:
        ModuleNotFoundError: without the packages.
    """
    import openvino
    import openvino_genai

    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, gguf.name)  # it writes beside the file
        link.symlink_to(gguf.absolute())
        openvino_genai.LLMPipeline(link, "CPU", enable_save_ov_model=True, ATTENTION_BACKEND="SDPA")
        # Into memory, as the folder goes.
        return openvino.Core().read_model(
            Path(folder, _MODEL).read_bytes(), Path(folder, "openvino_model.bin").read_bytes()
        )


def compiled(gguf: Path, cache: str, threads: int) -> Any:
    """The model, compiled for a cache of that type.

    Raises:
        ValueError: where OpenVINO has taken another type.
    """
    import openvino

    settings = {"KV_CACHE_PRECISION": cache, "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(converted(gguf), "CPU", settings)
    taken = {name: model.get_property(f"{name}_CACHE_PRECISION").to_string() for name in ("KEY", "VALUE")}
    if set(taken.values()) != {cache}:
        raise ValueError(f"OpenVINO was asked for a cache of {cache} and has {taken}.")
    return model


def decode_step(gguf: Path, cache: str, tokens: int, threads: int) -> Callable[[], None]:
    """A function that decodes one token after `tokens` others, the next time one more."""
    import openvino

    request = compiled(gguf, cache, threads).create_infer_request()
    random = numpy.random.default_rng(0)
    for state in request.query_state():
        _, heads, _, head_dim = state.state.shape
        state.state = openvino.Tensor(random.standard_normal((1, heads, tokens, head_dim), dtype=numpy.float32))
    after = iter(range(tokens, tokens + 1000))

    def step() -> None:
        place = next(after)
        request.infer(
            {
                "input_ids": numpy.array([[100]]),
                "attention_mask": numpy.ones((1, place + 1), dtype=numpy.int64),
                "position_ids": numpy.array([[place]]),
                "beam_idx": numpy.zeros(1, dtype=numpy.int32),
            }
        )

    return step


def version() -> str:
    """The packages, and the type that products are made in."""
    import openvino

    precision = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, products in {precision}"
