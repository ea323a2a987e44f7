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
        kind: "full", "kivi", "paper", "static" or "transformers".
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


Result = QualityResult | PasskeyResult | BenchmarkResult
_KINDS: dict[str, type[Result]] = {"quality": QualityResult, "passkey": PasskeyResult, "benchmark": BenchmarkResult}
_ROWS: dict[str, Any] = {"quality": QualityRow, "passkey": PasskeyRow, "benchmark": dict}


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
