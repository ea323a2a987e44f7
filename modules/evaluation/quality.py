"""Perplexity, KL divergence and top-1 agreement of caches side by side, text streamed through each of them.

A long forward over an empty cache measures nothing, since prefill attends in full precision. Here the text goes through
the caches 128 tokens at a time, so that every later prediction sees a quantized past. Full precision and the candidates
advance in lock-step: the reference distributions of one chunk are computed once and dropped with it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from modules.evaluation.candidates import CacheFactory, Candidate, as_candidates, full_precision, stored_bits
from modules.evaluation.environment import Environment
from modules.evaluation.processes import Processes
from modules.evaluation.results import QualityResult, QualityRow
from modules.evaluation.streaming import CHUNK, check_count, chunks, forward
from modules.evaluation.texts import digest

SKIP = 512
OTHERS = ("transformers", "reference", "package")  # kinds of what is not ours
PEER_PACKAGES = ("torch", "transformers", "optimum-quanto", "hqq")  # what transformers' caches depend on
Progress = Callable[[str], None]


@dataclasses.dataclass
class _Run:
    """One candidate's cache and what it has added up."""

    candidate: Candidate
    cache: Cache | None = None
    note: str = ""
    kl: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # predictions and mean of each chunk
    equal: int = 0
    log_likelihood: float = 0.0
    targets: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, candidate: Candidate, config: Any) -> _Run:
        return cls(candidate, *candidate.try_make(config))

    def log_probs(self, model: PreTrainedModel, cache: Cache, ids: torch.Tensor, first: int) -> torch.Tensor | None:
        """Next-token log-probabilities `[n, V]` of a chunk's tokens from `first` on; None where none is measured."""
        started = time.perf_counter()
        wanted = ids.shape[1] - first
        logits = forward(model, ids, cache, keep=max(1, wanted))
        self.seconds += time.perf_counter() - started
        return logits.log_softmax(-1) if wanted > 0 else None

    def add(self, log_q: torch.Tensor, log_p: torch.Tensor, p: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in the predictions of a chunk: `log_q` its own, `log_p` and `p` the reference's, `[n, V]`."""
        self.kl.append((log_q.shape[0], (p * (log_p - log_q)).sum(-1).double().mean().item()))
        self.equal += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        chosen = log_q[: len(targets)].gather(1, targets.unsqueeze(1))
        self.log_likelihood += chosen.double().sum().item()
        self.targets += len(targets)

    def row(self) -> QualityRow:
        candidate = self.candidate
        row = QualityRow(candidate.name, candidate.kind, candidate.options, candidate.stored_bits, note=self.note)
        if self.cache is None:
            return row
        predictions = sum(count for count, _ in self.kl)
        means = [mean for _, mean in self.kl]
        return dataclasses.replace(
            row,
            stored_bits=stored_bits(self.cache, candidate),
            perplexity=_exp(-self.log_likelihood / self.targets),
            kl=sum(count * mean for count, mean in self.kl) / predictions,
            kl_error=statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
            top1=self.equal / predictions,
            seconds=self.seconds,
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@torch.inference_mode()
def measure_quality(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    caches: Mapping[str, Mapping[str, Any] | CacheFactory] | Iterable[Candidate],
    *,
    chunk: int = CHUNK,
    skip: int = SKIP,
    processes: Processes | None = None,
    model_name: str = "",
    text_name: str = "",
    progress: Progress | None = None,
    reference: Candidate | None = None,
) -> QualityResult:
    """Stream a text through caches side by side and compare their predictions with full precision's.

    Args:
        model: any causal LM; a stock one works too, with dequantized states.
        input_ids: int64 `[1, T]`.
        caches: what to compare, by name: KIVI options (`{"k_bits": 4}`; the others have their defaults), or a function
            from the model's config to an empty cache. Full precision, or `reference`, is measured beside them.
        chunk: tokens that go through the caches at once.
        skip: tokens before the first measured prediction, a multiple of `chunk` or not.
        processes: that share the caches, each beside full precision of its own; each gets the rows of all. None: this one
            alone.
        model_name, text_name: for the record.
        progress: called with a candidate's name after each of its chunks.
        reference: the cache whose predictions the others are compared with; None for full precision.

    Returns:
        A `QualityResult`; a candidate whose package is missing has a note instead of numbers.

    Raises:
        ValueError: for ids of another shape, a text not longer than `skip + 1`, or options that are not allowed.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must have the shape [1, tokens]; got {tuple(input_ids.shape)}.")
    check_count("chunk", chunk, 1)
    check_count("skip", skip, 0)
    if input_ids.shape[1] < skip + 2:
        raise ValueError(
            f"a text of {input_ids.shape[1]} tokens has no target after the first {skip} (skip) and one more."
        )
    team = processes or Processes()
    first = full_precision() if reference is None else reference
    candidates = [first, *team.share(as_candidates(caches))]
    runs = [_Run.start(candidate, model.config) for candidate in candidates]
    for start, piece in chunks(input_ids, chunk):
        _one_chunk(model, runs, input_ids, start, piece, skip, progress)
    return QualityResult(
        model=model_name,
        text=text_name,
        digest=digest(input_ids),
        tokens=input_ids.shape[1],
        chunk=chunk,
        skip=skip,
        predictions=input_ids.shape[1] - skip,
        rows=[runs[0].row(), *team.gather(run.row() for run in runs[1:])],
        environment=Environment.here(model),
    )


def _one_chunk(
    model: PreTrainedModel,
    runs: list[_Run],
    input_ids: torch.Tensor,
    start: int,
    piece: torch.Tensor,
    skip: int,
    progress: Progress | None,
) -> None:
    first = max(0, skip - start)
    targets = input_ids[0, start + first + 1 : start + piece.shape[1] + 1].to(model.device)
    log_p = p = None
    for run in runs:
        if run.cache is None:
            continue
        log_q = run.log_probs(model, run.cache, piece, first)
        if log_q is not None:
            if log_p is None or p is None:  # the first run is the reference
                log_p, p = log_q, log_q.exp()
            run.add(log_q, log_p, p, targets)
        if progress is not None:
            progress(run.candidate.name)


def keep_peers(result: QualityResult, earlier: QualityResult | None) -> QualityResult:
    """`result` with the rows of other methods that an earlier run has of the same text, versions and settings.

    They are slow and none of our changes moves them.
    """
    if earlier is None or any(_conditions(result)[name] != value for name, value in _conditions(earlier).items()):
        return result
    known = {row.name for row in result.rows}
    kept = [
        dataclasses.replace(row, date=row.date or earlier.environment.date)
        for row in earlier.rows
        if row.kind in OTHERS and row.name not in known and row.kl is not None
    ]
    return dataclasses.replace(result, rows=[*result.rows, *kept])


def _conditions(result: QualityResult) -> dict[str, Any]:
    same = {name: getattr(result, name) for name in ("model", "digest", "chunk", "skip", "predictions")}
    packages = {name: result.environment.packages.get(name) for name in PEER_PACKAGES}
    return {**same, "dtype": result.environment.dtype, "packages": packages}
