"""Where the small models of the demo, the evaluation and the tests are kept."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "KIVI_MODELS"
DEFAULT = "~/.cache/kivi-models"
SMOLLM2 = "smollm2-135m-instruct"
QWEN = "qwen2.5-coder-0.5b-instruct"
GEMMA = "gemma-3-270m"


def models_folder(given: str | Path | None = None) -> Path:
    """`given`, else $KIVI_MODELS, else ~/.cache/kivi-models; it need not exist."""
    return Path(given or os.environ.get(VARIABLE) or DEFAULT).expanduser().absolute()
