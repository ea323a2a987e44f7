"""Texts to measure on: files, what Python itself brings along (no network), and data sets of the hub."""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import statistics
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

from modules.evaluation.streaming import check_count

HUB_PREFIX = "hub:"
TEXT_HELP = "prose, code, a file, or hub:dataset:config:split:column"
# The longest chapters of the language reference first: running prose with few tables.
PROSE_TOPICS = (
    "compound",
    "specialnames",
    "types",
    "typesfunctions",
    "formatstrings",
    "execmodel",
    "import",
    "assignment",
)
CODE_MODULES = (argparse, statistics, tarfile, zipfile, ast)


def python_prose() -> str:
    """Prose of Python's own language reference, from `pydoc_data.topics`; about 460 KB."""
    first = [name for name in PROSE_TOPICS if name in topics]
    rest = sorted(set(topics) - set(first))
    return "\n\n".join(topics[name].strip() for name in first + rest)


def python_code() -> str:
    """Source code of a few long modules of Python's standard library."""
    sources = (inspect.getsource(module) for module in CODE_MODULES)
    return "\n\n".join(sources)


OFFLINE_TEXTS: dict[str, Callable[[], str]] = {"prose": python_prose, "code": python_code}


def _hub_text(name: str) -> str:
    """Rows of `hub:dataset[:config[:split[:column]]]`, joined."""
    parts = name.split(":")
    dataset, config, split, column = (parts + [""] * 4)[:4]
    try:
        from datasets import load_dataset

        rows = load_dataset(dataset, config or None, split=split or "test")
    except Exception as error:  # the library raises a dozen kinds; each of them means that there is no text
        raise ValueError(
            f"the data set {dataset!r} could not be loaded from the hub ({type(error).__name__}: {error}). "
            f"Offline, use one of {', '.join(OFFLINE_TEXTS)} or the path of a text file."
        ) from error
    column = column or "text"
    if column not in rows.column_names:
        raise ValueError(f"the data set {dataset!r} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    return "\n\n".join(rows[column])


def load_text(source: str) -> str:
    """A text by name.

    Args:
        source: "prose" (Python's language reference) or "code" (its standard library), both offline; the path of a
            UTF-8 file; or "hub:dataset[:config[:split[:column]]]", e.g. "hub:wikitext:wikitext-2-raw-v1:test". A
            number after "@" starts that many characters in: "prose@60000".

    Raises:
        ValueError: for a name that is none of these, a data set that cannot be reached, or a start beyond the end.
    """
    name, _, start = source.partition("@")
    if start and not start.isdigit():
        raise ValueError(f"the start of a text must be a number of characters, as in 'prose@60000'; got {start!r}.")
    if name in OFFLINE_TEXTS:
        text = OFFLINE_TEXTS[name]()
    elif name.startswith(HUB_PREFIX):
        text = _hub_text(name.removeprefix(HUB_PREFIX))
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"there is no text {name!r}: not a file, nor one of {', '.join(OFFLINE_TEXTS)}, nor 'hub:dataset'."
        )
    if start and int(start) >= len(text):
        raise ValueError(f"{name!r} has {len(text)} characters; it cannot start at {start}.")
    return text[int(start or 0) :]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, source: str = "the text") -> torch.Tensor:
    """The first `tokens` token ids of a text, int64 `[1, tokens]`.

    Raises:
        ValueError: where the text is shorter, or `tokens` is no number of them.
    """
    check_count("tokens", tokens, 1)
    enough = text[: 16 * tokens + 1024]  # nearly no token has more than 16 characters; tokenizing all takes long
    for part in (enough, text):
        ids = tokenizer(part, return_tensors="pt", verbose=False)["input_ids"]
        if ids.shape[1] >= tokens:
            return ids[:, :tokens]
    raise ValueError(f"{source} has {ids.shape[1]} tokens; {tokens} are wanted. Give a longer text or fewer tokens.")


def pieces(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], count: int, tokens: int) -> list[torch.Tensor]:
    """`count` texts of `tokens` token ids, int64 `[1, tokens]` each, from several sources in turn; of one, side by side.

    Raises:
        ValueError: where a source is shorter than its share.
    """
    check_count("count", count, 1, "texts")
    shares = [len(range(number, count, len(sources))) for number in range(len(sources))]
    return [
        piece
        for source, share in zip(sources, shares)
        if share
        for piece in encode(tokenizer, load_text(source), share * tokens, source).split(tokens, dim=1)
    ]


def digest(ids: torch.Tensor) -> str:
    """First 12 digits of the SHA-256 of token ids: says whether two measurements saw the same text."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:12]
