"""Tokens through a model and a cache, a chunk at a time, so that every prediction sees a stored past."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

CHUNK = 128
Tick = Callable[[int], None]
Stop = Callable[[list[int]], bool]


def check_count(name: str, value: int, minimum: int, unit: str = "tokens") -> None:
    """Raise `ValueError` where `value` is no whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number of {unit}, {minimum} or more; got {value!r}.")


def chunks(ids: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Pieces `[1, size]` of token ids `[1, T]`, each with the index of its first token."""
    for start in range(0, ids.shape[1], size):
        yield start, ids[:, start : start + size]


def forward(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, keep: int = 0) -> torch.Tensor:
    """Logits of the tokens `[1, n]` over what `cache` holds and then takes in, float32 `[n or keep, vocabulary]`."""
    output = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return output.logits[0].float()


def prefill(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, chunk: int = CHUNK, tick: Tick | None = None
) -> torch.Tensor:
    """Send a prompt `[1, T]` through a cache in chunks; the logits of its last token, float32 `[vocabulary]`."""
    for _, piece in chunks(ids, chunk):
        logits = forward(model, piece, cache, keep=1)
        if tick is not None:
            tick(piece.shape[1])
    return logits[-1]


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    new_tokens: int,
    chunk: int = CHUNK,
    tick: Tick | None = None,
    stop: Stop | None = None,
) -> list[int]:
    """The greedy continuation of a prompt `[1, T]`, `new_tokens` token ids, the prompt in chunks through the cache.

    `stop` is asked with the tokens so far and ends it early.
    """
    logits = prefill(model, ids, cache, chunk, tick)
    answer = [int(logits.argmax())]
    while len(answer) < new_tokens and not (stop is not None and stop(answer)):
        logits = forward(model, torch.tensor([answer[-1:]]), cache, keep=1)[-1]
        answer.append(int(logits.argmax()))
    return answer
