"""What `docs/quality.md` and `docs/int8.md` are made of, so that one command measures each anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from modules.cli.folder import QWEN, SMOLLM2, VARIABLE, models_folder


@dataclasses.dataclass(frozen=True)
class Step:
    """One measurement of the page.

    Attributes:
        name: on the command line and in the file name of its result.
        model: folder of the model.
        kind: of measurement: "quality", "free", "tasks" or "passkey".
        text: what goes through the caches, or the filler.
        tokens: of the text or of a prompt; new_tokens: of its continuations; lengths: of the prompts of passkeys and needles.
        candidates: name of a set of candidates; peers: transformers' own quantized caches too.
        calibration: a text by which the bits of single layers are chosen for more candidates.
    """

    name: str
    model: str
    kind: str = "quality"
    text: str = "prose"
    tokens: int = 3072
    new_tokens: int = 0
    candidates: str = "short"
    peers: bool = True
    calibration: str = ""
    lengths: tuple[int, ...] = ()

    @property
    def file(self) -> str:
        """Name of the result's file."""
        return f"quality-{self.name}.json"


PLAN = [
    Step("smollm2-prose", SMOLLM2, candidates="grid", calibration="code"),
    Step("qwen-prose", QWEN, calibration="code"),
    Step("qwen-code", QWEN, text="code", calibration="prose"),
    Step("smollm2-code", SMOLLM2, text="code", calibration="prose"),
    Step("smollm2-free", SMOLLM2, kind="free", tokens=1024, new_tokens=1000),
    Step("smollm2-tasks", SMOLLM2, kind="tasks", lengths=(4000,), peers=False),
    Step("qwen-free", QWEN, kind="free", tokens=1024, new_tokens=1000, peers=False),
    Step("qwen-tasks", QWEN, kind="tasks", lengths=(4000, 8000), peers=False),
    *(Step(f"qwen-passkey-{length}", QWEN, kind="passkey", lengths=(length,)) for length in (2000, 4000, 8000)),
]


@dataclasses.dataclass(frozen=True)
class Int8Step:
    """A model of `docs/int8.md`.

    Attributes:
        name: on the command line and in the file names of its results.
        model: folder of the model.
        texts: what goes through the caches, `tokens` of each.
        calibration: sources of the texts that it is calibrated on, `count` of `length` tokens; other parts than are measured.
    """

    name: str
    model: str
    texts: tuple[str, ...] = ("prose", "code")
    tokens: int = 1536
    calibration: tuple[str, ...] = ("prose@200000", "code@200000")
    count: int = 8
    length: int = 512


INT8_PLAN = [Int8Step("smollm2", SMOLLM2), Int8Step("qwen", QWEN)]
T = TypeVar("T", Step, Int8Step)


def steps(names: list[str]) -> list[Step]:
    """The steps of `docs/quality.md` with these names, "all" standing for the whole page.

    Raises:
        ValueError: for a name that there is not.
    """
    return _named(names, PLAN)


def int8_steps(names: list[str]) -> list[Int8Step]:
    """The steps of `docs/int8.md`, as `steps`."""
    return _named(names, INT8_PLAN)


def _named(names: list[str], plan: list[T]) -> list[T]:
    known = {step.name: step for step in plan}
    for name in names:
        if name != "all" and name not in known:
            raise ValueError(f"there is no measurement {name!r}; there are all, {', '.join(known)}.")
    return plan if "all" in names else [known[name] for name in names]


def existing_models(given: str | None = None) -> Path:
    """Where the models of the plan lie, see `models_folder`.

    Raises:
        ValueError: where there is no such folder.
    """
    folder = models_folder(given)
    if not folder.is_dir():
        raise ValueError(f"there is no folder of models at {folder}; set {VARIABLE} or give --models.")
    return folder
