"""Tasks with an answer, asked over contexts most of whose tokens are packed, through caches side by side.

A context goes through a cache once, in chunks; each of its questions is then answered greedily by a copy of that cache.
Every cache answers the same questions, so that two of them can be compared pair by pair (`modules.evaluation.statistics`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.evaluation.candidates import CacheFactory, Candidate, as_candidates, full_precision
from modules.evaluation.environment import Environment
from modules.evaluation.needles import USUAL, Difficulty, haystack
from modules.evaluation.problems import LARGEST, arithmetic, code
from modules.evaluation.questions import Context, Question
from modules.evaluation.results import TaskRow, TasksResult
from modules.evaluation.streaming import CHUNK, check_count, greedy, prefill

LENGTHS = (4000,)
SHOT_TOKENS = 1500
HAYSTACKS = 3
QUESTIONS = 40
TASKS = ("needles", "arithmetic", "code")
Progress = Callable[[str, int], None]


def make_contexts(
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    shot_tokens: int = SHOT_TOKENS,
    haystacks: int = HAYSTACKS,
    questions: int = QUESTIONS,
    seed: int = 0,
    difficulty: Difficulty = USUAL,
    largest: int = LARGEST,
) -> list[Context]:
    """Contexts and their questions, the same for the same seed.

    Args:
        tokenizer: of the model.
        filler: text of the haystacks.
        tasks: some of `TASKS`.
        lengths: of the haystacks, in tokens.
        shot_tokens: of the worked examples before an arithmetic or a code question.
        haystacks: of each length.
        questions: of arithmetic, and of code.
        seed: of all of them.
        difficulty: of the needles; largest: number of the arithmetic.

    Raises:
        ValueError: for a task that there is not, and for counts and lengths that are not allowed.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}.")
    for name, value in (("haystacks", haystacks), ("questions", questions)):
        check_count(name, value, 1, name)
    for length in (*lengths, shot_tokens):
        check_count("lengths", length, 1)
    contexts = []
    if "needles" in tasks:
        hay = tokenizer(filler[: 16 * max(lengths)], add_special_tokens=False, verbose=False)["input_ids"]
        contexts += [
            haystack(tokenizer, hay, length, 1000 * seed + number, difficulty)
            for length in lengths
            for number in range(haystacks)
        ]
    if "arithmetic" in tasks:
        contexts.append(arithmetic(tokenizer, shot_tokens, questions, seed, largest))
    if "code" in tasks:
        contexts.append(code(tokenizer, shot_tokens, questions, seed))
    return contexts


@torch.inference_mode()
def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Context],
    caches: Mapping[str, Mapping[str, Any] | CacheFactory] | Iterable[Candidate],
    *,
    chunk: int = CHUNK,
    seed: int = 0,
    settings: Mapping[str, int] | None = None,
    model_name: str = "",
    progress: Progress | None = None,
) -> TasksResult:
    """Answer every question through full precision and every other cache.

    Args:
        model, tokenizer: any causal LM.
        contexts: from `make_contexts`.
        caches: as for `measure_quality`.
        chunk: tokens of a context that go through a cache at once.
        seed, settings: of the contexts, for the record; model_name: for the record.
        progress: called with a candidate's name and the questions it has answered.

    Raises:
        ValueError: for options that are not allowed.
    """
    check_count("chunk", chunk, 1)
    candidates = [full_precision(), *as_candidates(caches)]
    notes = {each.name: note for each in candidates if (note := each.try_make(model.config)[1])}
    rows = [
        row
        for candidate in candidates
        if candidate.name not in notes
        for row in _answers(model, tokenizer, candidate, contexts, chunk, progress)
    ]
    return TasksResult(model_name, chunk, seed, rows, notes, Environment.here(model), dict(settings or {}))


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidate: Candidate,
    contexts: Sequence[Context],
    chunk: int,
    progress: Progress | None,
) -> Iterator[TaskRow]:
    asked: dict[tuple[str, int], int] = {}
    for context in contexts:
        cache = candidate.make(model.config)
        prefill(model, torch.tensor([context.ids]), cache, chunk)
        for question in context.questions:
            place = question.task, context.length
            answer = _answer(model, tokenizer, question, copy.deepcopy(cache), chunk)
            yield TaskRow(
                candidate.name,
                candidate.kind,
                *place,
                asked.setdefault(place, 0),
                question.expected,
                answer,
                question.judge(answer),
            )
            asked[place] += 1
            if progress is not None:
                progress(candidate.name, 1)


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, cache: Any, chunk: int
) -> str:
    """The line that a model goes on with."""
    ids = tokenizer(question.text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def ended(tokens: list[int]) -> bool:
        return "\n" in tokenizer.decode(tokens, skip_special_tokens=True).lstrip()

    tokens = greedy(model, ids, cache, question.new_tokens, chunk, stop=ended)
    return tokenizer.decode(tokens, skip_special_tokens=True)
