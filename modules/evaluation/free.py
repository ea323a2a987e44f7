"""Caches on a text that the model itself writes through them, where errors could add up.

With p full precision and q the model with a quantized cache, each row of a batch is a prompt and a way to go on:
greedily, by sampling (temperature 1, several seeds; the same noise for every cache) or along the text that full precision
wrote. Prompts go through the cache in chunks; new tokens one at a time, and an end-of-text token is a token like others.

- **KL on its own text**: the mean of KL(p || q) at each token x_t given x_<t, where q's cache wrote x. p comes from full
  precision that is led along x, with a cache of its own. Full precision itself, or with other seeds, has 0.
- **KL on full precision's text**: the same where p wrote x, what a teacher-forced measurement shows. Errors that add up
  make the first larger than the second, and its last quarter larger than its first.
- **Sequence KL**: the mean of KL(q || p) on sampled text of its own. By the chain rule it is, times the tokens, the
  divergence of the distributions of whole texts, KL(q(x) || p(x)).
- **log p**: the mean log-probability of a sampled token under full precision. A text that drifts has less of it than full
  precision's own texts (one that falls into repetition has more). Its interval is over samples. Full precision with other
  seeds says how far two sets of samples differ where there is no quantization at all.
- **First divergence**: new tokens that are equal before one differs from what full precision chose with the same noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from modules.evaluation.candidates import CacheFactory, Candidate, as_candidates, full_precision, stored_bits
from modules.evaluation.environment import Environment
from modules.evaluation.results import FreeResult, FreeRow
from modules.evaluation.rounded import RoundedLayer
from modules.evaluation.statistics import mean_and_interval
from modules.evaluation.streaming import CHUNK, check_count, chunks
from modules.evaluation.texts import digest
from modules.kivi_cache_general import KIVICache

OTHER_SEEDS = "full precision, other seeds"
NEW_TOKENS = 1000
SEEDS = 3
QUARTERS = 4
_SCORED_AT_ONCE = 32  # tokens whose distributions are kept until full precision has scored them
Progress = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class _Ways:
    """How the rows of a batch go on: of each prompt one greedily, `seeds` by sampling, and one along a given text."""

    prompts: int
    seeds: int
    first_seed: int
    forced: bool

    @property
    def each(self) -> int:
        return 1 + self.seeds + self.forced

    def rows(self, kind: str) -> list[int]:
        """Rows of a kind: "greedy", "sampled" or "forced"."""
        wanted = {"greedy": [0], "sampled": list(range(1, 1 + self.seeds)), "forced": [self.each - 1]}[kind]
        return [prompt * self.each + way for prompt in range(self.prompts) for way in wanted]


@dataclasses.dataclass
class _Written:
    """What a cache wrote and how it was scored, a line a row of the batch."""

    tokens: torch.Tensor  # int64 [rows, new]
    forward: torch.Tensor  # KL(p || q), float64 [rows, new]
    backward: torch.Tensor  # KL(q || p)
    log_p: torch.Tensor  # of the tokens under full precision


@torch.inference_mode()
def measure_free(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    caches: Mapping[str, Mapping[str, Any] | CacheFactory] | Iterable[Candidate],
    *,
    new_tokens: int = NEW_TOKENS,
    seeds: int = SEEDS,
    chunk: int = CHUNK,
    model_name: str = "",
    text_name: str = "",
    progress: Progress | None = None,
) -> FreeResult:
    """Let a model go on from prompts through full precision and other caches, and compare what they write.

    Args:
        model: any causal LM.
        prompts: int64 `[P, T]`, without padding.
        caches: as for `measure_quality`.
        new_tokens: of each continuation.
        seeds: samples of each prompt.
        chunk: tokens of the prompts that go through a cache at once.
        model_name, text_name: for the record.
        progress: called with a candidate's name and the tokens it has gone on by.

    Returns:
        One row a cache, full precision and full precision with other seeds first.

    Raises:
        ValueError: for counts, prompts or options that are not allowed.
    """
    for name, value, least, unit in (
        ("new_tokens", new_tokens, QUARTERS, "tokens"),
        ("seeds", seeds, 2, "samples"),
        ("chunk", chunk, 1, "tokens"),
    ):
        check_count(name, value, least, unit)
    if prompts.ndim != 2 or not prompts.numel():
        raise ValueError(f"prompts must be token ids [prompts, tokens]; got a shape of {tuple(prompts.shape)}.")
    writer = _Writer(model, prompts, new_tokens, chunk, progress)
    ways = _Ways(len(prompts), seeds, 0, forced=False)
    reference, _ = writer.write(full_precision(), ways)
    others, _ = writer.write(full_precision(), dataclasses.replace(ways, first_seed=seeds), OTHER_SEEDS)
    against = ways, reference
    rows = [_row(full_precision(), ways, reference), _row(full_precision(), ways, others, against, OTHER_SEEDS)]
    texts = reference.tokens[[prompt * ways.each + 1 for prompt in range(len(prompts))]]
    led = dataclasses.replace(ways, forced=True)
    for candidate in as_candidates(caches):
        made, note = candidate.try_make(model.config)
        if made is None:
            rows.append(FreeRow(candidate.name, candidate.kind, candidate.options, candidate.stored_bits, note=note))
            continue
        written, cache = writer.write(candidate, led, texts=texts)
        bits = stored_bits(cache, candidate)
        rows.append(dataclasses.replace(_row(candidate, led, written, against), stored_bits=bits))
    return FreeResult(
        model=model_name,
        text=text_name,
        digest=digest(prompts),
        prompts=len(prompts),
        prompt_tokens=prompts.shape[1],
        new_tokens=new_tokens,
        seeds=seeds,
        chunk=chunk,
        rows=rows,
        environment=Environment.here(model),
    )


class _Writer:
    """Goes on from the prompts through one cache after another."""

    def __init__(
        self, model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, chunk: int, progress: Progress | None
    ) -> None:
        self.model, self.prompts, self.new_tokens, self.chunk = model, prompts, new_tokens, chunk
        self.progress = progress

    def write(
        self, candidate: Candidate, ways: _Ways, name: str = "", texts: torch.Tensor | None = None
    ) -> tuple[_Written, Cache]:
        """A continuation of every row, scored by full precision, and the cache that it went through."""
        cache, logits = self._start(candidate, ways.each)
        judge, judged = (None, logits) if candidate.kind == "full" else self._start(full_precision(), ways.each)
        noise = _Noise(ways, logits)
        tokens, kept, scores = [], [], []
        for step in range(self.new_tokens):
            log_q = logits.log_softmax(-1)
            kept.append(log_q)
            tokens.append(self._choose(log_q, ways, noise, texts, step))
            if len(kept) == _SCORED_AT_ONCE or step + 1 == self.new_tokens:
                block = torch.stack(tokens[-len(kept) :], 1)
                if judge is None:
                    scores.append(_compare(torch.stack(kept, 1), torch.stack(kept, 1), block))
                else:
                    after = self._forward(block, judge)
                    log_p = torch.cat([judged[:, None], after[:, :-1]], 1).log_softmax(-1)
                    scores.append(_compare(torch.stack(kept, 1), log_p, block))
                    judged = after[:, -1]
                kept = []
            if step + 1 < self.new_tokens:
                logits = self._forward(tokens[-1][:, None], cache)[:, -1]
            if self.progress is not None:
                self.progress(name or candidate.name, 1)
        forward, backward, log_p = (torch.cat(parts, 1) for parts in zip(*scores))
        return _Written(torch.stack(tokens, 1), forward, backward, log_p), cache

    def _forward(self, ids: torch.Tensor, cache: Cache, keep: int = 0) -> torch.Tensor:
        """Logits `[rows, tokens or keep, V]`, float32."""
        ids = ids.to(self.model.device)
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits.float()

    def _start(self, candidate: Candidate, each: int) -> tuple[Cache, torch.Tensor]:
        """A cache that holds every prompt `each` times, and the logits after them `[rows, V]`."""
        cache = candidate.make(self.model.config)
        late = isinstance(cache, KIVICache) or all(
            type(layer) in (DynamicLayer, RoundedLayer) for layer in cache.layers
        )
        ids = self.prompts if late else self.prompts.repeat_interleave(each, 0)
        for _, piece in chunks(ids, self.chunk):
            logits = self._forward(piece, cache, keep=1)[:, -1]
        if late:  # transformers' quantized layers cannot repeat what they have packed
            cache.batch_repeat_interleave(each)
            logits = logits.repeat_interleave(each, 0)
        return cache, logits

    def _choose(
        self, log_q: torch.Tensor, ways: _Ways, noise: _Noise, texts: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """The next token of every row, int64 `[rows]`."""
        sampled = ways.rows("sampled")
        chosen = log_q.argmax(-1)
        chosen[sampled] = (log_q[sampled] + noise.next()).argmax(-1)
        if ways.forced:
            if texts is None:
                raise ValueError("rows that follow a text need one.")
            chosen[ways.rows("forced")] = texts[:, step].to(chosen.device)
        return chosen


class _Noise:
    """Gumbel noise for a sample: the same for every cache, so that caches that agree choose alike."""

    def __init__(self, ways: _Ways, logits: torch.Tensor) -> None:
        self.generators = [
            torch.Generator().manual_seed(1_000_003 * prompt + ways.first_seed + seed)
            for prompt in range(ways.prompts)
            for seed in range(ways.seeds)
        ]
        self.vocabulary, self.device = logits.shape[-1], logits.device

    def next(self) -> torch.Tensor:
        """Of one step, float32 `[samples, V]`."""
        waits = [torch.empty(self.vocabulary).exponential_(generator=generator) for generator in self.generators]
        return -torch.stack(waits).clamp_min(1e-30).log().to(self.device)


def _compare(log_q: torch.Tensor, log_p: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """KL(p || q), KL(q || p) and log p of the tokens, float64 `[rows, n]`, from log-probabilities `[rows, n, V]`."""
    difference = log_p - log_q
    chosen = log_p.gather(-1, tokens[..., None])[..., 0]
    parts = (log_p.exp() * difference).sum(-1), -(log_q.exp() * difference).sum(-1), chosen
    return tuple(part.double().cpu() for part in parts)


def _row(
    candidate: Candidate,
    ways: _Ways,
    written: _Written,
    against: tuple[_Ways, _Written] | None = None,
    name: str = "",
) -> FreeRow:
    """What a cache's texts show; `against` holds full precision's."""
    own = [*ways.rows("greedy"), *ways.rows("sampled")]
    sampled = ways.rows("sampled")
    kl, kl_error = mean_and_interval(written.forward[own].mean(1).tolist())
    log_p, log_p_error = mean_and_interval(written.log_p[sampled].mean(1).tolist())
    row = FreeRow(
        name=name or candidate.name,
        kind=candidate.kind,
        options=candidate.options,
        stored_bits=candidate.stored_bits,
        kl_own=kl,
        kl_own_error=kl_error,
        kl_quarters=[part.mean().item() for part in written.forward[own].tensor_split(QUARTERS, 1)],
        sequence_kl=written.backward[sampled].mean().item(),
        log_p=log_p,
        log_p_error=log_p_error,
    )
    if against is None:
        return row
    other_ways, full = against
    gap = written.log_p[sampled].mean(1) - full.log_p[other_ways.rows("sampled")].mean(1)
    difference, difference_error = mean_and_interval(gap.tolist())
    first = {
        kind: _first_difference(written.tokens[ways.rows(kind)], full.tokens[other_ways.rows(kind)])
        for kind in ("greedy", "sampled")
    }
    return dataclasses.replace(
        row,
        kl_forced=written.forward[ways.rows("forced")].mean().item() if ways.forced else None,
        log_p_change=difference,
        log_p_change_error=difference_error,
        diverged_greedy=first["greedy"],
        diverged_sampled=first["sampled"],
    )


def _first_difference(ours: torch.Tensor, theirs: torch.Tensor) -> list[int]:
    """Of each row, tokens that are equal before the first that is not; all of them where none differs."""
    differs = torch.cat([ours != theirs, torch.ones_like(ours[:, :1], dtype=torch.bool)], 1)
    return differs.int().argmax(1).tolist()
