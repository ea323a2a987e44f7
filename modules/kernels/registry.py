"""The backends there are, and which of them attends over a layer.

A backend is a folder with a `BACKEND` in its package and a line here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import NamedTuple

from modules.kernels.backend import Backend
from modules.options import ALLOWED_BACKENDS
from modules.store.layer import PackedLayer


class Entry(NamedTuple):
    """A backend before it is imported, which may take a second.

    Attributes:
        package: where it is.
        needs: what must be installed; None where nothing must.
        device: type of the devices it runs on; None for all.
    """

    package: str
    needs: str | None
    device: str | None


REGISTRY: dict[str, Entry] = {  # the fastest first
    "triton": Entry("modules.kernels.triton", "triton", "cuda"),
    "numba": Entry("modules.kernels.numba", "numba", "cpu"),
    "torch": Entry("modules.kernels.reference", None, None),
}


@functools.cache
def backend(name: str) -> Backend:
    """The backend of that name, imported."""
    return importlib.import_module(REGISTRY[name].package).BACKEND


def why_not(name: str, layer: PackedLayer) -> str | None:
    """What keeps the backend `name` from attending over `layer`; None where nothing does."""
    entry, device = REGISTRY[name], layer.key.window.device.type
    if entry.device is not None and device != entry.device:
        return f"it runs on {entry.device!r} and the cache is on {device!r}"
    if entry.needs is not None and importlib.util.find_spec(entry.needs) is None:
        return f"the package {entry.needs} is not installed"
    try:
        unknown = {side.codec.layout for side in layer.sides} - backend(name).layouts
        if unknown:
            return f"its kernels cannot read codes of the layout {', '.join(sorted(unknown))}"
        return backend(name).why_not(layer)
    except Exception as error:  # an optional package may fail to import in any way, and attention goes on without it
        return f"{entry.needs} cannot be used here ({type(error).__name__}: {error})"


def pick_backend(wanted: str, layer: PackedLayer) -> Backend:
    """The backend that attends over `layer`: `wanted`, or with "auto" the fastest there is for its device.

    Raises:
        ValueError: where the backend asked for cannot run here.
    """
    if wanted not in ALLOWED_BACKENDS:
        raise ValueError(f"backend={wanted!r} is not one of {', '.join(map(repr, ALLOWED_BACKENDS))}.")
    if wanted != "auto":
        problem = why_not(wanted, layer)
        if problem is not None:
            raise ValueError(f"backend={wanted!r} cannot run here: {problem}; use 'auto' or 'torch'.")
        return backend(wanted)
    for name, entry in REGISTRY.items():
        if entry.device is None or entry.device == layer.key.window.device.type:
            problem = why_not(name, layer)
            if problem is None:
                return backend(name)
            if name != "torch":
                _warn_of_torch(problem)
    raise ValueError(f"no backend attends over this cache: {problem}.")


@functools.cache
def _warn_of_torch(problem: str) -> None:
    warnings.warn(f"KIVI attends with plain torch, much slower than its kernels, because {problem}.", stacklevel=4)
