"""What a measurement gives: typed records and their JSON form, the same for the evaluation and the benchmarks."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from modules.evaluation.environment import Environment

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class QualityRow:
    """What one cache does to a model's predictions of a text.

    Attributes:
        name: of the candidate.
        kind: "full", "kivi", "paper", "static", "transformers", "reference" or "package".
        options: of the candidate, for the record.
        stored_bits: bits a quantized element takes with its share of scale and minimum; None where not known.
        perplexity: of the text's tokens after the skipped ones.
        kl: mean of KL(full precision || candidate) over the next-token distributions, in nats.
        kl_error: standard error of `kl` over the chunks, in nats; None for one chunk.
        top1: share of predictions whose most likely token is that of full precision.
        seconds: spent in the model's forwards.
        note: why it was not measured; then the numbers are None.
        date: when it was measured, where that was not with the other rows.
    """

    name: str
    kind: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stored_bits: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    seconds: float | None = None
    note: str = ""
    date: str = ""


@dataclasses.dataclass(frozen=True)
class QualityResult:
    """Caches side by side on one text.

    Attributes:
        model, text: their names; digest: first 12 digits of the SHA-256 of the token ids.
        tokens: of the text; chunk: tokens that go through the cache at once; skip: tokens before the first measured
            prediction; predictions: how many were measured.
        rows: full precision first.
    """

    model: str
    text: str
    digest: str
    tokens: int
    chunk: int
    skip: int
    predictions: int
    rows: list[QualityRow]
    environment: Environment

    def day_of(self, row: QualityRow) -> str | None:
        """The day (ISO 8601) on which a row was measured, where that was not the day of the others."""
        day = row.date[:10]
        return None if day in ("", self.environment.date[:10]) else day

    def row(self, name: str) -> QualityRow:
        """The row of a candidate.

        Raises:
            ValueError: where there is none of that name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"no candidate {name!r} was measured; there are {', '.join(row.name for row in self.rows)}.")


@dataclasses.dataclass(frozen=True)
class PasskeyRow:
    """One question: did the greedy answer contain the key?

    Attributes:
        name: of the candidate; kind: as in `QualityRow`.
        length: tokens of the prompt; depth: where the needle stands, 0 for the start and 1 for the end.
        key: hidden; answer: generated; found: whether it contains the key.
    """

    name: str
    kind: str
    length: int
    depth: float
    key: str
    answer: str
    found: bool


@dataclasses.dataclass(frozen=True)
class PasskeyResult:
    """Passkey retrieval of caches side by side.

    Attributes:
        model, filler: their names; chunk: tokens of the prompt that go through the cache at once.
        rows: one a candidate, length and depth; notes: candidates that were skipped, and why.
    """

    model: str
    filler: str
    chunk: int
    rows: list[PasskeyRow]
    notes: dict[str, str]
    environment: Environment

    @property
    def lengths(self) -> list[int]:
        """Lengths asked, in tokens, in order."""
        return sorted({row.length for row in self.rows})

    @property
    def names(self) -> list[str]:
        """The candidates, in order."""
        return list(dict.fromkeys(row.name for row in self.rows))

    def found(self, name: str, length: int) -> tuple[int, int]:
        """Keys found by a candidate at a length, of how many."""
        hits = [row.found for row in self.rows if (row.name, row.length) == (name, length)]
        return sum(hits), len(hits)


