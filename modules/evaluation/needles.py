"""Needles in a haystack as RULER defines them (Hsieh et al., arXiv 2404.06654): multi-key, multi-value, variable tracking.

One haystack holds the needles of all three tasks, so that each is a distractor of the others, and several questions are
asked of it; their answers therefore depend on one another a little. Beside RULER: the filler is any text, numbers have
five digits, chains are shorter, there is no worked example, and an answer is right where it holds every expected string
(RULER gives a part of a point for a part of them).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from modules.evaluation.questions import Context, Question

ADJECTIVES = ("quiet", "golden", "broken", "distant", "clever", "wooden", "frozen", "hidden", "gentle", "ancient")
NOUNS = ("river", "garden", "window", "lantern", "bridge", "pepper", "mirror", "falcon", "anchor", "violin")
HEADER = "Some special magic numbers are hidden within the following text. Memorize them; they are asked for later.\n\n"
NEEDLE = "\nOne of the special magic numbers for {key} is: {value}.\n"
ONE_KEY = (
    "\n\nWhat is the special magic number for {key} mentioned in the text?\n"
    "The special magic number for {key} mentioned in the text is:"
)
ALL_VALUES = (
    "\n\nWhat are all the {count} special magic numbers for {key} mentioned in the text?\n"
    "The special magic numbers for {key} mentioned in the text are:"
)
FIRST_LINK, LINK = "\nVAR {name} = {value}\n", "\nVAR {name} = VAR {before}\n"
ALL_VARIABLES = (
    "\n\nFind all variables that are assigned the value {value} in the text above.\n"
    "The {count} variables that are assigned the value {value} are:"
)
MULTI_KEY, MULTI_VALUE, TRACKING = "multi-key", "multi-value", "variable tracking"
SEVERAL, CHAINS = 3, 3  # keys of several values, chains


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard needles are to tell apart.

    Attributes:
        keys: of one value each, all of which are asked for; the others are decoys.
        values: of each of the keys of several values.
        hops: of a chain: variables that are assigned another variable.

    Raises:
        ValueError: for a number that is not allowed.
    """

    keys: int = 8
    values: int = 2
    hops: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (("keys", 1, 80), ("values", 1, 20), ("hops", 0, 20)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}; got {value!r}.")


USUAL = Difficulty()


DEPTHS = (0.02, 0.92)  # of the haystack: the newest tokens of a context are in full precision
_NUMBER_TOKENS = 8  # that a number or a name may take in an answer


def haystack(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    length: int,
    seed: int,
    difficulty: Difficulty = USUAL,
) -> Context:
    """A context of exactly `length` tokens and the questions about its needles.

    Args:
        tokenizer: of the model.
        filler: token ids of the hay.
        length: in tokens.
        seed: of keys, numbers and places.
        difficulty: of the needles.

    Raises:
        ValueError: for a length that has no room for the needles, or that the filler does not fill.
    """
    numbers = random.Random(seed)
    asked = [*_about_keys(numbers, difficulty.keys, difficulty.values), *_about_chains(numbers, difficulty.hops)]
    needles = _shuffled(numbers, [own for own, _ in asked])
    header = tokenizer(HEADER)["input_ids"]
    pieces = [tokenizer(needle, add_special_tokens=False)["input_ids"] for needle in needles]
    room = length - len(header) - sum(map(len, pieces))
    if room < 4 * len(pieces):
        raise ValueError(f"a context of {length} tokens has no room for {len(pieces)} needles; give a longer one.")
    if len(filler) < room:
        raise ValueError(f"the filler has {len(filler)} tokens; {room} are needed. Give a longer text.")
    low, high = (round(depth * room) for depth in DEPTHS)
    places = sorted(numbers.sample(range(low, high), len(pieces)))
    ids, at = list(header), 0
    for place, piece in zip(places, pieces):
        ids += [*filler[at:place], *piece]
        at = place
    return Context([*ids, *filler[at:room]], length, [question for _, question in asked])


def _shuffled(numbers: random.Random, groups: list[list[str]]) -> list[str]:
    """All needles in a random order in which those of a group keep theirs: a variable is assigned before it is used."""
    order = [turn for group, turn in zip(groups, map(iter, groups)) for _ in group]
    numbers.shuffle(order)
    return [next(turn) for turn in order]


Asked = tuple[list[str], Question]  # needles and the question about them


def _about_keys(numbers: random.Random, keys: int, values: int) -> list[Asked]:
    """Keys of one value, and of several."""
    pairs = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    found = iter(numbers.sample(range(10_000, 100_000), keys + SEVERAL * values))
    asked = []
    for index, name in enumerate(numbers.sample(pairs, keys + SEVERAL)):
        task, text, count = (MULTI_KEY, ONE_KEY, 1) if index < keys else (MULTI_VALUE, ALL_VALUES, values)
        own = [str(next(found)) for _ in range(count)]
        question = _asked(task, text.format(key=name, count=count), own)
        asked.append(([NEEDLE.format(key=name, value=value) for value in own], question))
    return asked


def _about_chains(numbers: random.Random, hops: int) -> list[Asked]:
    """Chains of variables."""
    asked = []
    for value in numbers.sample(range(10_000, 100_000), CHAINS):
        names = ["".join(numbers.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 5)) for _ in range(hops + 1)]
        links = [LINK.format(name=name, before=before) for before, name in zip(names, names[1:])]
        question = _asked(TRACKING, ALL_VARIABLES.format(value=value, count=len(names)), names)
        asked.append(([FIRST_LINK.format(name=names[0], value=value), *links], question))
    return asked


def _asked(task: str, text: str, expected: list[str]) -> Question:
    return Question(
        task,
        text,
        ", ".join(expected),
        lambda answer: all(part in answer for part in expected),
        _NUMBER_TOKENS * (1 + len(expected)),
    )
