"""Where a model comes from: a folder, a GGUF file or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from modules.cli.status import UserError

MODEL_HELP = "a checkpoint's folder, a .gguf file or a name on the hub (owner/name)"
_ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def source_of(model: str | Path, gguf_file: str | None = None) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a checkpoint's folder, a GGUF file or a name on the hub: name and `gguf_file`.

    Args:
        gguf_file: a file in the folder, or of the model on the hub.

    Raises:
        UserError: where there is no such file or folder.
    """
    path = Path(model).expanduser()
    named = {"gguf_file": gguf_file} if gguf_file else {}
    if path.is_dir():
        if gguf_file and not (path / gguf_file).is_file():
            found = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
            raise UserError(f"there is no file {gguf_file} in {model}; GGUF files there: {found}.")
        return str(path), named
    if path.is_file():
        if path.suffix != ".gguf" or named:
            raise UserError(f"{model} is a file; give {MODEL_HELP}.")
        return str(path.parent), {"gguf_file": path.name}
    if not _ON_HUB.fullmatch(str(model)):
        raise UserError(f"there is no file or folder {model}; give {MODEL_HELP}.")
    return str(model), named
