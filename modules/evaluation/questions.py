"""What a task is made of: a context, and questions about it that one copy of its cache after another answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Question:
    """A question whose answer can be judged.

    Attributes:
        task: its name.
        text: what follows the context; the model goes on from there.
        expected: a right answer, in words, for the record.
        judge: whether the text that the model went on with is right.
        new_tokens: that the answer may have; it ends before at a line's end.
    """

    task: str
    text: str
    expected: str
    judge: Callable[[str], bool]
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Context:
    """A text that several questions share.

    Attributes:
        ids: its token ids; length: what was asked for, in tokens.
        questions: about it.
    """

    ids: list[int]
    length: int
    questions: Sequence[Question]


def few_shots(
    tokenizer: PreTrainedTokenizerBase, header: str, shots: Sequence[str], questions: Sequence[Question], length: int
) -> Context:
    """A context of worked examples, as many of `shots` as fit in `length` tokens.

    Raises:
        ValueError: where fewer than two fit, or all of them do not fill three quarters of it.
    """
    ids, count = tokenizer(header)["input_ids"], 0
    for shot in shots:
        more = tokenizer(shot, add_special_tokens=False)["input_ids"]
        if len(ids) + len(more) > length:
            break
        ids, count = [*ids, *more], count + 1
    if count < 2 or len(ids) < 0.75 * length:
        raise ValueError(f"{count} examples of {len(ids)} tokens do not make a context of {length} tokens.")
    return Context(ids, length, questions)
