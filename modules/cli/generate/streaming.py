"""Tokens one by one: decoding, drawing, turning into text, and stopping on Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

Choice = Callable[[torch.Tensor], torch.Tensor]


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token `[1, 1]` by logits `[1, vocabulary]`."""
    return logits.argmax(dim=-1, keepdim=True)


def drawn(temperature: float, top_p: float = 1.0, seed: int | None = None) -> Choice:
    """What draws a token by its probability at a temperature, from the likeliest ones; `likeliest` at 0."""
    if temperature == 0:
        return likeliest
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        probabilities = warpers(torch.empty(1, 0, dtype=torch.long), logits.float()).softmax(-1)
        return torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)

    return draw


class TextStream:
    """Turns tokens, one at a time, into text as soon as it is certain.

    A token may be a part of a character, and some tokenizers drop the space before a first word, so the text of a token
    is what it adds to the text of the tokens before it; it is held back while it ends in an unfinished character.

    Args:
        tokenizer: of the model.
        write: gets each piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.start = 0  # from here on tokens are decoded, for context
        self.written = 0  # tokens before here are written

    def put(self, token: int) -> None:
        """Take the next token."""
        self.tokens.append(token)
        text = self._new_text()
        if text and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._emit(text)

    def end(self) -> None:
        """Write what was held back."""
        self._emit(self._new_text())

    def _new_text(self) -> str:
        before, all_text = (
            self.tokenizer.decode(self.tokens[self.start : stop], skip_special_tokens=True)
            for stop in (self.written, len(self.tokens))
        )
        return all_text[len(before) :]

    def _emit(self, text: str) -> None:
        self.start, self.written = self.written, len(self.tokens)
        self.write(text)


@dataclasses.dataclass
class Answer:
    """What `answer` produced.

    Attributes:
        tokens: the new tokens, a stop token included.
        first_seconds: until the first token was there (the prompt's forward).
        step_seconds: of the forward of each other token.
        interrupted: ended by Ctrl-C.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    first_seconds: float = 0.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """By the median step after the first token, so that what is compiled once does not count; 0 without a step."""
        return 1 / statistics.median(self.step_seconds) if self.step_seconds else 0.0


class CtrlC:
    """Whether Ctrl-C was pressed. It raises `KeyboardInterrupt` while `raises`, else it is noted; a second one raises."""

    def __init__(self) -> None:
        self.pressed, self.raises = False, True

    def __call__(self, *_: Any) -> None:
        if self.pressed or self.raises:
            raise KeyboardInterrupt
        self.pressed = True


@contextlib.contextmanager
def watching_ctrl_c() -> Iterator[CtrlC]:
    """Within it Ctrl-C goes to what is yielded, in the main thread; elsewhere it stays as it is."""
    ctrl_c = CtrlC()
    if threading.current_thread() is not threading.main_thread():
        yield ctrl_c
        return
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)


def answer(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    *,
    max_new_tokens: int,
    stop: set[int],
    on_token: Callable[[int], Any] = lambda token: None,
    choose: Choice = likeliest,
) -> Answer:
    """Decoding, one forward a token; the time spent in `on_token` does not count.

    Ctrl-C ends it between two tokens, or breaks off the forward of the prompt, of which the cache then holds nothing.

    Args:
        input_ids: `[1, tokens]`, those that are not in `cache` yet.
        stop: tokens that end the answer.
        on_token: gets each token as it comes, but for the one that ends the answer.
        choose: gives the next token `[1, 1]` by the logits `[1, vocabulary]`.
    """
    result = Answer()
    try:
        with torch.no_grad(), watching_ctrl_c() as ctrl_c:
            while len(result.tokens) < max_new_tokens and not ctrl_c.pressed:
                start = time.perf_counter()
                logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                input_ids = choose(logits[:, -1])
                token = int(input_ids.item())
                ctrl_c.raises = False
                seconds = time.perf_counter() - start
                if result.tokens:
                    result.step_seconds.append(seconds)
                else:
                    result.first_seconds = seconds
                result.tokens.append(token)
                if token in stop:
                    break
                on_token(token)
            result.interrupted = ctrl_c.pressed
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer, by the model and by the tokenizer."""
    of_model = model.generation_config.eos_token_id
    stops = set(of_model if isinstance(of_model, list) else [of_model]) | {tokenizer.eos_token_id}
    return {token for token in stops if token is not None}
