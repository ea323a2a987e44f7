"""Passkey retrieval: is a number hidden in a long text still found when the text went through a quantized cache?

After Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300): filler, one sentence with a number, more filler, a
question. Depths are the middles of equal parts, so that the needle lies in the packed part and not in the window.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.evaluation.candidates import CacheFactory, Candidate, as_candidates, full_precision
from modules.evaluation.environment import Environment
from modules.evaluation.processes import Processes
from modules.evaluation.results import PasskeyResult, PasskeyRow
from modules.evaluation.streaming import CHUNK, check_count, greedy

HEADER = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER_TOKENS = 10
Progress = Callable[[str, int], None]


def depths_of(count: int) -> list[float]:
    """The middles of `count` equal parts: 0.1, 0.3, 0.5, 0.7, 0.9 for five."""
    check_count("depths", count, 1, unit="depths")
    return [(index + 0.5) / count for index in range(count)]


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], length: int, depth: float, key: str
) -> torch.Tensor:
    """A prompt of exactly `length` tokens, int64 `[1, length]`, with the needle at `depth` (0 to 1) of the filler.

    Raises:
        ValueError: for a depth outside 0 to 1, or a length that the needle, or the filler, does not fill.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 (the start) and 1 (the end); got {depth!r}.")
    header = tokenizer(HEADER)["input_ids"]
    needle, question = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (NEEDLE.format(key=key), QUESTION)
    )
    room = length - len(header) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"a prompt of {length} tokens has no room for the needle; give {length - room} or more.")
    if len(filler) < room:
        raise ValueError(f"the filler has {len(filler)} tokens; {room} are needed. Give a longer text.")
    at = round(depth * room)
    ids = [*header, *filler[:at], *needle, *filler[at:room], *question]
    return torch.tensor([ids])


def measure_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    caches: Mapping[str, Mapping[str, Any] | CacheFactory] | Iterable[Candidate],
    *,
    lengths: Sequence[int] = (2000,),
    depths: int | Sequence[float] = 5,
    chunk: int = CHUNK,
    seed: int = 0,
    processes: Processes | None = None,
    model_name: str = "",
    filler_name: str = "",
    progress: Progress | None = None,
) -> PasskeyResult:
    """Hide a key at chosen lengths and depths and ask for it, through full precision and every other cache.

    Args:
        model, tokenizer: any causal LM.
        filler: text around the needle.
        caches: as for `measure_quality`.
        lengths: of the prompts, in tokens.
        depths: places of the needle, 0 to 1; a number stands for the middles of so many equal parts.
        chunk: tokens of a prompt that go through the cache at once.
        seed: of the keys, five digits each.
        processes: that share the questions; each gets the rows of all. None: this one alone.
        model_name, filler_name: for the record.
        progress: called with a candidate's name and the tokens it has read.

    Raises:
        ValueError: for lengths, depths or options that are not allowed.
    """
    check_count("chunk", chunk, 1)
    places = depths_of(depths) if isinstance(depths, int) else list(depths)
    for length in lengths:
        check_count("lengths", length, 1)
    candidates = [full_precision(), *as_candidates(caches)]
    notes = _missing(candidates, model.config)
    filler_ids = tokenizer(filler[: 16 * max(lengths)], add_special_tokens=False, verbose=False)["input_ids"]
    numbers = random.Random(seed)
    questions = []  # all of them first, so that a length that does not fit costs no work
    for length, depth in itertools.product(lengths, places):
        key = str(numbers.randrange(10000, 100000))
        questions.append((passkey_prompt(tokenizer, filler_ids, length, depth, key), depth, key))
    asked = [candidate for candidate in candidates if candidate.name not in notes]
    team = processes or Processes()
    answers = team.gather(
        [_ask(model, tokenizer, candidate, *question, chunk, progress) for candidate in asked]
        for question in team.share(questions)
    )
    rows = list(itertools.chain.from_iterable(answers))
    return PasskeyResult(model_name, filler_name, chunk, rows, notes, Environment.here(model))


def _missing(candidates: list[Candidate], config: Any) -> dict[str, str]:
    """Why candidates cannot run here: their package is not installed."""
    made = {candidate.name: candidate.try_make(config) for candidate in candidates}
    return {name: note for name, (_, note) in made.items() if note}


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidate: Candidate,
    prompt: torch.Tensor,
    depth: float,
    key: str,
    chunk: int,
    progress: Progress | None,
) -> PasskeyRow:
    tick = None if progress is None else functools.partial(progress, candidate.name)
    tokens = greedy(model, prompt, candidate.make(model.config), ANSWER_TOKENS, chunk, tick)
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    return PasskeyRow(candidate.name, candidate.kind, prompt.shape[1], depth, key, answer, key in answer)
