"""Answers in the format of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from typing import Any

from modules.serving.job import Job


class Reply:
    """What is common to all that is sent of one answer.

    Args:
        model: its name.
        chat: of `/v1/chat/completions`, else of `/v1/completions`.
    """

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self.name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": self.name, "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, job: Job) -> dict[str, Any]:
        """An answer at once."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._with(kind, [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]) | {
            "usage": usage(job)
        }

    def chunk(self, text: str | None = None, *, first: bool = False, reason: str | None = None) -> dict[str, Any]:
        """A piece of an answer; the `first` one names who speaks, the last one why it ended."""
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return self._with("chat.completion.chunk", [choice])
        return self._with(
            "text_completion", [{"index": 0, "text": text or "", "logprobs": None, "finish_reason": reason}]
        )

    def usage_chunk(self, job: Job) -> dict[str, Any]:
        """The last chunk, for a client that asked for it."""
        return self._with("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": usage(job)}

    def _with(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}


def usage(job: Job) -> dict[str, Any]:
    """Tokens of the prompt, of those that a kept cache held, and of the answer."""
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": job.said,
        "total_tokens": len(job.prompt) + job.said,
        "prompt_tokens_details": {"cached_tokens": job.cached},
    }
