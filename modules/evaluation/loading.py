"""Models for measurements: a checkpoint on the device it is measured on."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.models.families import load_any

DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = "a folder or a name on the hub"


def load_model(path: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint as a KIVI model, on the GPU where there is one and no device is given, and its tokenizer.

    Raises:
        ValueError: for a checkpoint of a family that there is no KIVI model of, or a path that holds none.
    """
    try:
        model, tokenizer = load_any(path, dtype=getattr(torch, dtype))
    except OSError as error:
        raise ValueError(f"no model could be loaded from {path!r}: {error}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
