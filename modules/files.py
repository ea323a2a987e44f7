"""Files of tensors that are read whole or not at all: safetensors, with a checksum over every byte, written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CHECKSUM = "sha256"
_BLANK = "0" * 64  # stands where the checksum goes while it is computed


class CheckedFile(NamedTuple):
    """An open file that is what was written: its metadata, the names of its tensors, and those, on the CPU, when asked for."""

    metadata: dict[str, str]
    names: frozenset[str]
    tensor: Callable[[str], torch.Tensor]


def check_target(path: Path) -> None:
    """Raise `ValueError` where no file can be written at `path`."""
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: that is a folder. Give the name of a file in it.")


def write_checked(path: Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that is there whole or not at all; one that was there before stays until then.

    Args:
        kind: what the file is; `open_checked` asks for it.
        tensors: contiguous, on the CPU.

    Raises:
        ValueError: where no file can be written at `path`.
        OSError: as the disk has it; nothing is left behind then.
    """
    check_target(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(unfinished, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # what new files have here; safetensors keeps its own to the user
        save_file(dict(tensors), unfinished, {**metadata, "kind": kind, CHECKSUM: _BLANK})
        os.chmod(unfinished, mode)
        with open(unfinished, "r+b") as file:
            place, digest = _checksum(file.fileno(), _BLANK)
            file.seek(place)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def open_checked(path: Path, kind: str, what: str) -> Iterator[CheckedFile]:
    """A file that `write_checked` wrote, after all of it was compared with its checksum. Its tensors are views of the
    mapped file: copy what is to outlive the context.

    Args:
        kind: as it was written.
        what: that kind in words, for errors.

    Raises:
        ValueError: for a file that is not there, truncated, altered in any byte, or of another kind.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not {what}, or was truncated or altered: {error}.") from error
    with opened as file:
        metadata = file.metadata() or {}
        recorded = metadata.get(CHECKSUM)
        if metadata.get("kind") != kind or recorded is None:
            raise ValueError(f"{path} is not {what}, or its header was altered: its kind is {metadata.get('kind')!r}.")
        with open(path, "rb") as raw:
            _, digest = _checksum(raw.fileno(), recorded)
        if digest != recorded:
            raise ValueError(
                f"{path} was altered since it was written: its bytes no longer have the SHA-256 {recorded}. Copy it again from "
                "where it came from, or write it anew."
            )
        yield CheckedFile(metadata, frozenset(file.keys()), file.get_tensor)


def _checksum(descriptor: int, recorded: str) -> tuple[int, str]:
    """Where the checksum `recorded` stands in a file (byte), and the SHA-256 of all bytes with that blank; "" if it stands
    nowhere."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        key = f'"{CHECKSUM}":"'.encode()
        found = mapped.find(key + recorded.encode() + b'"')
        if found < 0:
            return -1, ""
        place = found + len(key)
        digest = hashlib.sha256()
        with memoryview(mapped) as view:
            digest.update(view[:place])
            digest.update(_BLANK.encode())
            digest.update(view[place + len(_BLANK) :])
        return place, digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlast a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
