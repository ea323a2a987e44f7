"""Loading a model for a command line, quietly and on the device there is."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modules.cli.generate.flags import RunFlags
from modules.cli.progress import progress
from modules.cli.source import source_of
from modules.cli.status import UserError
from modules.models.families import load_any


def load(
    model: str | Path, *, stock: bool = False, gguf_file: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, as a KIVI model of the checkpoint's family.

    Args:
        model: a checkpoint's folder, a GGUF file, or a name on the hub.
        stock: the stock model of transformers instead of the KIVI one.
        gguf_file: of the folder, or of the model on the hub.
        options: of the cache, and anything `from_pretrained` takes.

    Raises:
        UserError: where there is no such file or folder, or nothing that can be loaded in it.
        ValueError: for a model of another family, or options that do not fit it.
    """
    name, source = source_of(model, gguf_file)
    try:
        with quiet():
            if not stock:
                return load_any(name, **source, **options)
            tokenizer = AutoTokenizer.from_pretrained(name, **source)
            return AutoModelForCausalLM.from_pretrained(name, **source, **options), tokenizer
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"no model could be loaded from {model}: {reason}") from error


def load_for(
    flags: RunFlags, model: str | Path, *, stock: bool = False, gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load` with the threads, the dtype, the device and the cache's options of a command line; a bar while it lasts."""
    source_of(model, gguf_file)  # a mistake here needs no bar
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, flags.dtype or ("float16" if device.startswith("cuda") else "float32"))
    options = {} if stock else dataclasses.asdict(flags.cache)
    with progress(f"Loading {'the stock model' if stock else Path(model).name}"):
        loaded, tokenizer = load(model, stock=stock, gguf_file=gguf_file, dtype=dtype, **options)
        try:
            return loaded.to(device), tokenizer
        except (RuntimeError, AssertionError) as error:  # torch raises either for a device it has not got
            raise UserError(f"the model cannot be moved to --device {device}: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and its warning that a "llama" checkpoint goes into a "llama_kivi" model."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of the GGUF loader heeds no setting
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
