"""`kivi evaluate tasks`: tasks with an answer over long contexts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.cli.command import argument, check_least, flag_of
from modules.evaluation.candidates import Candidate, short_candidates
from modules.evaluation.flags import CacheFlags
from modules.evaluation.loading import load_model
from modules.evaluation.needles import USUAL, Difficulty
from modules.evaluation.problems import LARGEST
from modules.evaluation.references import other_methods
from modules.evaluation.results import TasksResult
from modules.evaluation.showing import progress_bar, show
from modules.evaluation.streaming import CHUNK
from modules.evaluation.tasks import HAYSTACKS, LENGTHS, QUESTIONS, SHOT_TOKENS, TASKS, make_contexts, measure_tasks
from modules.evaluation.texts import TEXT_HELP, load_text


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: list[Candidate],
    *,
    console: Console,
    model_name: str,
    filler: str,
    tasks: tuple[str, ...] = TASKS,
    lengths: tuple[int, ...] = LENGTHS,
    shot_tokens: int = SHOT_TOKENS,
    haystacks: int = HAYSTACKS,
    questions: int = QUESTIONS,
    seed: int = 0,
    difficulty: Difficulty = USUAL,
    largest: int = LARGEST,
    chunk: int = CHUNK,
) -> TasksResult:
    """Measure with a progress bar."""
    contexts = make_contexts(
        tokenizer,
        load_text(filler),
        tasks=tasks,
        lengths=lengths,
        shot_tokens=shot_tokens,
        haystacks=haystacks,
        questions=questions,
        seed=seed,
        difficulty=difficulty,
        largest=largest,
    )
    asked = sum(len(context.questions) for context in contexts)
    with progress_bar(console) as bar:
        task = bar.add_task("", total=asked * (len(candidates) + 1))
        return measure_tasks(
            model,
            tokenizer,
            contexts,
            candidates,
            chunk=chunk,
            seed=seed,
            settings={**dataclasses.asdict(difficulty), "largest": largest},
            model_name=model_name,
            progress=lambda name, done: bar.update(task, advance=done, description=name),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks(CacheFlags):
    """Needles, arithmetic and code over contexts that are packed; it runs the code that the model writes."""

    filler: str = argument("prose", TEXT_HELP)
    tasks: tuple[str, ...] = argument(TASKS, f"some of {', '.join(TASKS)}")
    lengths: tuple[int, ...] = argument(LENGTHS, "of the haystacks, in tokens")
    haystacks: int = argument(HAYSTACKS, "of each length")
    shot_tokens: int = argument(SHOT_TOKENS, "of worked examples before an arithmetic or a code question")
    questions: int = argument(QUESTIONS, "of arithmetic, and of code")
    keys: int = argument(Difficulty.keys, "of a haystack, of one value each; all but the one asked for are decoys")
    values: int = argument(Difficulty.values, "of each key of several values")
    hops: int = argument(Difficulty.hops, "of a chain: variables that are assigned another variable")
    largest: int = argument(LARGEST, "number of the arithmetic")
    seed: int = argument(0, "of the questions")
    peers: bool = argument(False, "other methods too: transformers' own quantized caches, KVarN, TurboQuant")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"--tasks must be some of {', '.join(TASKS)}; got {', '.join(unknown) or 'none'}.")
        for name in ("haystacks", "shot_tokens", "questions"):
            check_least(getattr(self, name), 1, flag_of(name))
        for length in self.lengths:
            check_least(length, 1, "--lengths")
        check_least(self.largest, 2, "--largest")
        Difficulty(self.keys, self.values, self.hops)

    def run(self, console: Console) -> None:
        """Measure, show and save."""
        candidates = self.own_candidates() or short_candidates()
        candidates += other_methods() if self.peers else []
        load_text(self.filler)
        model, tokenizer = load_model(self.model, self.dtype, self.device)
        result = run_tasks(
            model,
            tokenizer,
            candidates,
            console=console,
            model_name=Path(self.model).name,
            filler=self.filler,
            tasks=self.tasks,
            lengths=self.lengths,
            shot_tokens=self.shot_tokens,
            haystacks=self.haystacks,
            questions=self.questions,
            seed=self.seed,
            difficulty=Difficulty(self.keys, self.values, self.hops),
            largest=self.largest,
            chunk=self.chunk,
        )
        show(result, self.output)
