"""Answers that are made together: one cache whose sequences come and go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from modules.cache.rows import gather
from modules.kivi_cache_general import KIVICache
from modules.serving.job import Job


class Batch:
    """Jobs that have their first token, and the cache that holds the tokens before their newest one, a sequence each.

    Each prompt is fed alone, over a cache of its own; its sequence then joins the others as it is stored, so that a job gets
    what it gets alone, up to the order in which floats of a larger matrix are added.

    Args:
        leave: called with each job that is over, and a cache of its own that it leaves; None where nobody wants those.
    """

    def __init__(self, model: PreTrainedModel, leave: Callable[[Job, KIVICache], None] | None) -> None:
        self.model, self.leave = model, leave
        self.jobs: list[Job] = []
        self._cache: KIVICache | None = None

    def join(self, job: Job, cache: KIVICache) -> None:
        """Take in a job that has its first token; one that is over by then leaves at once. A failure changes nothing."""
        if job.is_over():
            self._let_go(job, cache, 0)
            return
        parts = [cache] if self._cache is None else [self._cache, cache]
        self._cache = gather([(part, range(part.batch_size)) for part in parts]) if len(parts) > 1 else cache
        self.jobs.append(job)

    def step(self) -> None:
        """One more token of each job; those that are over leave, before and after."""
        self.drop_those_over()
        if not self.jobs:
            return
        newest = torch.tensor([job.tokens[-1:] for job in self.jobs], device=self.model.device)
        logits = self.model(input_ids=newest, past_key_values=self._cache, use_cache=True).logits[:, -1]
        for row, job in enumerate(self.jobs):
            job.draw(logits[row : row + 1])
        self.drop_those_over()

    def drop_those_over(self) -> None:
        """Let jobs go that have ended or that nobody waits for."""
        over = [row for row, job in enumerate(self.jobs) if job.is_over()]
        if not over or self._cache is None:
            return
        cache = self._cache
        for row in over:
            self._let_go(self.jobs[row], cache, row)
        staying = [row for row in range(len(self.jobs)) if row not in over]
        self.jobs = [self.jobs[row] for row in staying]
        self._cache = gather([(cache, staying)]) if staying else None

    def _let_go(self, job: Job, cache: KIVICache, row: int) -> None:
        if self.leave is not None and not job.broken:
            self.leave(job, cache if cache.batch_size == 1 else gather([(cache, [row])]))

    def clear(self) -> list[Job]:
        """Forget all; the jobs that were in it."""
        jobs, self.jobs, self._cache = self.jobs, [], None
        return jobs
