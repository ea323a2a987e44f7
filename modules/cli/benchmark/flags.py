"""The time of one decode step of a whole model on the CPU: KIVI caches against transformers' own, in turns.

A step's time is the median of the rounds, beside the 20th and the 80th percentile. Leave the machine alone meanwhile. GPUs,
single layers and what the kernels compile to are measured by the scripts in benchmarks/ of the project's folder.

Examples:
  kivi benchmark path/to/model
  kivi benchmark path/to/model --tokens 512 8000 --dtypes bfloat16 --threads 2
  kivi benchmark path/to/model --k-bits 4 --v-bits 2 --output decode.json
  kivi benchmark path/to/model --compiled --weights int8
"""

from __future__ import annotations

import dataclasses

from modules.cli.command import argument, check_least, group
from modules.cli.source import MODEL_HELP
from modules.options import KIVIOptions

DTYPES = ("float32", "bfloat16")
WEIGHTS = ("full", "int8")
DESCRIPTION = (__doc__ or "").strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlags:
    """What is measured, but for the model."""

    tokens: tuple[int, ...] = argument((512, 8000), "of context")
    dtypes: tuple[str, ...] = argument(DTYPES, "of the model", DTYPES)
    weights: tuple[str, ...] = argument(("full",), "in the model's dtype, or int8 (needs torchao)", WEIGHTS)
    rounds: int = argument(60, "repetitions")
    compiled: bool = argument(False, "also the stock model and KIVI's compiled, which takes minutes")
    threads: int | None = argument(None, "of torch and of Numba; None: as torch has it")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        for count in self.tokens:
            check_least(count, 1, "--tokens")
        check_least(self.rounds, 1, "--rounds")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(StepFlags):
    """The command line."""

    model: str = argument(help=MODEL_HELP, positional=True)
    output: str | None = argument(None, "write the result as JSON here")
    json: bool = argument(False, "print JSON and nothing else")


COMMAND = Benchmark
