"""The thread that has the model: prompts are fed one by one, answers made together and in the pauses of prompts."""

from __future__ import annotations

import logging
import threading
from collections import deque

import torch
from transformers import PreTrainedModel

from modules.cache.rows import can_gather
from modules.kivi_cache_general import KIVICache
from modules.serving.batch import Batch
from modules.serving.errors import ApiError, server_error
from modules.serving.job import Job
from modules.serving.pauses import pausing
from modules.serving.prefixes import PrefixCache

log = logging.getLogger("kivi.serve")
PAUSE_TOKENS = 256  # of a prompt, that answers being made wait for


class _NotWanted(Exception):
    """Nobody waits any more for what is being done."""


def _going_down() -> ApiError:
    return server_error("the server is going down.", 503, "unavailable")


class Engine:
    """Jobs wait in the order in which they come and join the answers that are being made as places are free.

    Args:
        model: a KIVI model; nothing else may run it meanwhile.
        max_batch: answers that are made together; one where a layer of the model is not packed.
        max_waiting: jobs that may wait.
        cache_memory: bytes of the caches of past conversations; those of answers being made come on top.
    """

    def __init__(self, model: PreTrainedModel, *, max_batch: int, max_waiting: int, cache_memory: int) -> None:
        empty = model.create_kivi_cache()
        options = empty.options
        self.model, self.max_waiting = model, max_waiting
        self._static = empty.static or False  # read once: sequences lie together by the same scales
        self.max_batch = max_batch if can_gather(empty) else 1
        self.prefixes = PrefixCache(cache_memory, options.sink_length + options.residual_length + options.group_size)
        self._batch = Batch(model, self._leave if cache_memory else None)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return len(self._batch.jobs)

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            ApiError: 503 where too many wait, or the server is going down.
        """
        with self._changed:
            if not self.alive:
                raise _going_down()
            if len(self._waiting) >= self.max_waiting:
                raise server_error(f"{self.max_waiting} requests are waiting already; try again later.", 503, "busy")
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End: what is not answered fails."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        reason = _going_down()
        try:
            while self._wait():
                self._turn()
        except BaseException:
            reason = server_error("the server has failed; see its log.", 503, "unavailable")
            log.exception("the engine has failed and answers nothing more")
        with self._changed:
            self._closing = True
            left = [*self._waiting, *self._batch.clear()]
            self._waiting.clear()
        for job in left:
            job.fail(reason)

    def _wait(self) -> bool:
        """Until there is something to do; False where that is to end."""
        with self._changed:
            while not (self._closing or self._waiting or self._batch.jobs):
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        self._step()
        job = self._next()
        if job is not None:
            self._feed(job)

    def _step(self) -> None:
        """One more token of each answer that is being made; they have one forward, and its failure, together."""
        try:
            self._batch.step()
        except Exception:
            log.exception("a step failed; its answers are given up")
            for job in self._batch.clear():
                job.fail(server_error("the model failed; see the server's log."))

    def _next(self) -> Job | None:
        """The job whose turn it is, where there is a place; those that nobody waits for any more are dropped, wherever they
        stand."""
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.is_over())
            return self._waiting.popleft() if self._waiting and self.running < self.max_batch else None

    def _feed(self, job: Job) -> None:
        """Feed a prompt and take its first token; its answer is then made with the others, which go on meanwhile."""

        def pause() -> None:
            if self._closing or job.is_over():
                raise _NotWanted
            self._step()

        try:
            cache = self.prefixes.find(job.prompt)
            if cache is None:
                cache = self.model.create_kivi_cache(static=self._static)
            job.cached = cache.get_seq_length()
            new = torch.tensor([job.prompt[job.cached :]], device=self.model.device)
            with pausing(self.model, PAUSE_TOKENS, pause):
                logits = self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            job.draw(logits[:, -1])
            self._batch.join(job, cache)
        except _NotWanted:
            if not job.is_over():
                job.fail(_going_down())
        except Exception:
            log.exception("a prompt failed")
            job.fail(server_error("the model failed on this prompt; see the server's log."))

    def _leave(self, job: Job, cache: KIVICache) -> None:
        self.prefixes.keep([*job.prompt, *job.tokens][: cache.get_seq_length()], cache)
