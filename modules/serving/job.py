"""One answer: what is asked, and what came of it so far."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from modules.cli.generate.streaming import Choice, TextStream
from modules.serving.errors import ApiError, server_error, too_slow
from modules.serving.stops import StopText

log = logging.getLogger("kivi.serve")


@dataclasses.dataclass(frozen=True)
class Piece:
    """More of the text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Done:
    """The end: "stop" by the model or a text that ends the answer, "length" by `max_tokens`."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The end without an answer."""

    error: ApiError


Event = Piece | Done | Failed


class Job:
    """An answer that is to be made; its events go to `emit`, which may be called from another thread.

    Args:
        prompt: tokens.
        max_tokens: longest answer.
        choose: gives the next token by the logits.
        ends: tokens that end the answer.
        stops: texts that do.
        seconds: it may take in all, waiting included.

    Attributes:
        tokens: of the answer so far, the one that ended it included.
        cached: tokens of the prompt that a kept cache held.
        cancelled: nobody waits for it any more.
        ended: `Done` or `Failed` was emitted.
        broken: no token could be taken from its logits, so that its cache is good for nothing.
        first_token: when the first token came, by `time.monotonic`; None before.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        emit: Callable[[Event], None],
        *,
        max_tokens: int,
        choose: Choice,
        ends: set[int],
        stops: Sequence[str] = (),
        seconds: float,
    ) -> None:
        self.prompt, self.max_tokens, self.choose, self.ends = list(prompt), max_tokens, choose, ends
        self.tokens: list[int] = []
        self.cached, self.cancelled, self.ended, self.broken = 0, False, False, False
        self.asked = time.monotonic()
        self.first_token: float | None = None
        self._emit, self._seconds = emit, seconds
        self._stop = StopText(stops, lambda text: self._emit(Piece(text)))
        self._text = TextStream(tokenizer, self._stop.put)

    @property
    def said(self) -> int:
        """Tokens of the answer, without one of the model's that ended it."""
        return len(self.tokens) - bool(self.tokens and self.tokens[-1] in self.ends)

    def draw(self, logits: torch.Tensor) -> None:
        """Take the next token by logits `[1, vocabulary]`. What fails here is this job's own failure: it ends with it."""
        try:
            self.take(int(self.choose(logits)))
        except Exception:
            log.exception("no token could be taken; its answer is given up")
            self.broken = True
            self.fail(server_error("the model failed on this request; see the server's log."))

    def take(self, token: int) -> None:
        """Count a token in; the job may have ended with it."""
        self.first_token = self.first_token or time.monotonic()
        self.tokens.append(token)
        if token in self.ends:
            self._end("stop")
            return
        self._text.put(token)
        if self._stop.found:
            self._end("stop")
        elif len(self.tokens) >= self.max_tokens:
            self._end("length")

    def _end(self, reason: str) -> None:
        self._text.end()
        reason = "stop" if self._stop.found else reason
        self._stop.end()
        self._finish(Done(reason))

    def fail(self, error: ApiError) -> None:
        """End without an answer."""
        if not self.ended:
            self._finish(Failed(error))

    def _finish(self, event: Event) -> None:
        self.ended = True
        self._emit(event)

    def is_over(self) -> bool:
        """Whether there is nothing more to do for it; a job that took too long fails here."""
        if not (self.ended or self.cancelled) and time.monotonic() - self.asked > self._seconds:
            self.fail(too_slow(self._seconds))
        return self.ended or self.cancelled
