"""Pipelines that were found faster on a GPU than the default ones, kept in a file a GPU.

`benchmarks/tune_gpu.py` measures and writes them. A table is looked for in the user's folder, `$KIVI_TUNING` or
`~/.cache/kivi-tuning`, then among those that come with the package (`tuned/`). It only says how fast attention is: one of
another GPU, of other kernels or compilers, or damaged, is left aside with a warning, and a layout that no table has takes
`launch.default_pipeline`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import uuid
import warnings
from pathlib import Path
from typing import Annotated, Literal

import torch
import triton
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modules.kernels.triton import launch

FORMAT: Literal[1] = 1
VARIABLE = "KIVI_TUNING"
DEFAULT = "~/.cache/kivi-tuning"
OF_THE_PACKAGE = Path(__file__).with_name("tuned")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tuned(_Strict):
    """The fastest pipeline of a layout, see `launch.Pipeline`, and what a step took with it and with the default one."""

    stages: Annotated[int, Field(ge=1, le=5)]
    tokens: Literal[16, 32, 64, 128]
    warps: Literal[1, 2, 4, 8]
    programs: Annotated[int, Field(ge=1, le=16)]
    microseconds: Annotated[float, Field(gt=0)]
    default_microseconds: Annotated[float, Field(gt=0)]

    @property
    def pipeline(self) -> launch.Pipeline:
        return launch.Pipeline(self.stages, self.tokens, self.warps, self.programs)


class Table(_Strict):
    """The file: what was tuned on one GPU, by `layout`."""

    format: Literal[1] = FORMAT
    device: str  # the GPU's name
    kernels: str  # `kernels()`
    layouts: dict[str, Tuned]


def pipeline(device: torch.device, shape: launch.Shape, many_rows: bool, item: int) -> launch.Pipeline:
    """How programs walk over packed tokens on a device: as tuned there, else the default.

    Args:
        shape, many_rows, item: as `launch.attention_tile` takes them.
    """
    name = device_name(device)
    tuned = None if name is None else tuned_layouts(name).get(layout(shape, many_rows, item))
    return tuned.pipeline if tuned else launch.default_pipeline(shape, many_rows, item, launch.shared_memory(device))


@functools.cache
def layout(shape: launch.Shape, many_rows: bool, item: int) -> str:
    """What a pipeline is tuned for, in words: how the tokens lie and how many query rows a program has."""
    stored = "static INT8" if shape.static else f"K{shape.k_bits} V{shape.v_bits}"
    groups = "one by one" if shape.at_once else f"groups of {shape.group_size} and {shape.value_group_size}"
    rows = launch.query_rows(shape, many_rows, item)
    small = {"keys": shape.k_small_metadata, "values": shape.v_small_metadata}
    metadata = "".join(f", 8-bit metadata of {side}" for side, is_small in small.items() if is_small)
    return f"{stored}, heads of {shape.head_dim}, {groups}, {shape.wide} wide, {rows} rows of {item}-byte numbers{metadata}"


@functools.cache
def kernels() -> str:
    """First 12 digits of the SHA-256 of the kernels' source and Triton's version: times of others say nothing of these."""
    digest = hashlib.sha256(triton.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file != Path(__file__):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def device_name(device: torch.device) -> str | None:
    """The GPU's name; None where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device)


def folder() -> Path:
    """Where a user's tables are: $KIVI_TUNING, else ~/.cache/kivi-tuning; it need not exist."""
    return Path(os.environ.get(VARIABLE) or DEFAULT).expanduser().absolute()


def file_name(device: str) -> str:
    """The name of a GPU's table: "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def tuned_layouts(device: str) -> dict[str, Tuned]:
    """What was tuned on the GPU `device`, by layout: the user's over the package's, and none of a table that does not fit."""
    found: dict[str, Tuned] = {}
    for place in (OF_THE_PACKAGE, folder()):
        path = place / file_name(device)
        if path.is_file():
            found |= _read(path, device)
    return found


def _read(path: Path, device: str) -> dict[str, Tuned]:
    """The layouts of a table; none, and a warning, where it is not one of this GPU and these kernels."""
    try:
        table = load(path)
    except ValueError as error:
        _warn(str(error))
        return {}
    if table.device != device:
        _warn(f"{path} was tuned on {table.device!r}, and this is {device!r}.")
    elif table.kernels != kernels():
        _warn(f"{path} was tuned for other kernels or another Triton ({table.kernels}; these are {kernels()}).")
    else:
        return table.layouts
    return {}


def load(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: where the file holds none; it names the first mistake.
    """
    try:
        return Table.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValidationError as invalid:
        first = invalid.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is no table of tuned pipelines: {where and f'{where}: '}{first['msg']}.") from None


def save(table: Table, path: Path) -> None:
    """Write a table, whole or not at all, and let this process read it.

    Raises:
        OSError: as the disk has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_text(table.model_dump_json(indent=1) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    forget()


def forget() -> None:
    """Read the tables anew when they are next asked for."""
    tuned_layouts.cache_clear()


def _warn(problem: str) -> None:
    warnings.warn(
        f"KIVI's kernels run with their default pipelines: {problem} Tune again (benchmarks/run_gpu.sh --only tune) or "
        "delete the file.",
        stacklevel=5,
    )
