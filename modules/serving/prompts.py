"""The tokens of a request, and what fits into the model's context."""

from __future__ import annotations

import threading

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from modules.serving.errors import ApiError
from modules.serving.schemas import ChatRequest, CompletionRequest

_COMPLETION_TOKENS = 16  # of a completion that names no limit, as OpenAI's API has it


class Prompts:
    """Makes tokens of requests; one at a time, as a tokenizer may hold settings.

    Args:
        context: tokens of a prompt and its answer together.
        vocabulary: number of tokens that there are.
        max_tokens: longest answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, vocabulary: int, max_tokens: int) -> None:
        self.tokenizer, self.context, self.vocabulary, self.max_tokens = tokenizer, context, vocabulary, max_tokens
        self._one = threading.Lock()

    def of_chat(self, request: ChatRequest) -> tuple[list[int], int]:
        """The tokens of a conversation, and of the longest answer to it.

        Raises:
            ApiError: for messages that the model's template refuses, and for what does not fit.
        """
        if self.tokenizer.chat_template is None:
            raise ApiError(400, "the model has no chat template; use /v1/completions.", param="messages")
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses this: {error}", param="messages") from error
        asked = request.max_completion_tokens or request.max_tokens
        return self._fitting(self._tokens(str(text), special=False), asked, None, "messages")

    def of_completion(self, request: CompletionRequest) -> tuple[list[int], int]:
        """The tokens of a prompt, and of the longest answer to it. Raises as `of_chat`."""
        if isinstance(request.prompt, str):
            tokens = self._tokens(request.prompt, special=True)
        else:
            tokens = request.prompt
            wrong = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
            if wrong is not None:
                raise ApiError(
                    400, f"the model has the tokens 0 to {self.vocabulary - 1}; got {wrong}.", param="prompt"
                )
        return self._fitting(tokens, request.max_tokens, _COMPLETION_TOKENS, "prompt")

    def _tokens(self, text: str, special: bool) -> list[int]:
        with self._one:
            return self.tokenizer(text, add_special_tokens=special).input_ids

    def _fitting(self, tokens: list[int], asked: int | None, default: int | None, param: str) -> tuple[list[int], int]:
        left = self.context - len(tokens)
        if not tokens:
            raise ApiError(400, "the prompt has no tokens.", param=param)
        if left < 1 or (asked or 0) > left:
            wanted = f" and {asked} were asked for" if asked else ""
            raise ApiError(
                400, f"the context has {self.context} tokens; the prompt has {len(tokens)}{wanted}.",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        if (asked or 0) > self.max_tokens:
            raise ApiError(400, f"an answer has at most {self.max_tokens} tokens; got {asked}.", param="max_tokens")
        return tokens, asked or min(left, self.max_tokens, default or left)