@dataclasses.dataclass(frozen=True)
class FreeRow:
    """What a model writes through one cache, see `modules.evaluation.free` for what each number is.

    Attributes:
        name, kind, options, stored_bits, note: as in `QualityRow`.
        kl_own: KL on its own text, in nats a token, mean of all texts; kl_own_error: half its 95 % interval.
        kl_quarters: of the first to the last quarter of the texts.
        kl_forced: KL on full precision's text.
        sequence_kl: KL(q || p) a token on sampled text.
        log_p: of sampled text under full precision, a token; log_p_error: half its 95 % interval over samples.
        log_p_change: from full precision's samples; log_p_change_error: half its 95 % interval.
        diverged_greedy, diverged_sampled: equal tokens before the first that differs, of each text.
    """

    name: str
    kind: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stored_bits: float | None = None
    kl_own: float | None = None
    kl_own_error: float | None = None
    kl_quarters: list[float] = dataclasses.field(default_factory=list)
    kl_forced: float | None = None
    sequence_kl: float | None = None
    log_p: float | None = None
    log_p_error: float | None = None
    log_p_change: float | None = None
    log_p_change_error: float | None = None
    diverged_greedy: list[int] = dataclasses.field(default_factory=list)
    diverged_sampled: list[int] = dataclasses.field(default_factory=list)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class FreeResult:
    """Caches side by side on texts that the model wrote through them.

    Attributes:
        model, text: their names; digest: of the prompts' token ids.
        prompts: how many, of prompt_tokens each; new_tokens: of each continuation; seeds: samples of each prompt.
        chunk: tokens of the prompts that go through the cache at once.
        rows: full precision first, then full precision with other seeds.
    """

    model: str
    text: str
    digest: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    seeds: int
    chunk: int
    rows: list[FreeRow]
    environment: Environment


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One question of a task, answered through one cache.

    Attributes:
        name: of the candidate; kind: as in `QualityRow`.
        task: its name; length: tokens of the context; question: its number within the task and length.
        expected: a right answer, in words; answer: generated; correct: whether it was judged right.
    """

    name: str
    kind: str
    task: str
    length: int
    question: int
    expected: str
    answer: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class TasksResult:
    """Tasks with an answer, caches side by side on the same questions.

    Attributes:
        model: its name; chunk: tokens of the context that go through the cache at once; seed: of the questions.
        rows: one a candidate and question; notes: candidates that were skipped, and why.
        settings: what makes the questions as hard as they are, by name.
    """

    model: str
    chunk: int
    seed: int
    rows: list[TaskRow]
    notes: dict[str, str]
    environment: Environment
    settings: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The candidates, in order."""
        return list(dict.fromkeys(row.name for row in self.rows))

    @property
    def tasks(self) -> list[tuple[str, int]]:
        """Tasks and lengths of their contexts, in order."""
        return list(dict.fromkeys((row.task, row.length) for row in self.rows))

    def correct(self, name: str, task: str, length: int) -> list[bool]:
        """Of each question whether a candidate's answer was right."""
        own = [row for row in self.rows if (row.name, row.task, row.length) == (name, task, length)]
        return [row.correct for row in sorted(own, key=lambda row: row.question)]


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark measured.

    Attributes:
        name: of the benchmark.
        rows: one a measurement, with the same names in each.
        settings: what else it depends on.
    """

    name: str
    rows: list[dict[str, Any]]
    environment: Environment
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Result = QualityResult | PasskeyResult | FreeResult | TasksResult | BenchmarkResult
_KINDS: dict[str, type[Result]] = {
    "quality": QualityResult,
    "passkey": PasskeyResult,
    "free": FreeResult,
    "tasks": TasksResult,
    "benchmark": BenchmarkResult,
}
_ROWS: dict[str, Any] = {
    "quality": QualityRow,
    "passkey": PasskeyRow,
    "free": FreeRow,
    "tasks": TaskRow,
    "benchmark": dict,
}


def _finite(value: Any) -> Any:
    """JSON knows no NaN or infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_result(result: Result, path: str | Path) -> None:
    """Write a result as JSON; numbers that are not finite become null."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(result, cls))
    data = {"format": FORMAT, "kind": kind, **_finite(dataclasses.asdict(result))}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def load_result(path: str | Path) -> Result:
    """Read what `save_result` wrote.

    Raises:
        ValueError: for a file that is something else.
    """
    try:
        data = json.loads(Path(path).read_text())
        kind = data.pop("kind")
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        data["rows"] = [_ROWS[kind](**row) for row in data["rows"]]
        data["environment"] = Environment(**data["environment"])
        return _KINDS[kind](**data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no result of modules.evaluation (format {FORMAT}): {error}.") from error
