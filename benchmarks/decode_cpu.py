"""`kivi benchmark` on the small model of the demo, written to the results that docs/performance.md is made of.

python benchmarks/decode_cpu.py --model path/to/smollm2-135m-instruct --tokens 512 8000
python benchmarks/decode_cpu.py --weights full int8 --tokens 512 8000 30000
python benchmarks/decode_cpu.py --k-bits 4 --v-bits 2    # only the cache of these options
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from paths import RESULTS, ROOT  # which puts the project's folder on the path

from modules.cli.benchmark.flags import StepFlags
from modules.cli.benchmark.run import measure, show
from modules.cli.command import argument, parse
from modules.evaluation.results import save_result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(StepFlags):
    """The command line."""

    model: str | None = argument(None, "a folder; None: SmolLM2-135M-Instruct, fetched")
    compiled: bool = argument(True, "also the stock model and KIVI's compiled, which takes minutes")
    output: Path = argument(RESULTS / "decode_cpu.json", "the result")


def default_model() -> str:
    """The small model of the demo, fetched on first use."""
    sys.path.insert(0, str(ROOT / "examples"))
    import common

    return str(common.small_model("smollm2"))


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    result = measure(flags, flags.model or default_model())
    show(result)
    save_result(result, flags.output)


if __name__ == "__main__":
    main()
