"""One measurement shared out among processes, each with the whole model, that `accelerate launch` or `torchrun` started.

Every process takes its share of the cases and measures it as ever; the first gets all results, in the order in which one
process alone would have had them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a measurement: which one this is, and how many there are."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: str | None = None) -> Processes:
        """Those that were started together, waited for; this one alone where nobody launched several.

        Args:
            device: as the command line has it; None: a GPU a process where there are GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which shows and saves."""
        return self.rank == 0

    def share(self, cases: Sequence[T]) -> list[T]:
        """The cases of this process: every `count`-th."""
        return list(cases[self.rank :: self.count])

    def gather(self, results: Iterable[T]) -> list[T]:
        """The results of all processes, in the order of the cases that were shared out; on every process, which waits for
        the slowest.

        Args:
            results: of `share`'s cases, one each.
        """
        numbered = [(self.rank + self.count * place, result) for place, result in enumerate(results)]
        everyone = gather_object(numbered) if self.count > 1 else numbered
        return [result for _, result in sorted(everyone, key=lambda pair: pair[0])]

    def refuse(self, what: str) -> None:
        """Raise `ValueError` where there are several, of whom each would do all of `what`."""
        if self.count > 1:
            raise ValueError(f"{what} runs in one process; got {self.count}. Start it without accelerate or torchrun.")
