"""Few-shot problems from a generator: arithmetic in words and one line of Python. Answers are checked by running them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from modules.evaluation.questions import Context, Question, few_shots
from modules.evaluation.streaming import check_count

ARITHMETIC, CODE = "arithmetic", "code"
PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal", "Ida", "Jon")
THINGS = ("apples", "books", "coins", "stamps", "shells", "pencils", "tickets", "marbles")
SECONDS = 5  # that an answer may run
MEMORY = 1 << 30  # bytes that it may take
SHOTS = 400
LARGEST = 50


def arithmetic(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, largest: int = LARGEST
) -> Context:
    """Additions and subtractions of two numbers in words, after worked examples that fill `length` tokens.

    Args:
        tokenizer: of the model.
        length: of the context, in tokens.
        count: of questions.
        seed: of the problems.
        largest: of the two numbers.

    Raises:
        ValueError: for a length that holds no two examples, or more than there are, or for a `largest` below 2.
    """
    check_count("largest", largest, 2, "things")
    numbers = random.Random(seed)
    problems = [_sum(numbers, largest) for _ in range(SHOTS + count)]
    shots = [f"Question: {text}\nAnswer: {answer}\n\n" for text, answer in problems[count:]]
    questions = [
        Question(ARITHMETIC, f"Question: {text}\nAnswer:", str(answer), _is_number(answer), 6)
        for text, answer in problems[:count]
    ]
    return few_shots(tokenizer, "", shots, questions, length)


def _sum(numbers: random.Random, largest: int) -> tuple[str, int]:
    """A problem in words and its answer."""
    person, thing = numbers.choice(PEOPLE), numbers.choice(THINGS)
    first, second = numbers.randint(2, largest), numbers.randint(2, largest)
    if first > second and numbers.random() < 0.5:
        return f"{person} has {first} {thing} and gives {second} of them away. How many are left?", first - second
    return f"{person} has {first} {thing} and finds {second} more. How many are there now?", first + second


def _is_number(expected: int) -> Callable[[str], bool]:
    def judge(answer: str) -> bool:
        found = re.match(r"\s*(-?\d+)", answer)
        return found is not None and int(found[1]) == expected

    return judge


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function of a list of numbers: what it returns in words and as an expression."""

    words: str
    expression: str

    @property
    def asked(self) -> str:
        """The function up to its answer."""
        return f'def f(xs):\n    """Return {self.words}."""\n    return'


_REDUCTIONS = {
    "the sum of": "sum({item} for x in xs{test})",
    "a list of": "[{item} for x in xs{test}]",
    "the largest of": "max(({item} for x in xs{test}), default=0)",
    "the smallest of": "min(({item} for x in xs{test}), default=0)",
}
_ITEMS = {
    "the {which}numbers": "x",
    "the squares of the {which}numbers": "x * x",
    "twice the {which}numbers": "2 * x",
    "the {which}numbers plus one": "x + 1",
    "the remainders by seven of the {which}numbers": "x % 7",
}
_TESTS = {
    "": "",
    "even ": " if x % 2 == 0",
    "odd ": " if x % 2 == 1",
    "positive ": " if x > 0",
    "negative ": " if x < 0",
    "small ": " if abs(x) < 10",
    "large ": " if abs(x) >= 10",
}


def all_problems() -> list[Problem]:
    """Every reduction of every item under every test."""
    return [
        Problem(
            f"{reduction} {item.format(which=which)}",
            _REDUCTIONS[reduction].format(item=_ITEMS[item], test=_TESTS[which]),
        )
        for reduction, item, which in itertools.product(_REDUCTIONS, _ITEMS, _TESTS)
    ]


def code(tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Context:
    """One-line functions asked for in words, after others that fill `length` tokens; none is asked that was shown.

    Raises:
        ValueError: for a length that holds no two examples, or more than there are.
    """
    numbers = random.Random(seed)
    problems = all_problems()
    numbers.shuffle(problems)
    inputs = [[numbers.randint(-30, 30) for _ in range(size)] for size in (0, 1, 6, 9, 12)]
    shots = [f"{problem.asked} {problem.expression}\n\n" for problem in problems[count:]]
    questions = [
        Question(CODE, problem.asked, problem.expression, _gives(problem, inputs), 40) for problem in problems[:count]
    ]
    return few_shots(tokenizer, "", shots, questions, length)


def _gives(problem: Problem, inputs: list[list[int]]) -> Callable[[str], bool]:
    def judge(answer: str) -> bool:
        line = answer.partition("\n")[0]
        got = outputs(line, inputs)
        return got is not None and got == outputs(f" {problem.expression}", inputs)

    return judge


def outputs(expression: str, inputs: list[list[int]]) -> list[Any] | None:
    """What a function that returns `expression` gives for lists `xs`, run by another Python; None where it fails.

    The other process is isolated from the environment and has limits of time, memory and files. That is for mistakes, not
    for malice: what a model writes is run.
    """
    program = f"import json, sys\ndef f(xs):\n    return {expression.strip()}\n"
    program += "print(json.dumps([f(xs) for xs in json.load(sys.stdin)]))\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                input=json.dumps(inputs),
                capture_output=True,
                text=True,
                timeout=SECONDS,
                cwd=folder,
                env={},
                preexec_fn=_limit if os.name == "posix" else None,
            )
            return json.loads(done.stdout) if done.returncode == 0 else None
        except (subprocess.TimeoutExpired, ValueError):
            return None


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
