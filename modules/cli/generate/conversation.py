"""A conversation over one cache: a turn feeds only what is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.cli.generate.streaming import Answer, Choice, TextStream, answer, likeliest, stop_tokens
from modules.cli.status import UserError
from modules.kivi_cache_general import KIVICache

_ANSWER = "KIVI-ANSWER"  # stands for an earlier answer in a template, to find what comes after one


def turn_text(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool, system: str | None = None) -> str:
    """A turn as the model's chat template writes it, the beginning of the answer included.

    A later turn begins with what ends the answer before it, so that the history is never written anew: it stays what the
    model said, token by token, as the cache holds it.

    Raises:
        UserError: for a template that does not show earlier answers.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    if not first:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    messages.append({"role": "user", "content": text})
    whole = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    if first:
        return whole
    _, answered, after = whole.partition(_ANSWER)
    if not answered:
        raise UserError("the model's chat template leaves out earlier answers, so turns cannot go on; use --raw.")
    return after


class Conversation:
    """Turns of a user and a model.

    Args:
        model: a KIVI model.
        tokenizer: its own.
        cache: empty, or with a conversation in it.
        tokens: of the conversation that `cache` holds; its last one may be yet to be fed.
        system: what the model is told before the first turn.
        raw: turns go in as they are; also where the tokenizer has no chat template.

    Attributes:
        tokens: all tokens so far but for those that end an answer. The cache holds the first `cache.get_seq_length()`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: KIVICache,
        *,
        tokens: Sequence[int] = (),
        system: str | None = None,
        raw: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.tokens = list(tokens)
        self.system, self.raw = system, raw or tokenizer.chat_template is None

    def ids(self, text: str) -> list[int]:
        """The tokens of a turn, those that end the answer before it included."""
        first = not self.tokens
        if self.raw:
            return self.tokenizer(text, add_special_tokens=first).input_ids
        return self.tokenizer(
            turn_text(self.tokenizer, text, first=first, system=self.system), add_special_tokens=False
        ).input_ids

    def ask(
        self,
        text: str,
        *,
        max_new_tokens: int,
        write: Callable[[str], Any] = lambda piece: None,
        choose: Choice = likeliest,
    ) -> tuple[str, Answer]:
        """The text of an answer, given to `write` piece by piece as it comes, and what it took.

        After Ctrl-C the conversation goes on from what was said until then; a turn that was not read to its end is dropped.

        Raises:
            UserError: for a turn that leaves the model's context; nothing has changed then.
        """
        tokens = self.tokens + self.ids(text)
        self.check_length(len(tokens), max_new_tokens)
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        stream = TextStream(self.tokenizer, take)
        stop = stop_tokens(self.model, self.tokenizer)
        result = answer(
            self.model,
            self.new_ids(tokens),
            self.cache,
            max_new_tokens=max_new_tokens,
            stop=stop,
            on_token=stream.put,
            choose=choose,
        )
        stream.end()
        said = result.tokens[:-1] if result.tokens and result.tokens[-1] in stop else result.tokens
        self.tokens = (tokens + said) if result.tokens else tokens[: self.cache.get_seq_length()]
        return "".join(pieces), result

    def reset(self) -> None:
        """Forget everything that was said."""
        self.cache.reset()
        self.tokens = []

    def new_ids(self, tokens: list[int]) -> torch.Tensor:
        """Those that the cache does not hold, `[1, tokens]`."""
        return torch.tensor([tokens[self.cache.get_seq_length() :]], dtype=torch.long, device=self.model.device)

    def check_length(self, tokens: int, max_new_tokens: int) -> None:
        """Raise `UserError` where so many tokens and an answer leave the model's context."""
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and tokens + max_new_tokens > context:
            raise UserError(
                f"the conversation has {tokens} tokens and up to {max_new_tokens} are to follow; the model's limit is "
                f"{context}. Give a shorter prompt or fewer --max-new-tokens."
            )
