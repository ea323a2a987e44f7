"""Find the fastest pipelines of attention on this GPU: stages, tokens a warp handles at a time, warps, and splits.

    python benchmarks/tune_gpu.py                       # for `modules.kernels.triton.tuning`, which reads them from then on
    python benchmarks/tune_gpu.py --layouts "2 bits" --minutes 5
    python benchmarks/tune_gpu.py --dry-run --arch 90   # no GPU: what would be tried, and what the compiler makes of it

The candidates of a layout are compiled side by side first, and one that spills registers is left out. The others are launched:
one that fails, or whose attention differs from plain torch's, is left out as well. What is left is timed as `gpu_bench.py` does,
at every workload; the geometric mean decides, and of those within a hundredth of the best the first one, which is the default if
it is among them. Then the winner is timed with more and fewer splits. What there was no time for is not tried.

The table goes into the user's folder and, with every candidate (`tune.json`), into `--out`. A table put into
modules/kernels/triton/tuned is shipped with the package.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import compile_report
import gpu_bench
import torch

from modules.cli.command import argument, check_least, parse
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.kernels.registry import backend
from modules.kernels.triton import attention, launch, tuning
from modules.kernels.triton.launch import Pipeline
from modules.store.layer import PackedLayer
from modules.store.step import Step

STAGES = (2, 3, 4)
TOKENS = (32, 64)
WARPS = (4, 8, 2)
SPLITS = (1, 3, 4, 6, 8)  # programs a multiprocessor that the splits fill, beside those of the winner
WORKLOADS = ((1, 32768), (8, 8192))  # sequences, and tokens of each
TIE = 1.01  # of the fastest time
MOST_ERROR = 1e-2  # relative, of bfloat16 states
DTYPE = "bfloat16"
Times = tuple[float, ...]  # microseconds of a step, a workload each


class Case(NamedTuple):
    """A layout to tune: heads as a model has them, bits of keys and values, new tokens of a step, metadata."""

    heads: int
    kv_heads: int
    head_dim: int
    bits: int
    new_tokens: int = 1
    large_metadata: bool = False

    @property
    def chosen(self) -> dict[str, Any]:
        """The options of its layers."""
        return gpu_bench.LARGE_METADATA if self.large_metadata else {}

    @property
    def many_rows(self) -> bool:
        return self.new_tokens * self.heads // self.kv_heads > launch.FEW_ROWS


CASES = {
    "2 bits": Case(32, 8, 128, 2),
    "4 bits": Case(32, 8, 128, 4),
    "2 bits, heads of 64": Case(14, 2, 64, 2),
    "8 bits": Case(32, 8, 128, 8),
    "2 bits, 16 new tokens": Case(32, 8, 128, 2, 16),
    "2 bits, metadata of 16 bits": Case(32, 8, 128, 2, large_metadata=True),
}


@dataclasses.dataclass
class Trial:
    """One candidate: its times, or why it has none."""

    layout: str
    stages: int
    tokens: int
    warps: int
    programs: int
    microseconds: Times | None = None
    left_out: str = ""

    @classmethod
    def of(cls, layout: str, pipeline: Pipeline) -> Trial:
        return cls(layout, *pipeline)

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.stages, self.tokens, self.warps, self.programs)


def candidates(default: Pipeline) -> list[Pipeline]:
    """What is tried, the default first; programs as many as have its warps."""
    warps = default.warps * default.programs
    tried = [
        Pipeline(stages, tokens, own, max(1, warps // own))
        for own, tokens, stages in itertools.product(WARPS, TOKENS, STAGES)
    ]
    return list(dict.fromkeys([default, *tried]))


def choose(times: dict[Pipeline, Times]) -> Pipeline:
    """The fastest by the geometric mean over the workloads; of those within `TIE` of it the first."""
    means = {pipeline: statistics.geometric_mean(each) for pipeline, each in times.items()}
    most = TIE * min(means.values())
    return next(pipeline for pipeline, mean in means.items() if mean <= most)


def why_not(compiled: concurrent.futures.Future, shared: int) -> str:
    """What speaks against a compiled candidate; nothing: ""."""
    try:
        result = compiled.result()
    except Exception as error:  # of the compiler
        return one_line(error)
    if result.spilled:
        return f"spills {result.spilled} bytes"
    return f"takes {result.shared} bytes of shared memory" if result.shared > shared else ""


def one_line(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}"


def compilers() -> concurrent.futures.ProcessPoolExecutor:
    """Processes that compile, one a core; not forked, as CUDA and threads do not survive that."""
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def leave_out(trials: list[Trial], compiled: list[concurrent.futures.Future], shared: int) -> None:
    """Leave out the trials that do not compile, spill, or take more shared memory than there is; never the first, the default."""
    for trial, future in zip(trials[1:], compiled[1:]):
        trial.left_out = why_not(future, shared)


def time_all(
    trials: list[Trial], measure: Callable[[Pipeline], Times], until: float, least: int = 0
) -> dict[Pipeline, Times]:
    """Times of the trials that are not left out, until `until` (`time.monotonic`); the first `least` whatever the time."""
    times: dict[Pipeline, Times] = {}
    for number, trial in enumerate(trials):
        if trial.left_out:
            continue
        if number >= least and time.monotonic() > until:
            trial.left_out = "no time left"
            continue
        try:
            trial.microseconds = times[trial.pipeline] = measure(trial.pipeline)
        except Exception as error:  # of the launch, or attention that is wrong
            trial.left_out = one_line(error)
    return times


def search(layout: str, trials: list[Trial], measure: Callable[[Pipeline], Times], until: float) -> tuning.Tuned | None:
    """The fastest of `trials`, then of its splits, which are added to them; None where nothing ran."""
    times = time_all(trials, measure, until, least=2)
    if not times:
        return None
    best = choose(times)
    more = [Trial.of(layout, best._replace(programs=programs)) for programs in SPLITS if programs != best.programs]
    times |= time_all(more, measure, until)
    default, best = trials[0].pipeline, choose(times)
    trials += more
    if default not in times:
        return None  # why the default does not run comes first
    return tuning.Tuned(**best._asdict(), microseconds=times[best][0], default_microseconds=times[default][0])


class Workload:
    """Layers of a case that together exceed the L2 cache, and what attention over them should give."""

    def __init__(self, case: Case, batch: int, tokens: int) -> None:
        heads, kv_heads, head_dim, bits, new = case[:5]
        shape = heads, kv_heads, head_dim
        self.layers = gpu_bench.packed_layers(shape, batch, tokens, (bits, bits), **case.chosen)
        self.query = gpu_bench.states(batch, heads, new, head_dim)
        self.key, self.value = (gpu_bench.states(batch, kv_heads, new, head_dim) for _ in range(2))
        self.step = Step.of(None, batch, new)
        self.scaling = head_dim**-0.5
        self.expected = backend("torch").attend(
            self.query.float(), self.key, self.value, self.layers[0], self.scaling, self.step
        )

    def attend(self, layer: PackedLayer, pipeline: Pipeline) -> torch.Tensor:
        return attention.attend(self.query, self.key, self.value, layer, self.scaling, self.step, pipeline=pipeline)

    def measure(self, pipeline: Pipeline, timer: Callable[[list], float] = gpu_bench.time_graphed) -> float:
        """Microseconds of a step.

        Raises:
            ValueError: where attention is not what plain torch gives.
        """
        error = (self.attend(self.layers[0], pipeline).float() - self.expected).norm() / self.expected.norm()
        if not error <= MOST_ERROR:  # NaN is not
            raise ValueError(f"attention is wrong: relative error {error:.1e}")
        return timer([functools.partial(self.attend, layer, pipeline) for layer in self.layers])


class Candidates:
    """What is tried for a case, already being compiled."""

    def __init__(self, case: Case, shared: int, arch: int, pool: concurrent.futures.Executor) -> None:
        bits = (case.bits, case.bits)
        layer = gpu_bench.single_layer(1, case.kv_heads, case.head_dim, 256, bits, **case.chosen)
        shape = launch.Shape.of(layer, case.heads)
        item, rows = getattr(torch, DTYPE).itemsize, case.new_tokens * shape.group
        self.case, self.shared = case, shared
        self.layout = tuning.layout(shape, case.many_rows, item)
        default = launch.default_pipeline(shape, case.many_rows, item, shared)
        self.trials = [Trial.of(self.layout, each) for each in candidates(default)]
        self.compiled = [
            pool.submit(compile_report.attending, shape, rows, DTYPE, arch, trial.pipeline) for trial in self.trials
        ]

    def search(self, until: float) -> tuning.Tuned | None:
        """The fastest on this GPU; every trial knows then how it went."""
        leave_out(self.trials, self.compiled, self.shared)
        workloads = [Workload(self.case, batch, tokens) for batch, tokens in WORKLOADS]
        return search(
            self.layout, self.trials, lambda pipeline: tuple(each.measure(pipeline) for each in workloads), until
        )


def show(trials: list[Trial], found: tuning.Tuned | None) -> None:
    """A line a candidate, the fastest marked."""
    print(trials[0].layout)
    for trial in trials:
        result = trial.left_out or "  ".join(f"{each:9.1f} µs" for each in trial.microseconds or ())
        mark = "*" if found and found.pipeline == trial.pipeline else " "
        print(
            f" {mark} stages {trial.stages}  tokens {trial.tokens:3}  warps {trial.warps}  programs {trial.programs}  {result}",
            flush=True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    out: Path = argument(Path("results"), "folder for tune.json and a copy of the table")
    layouts: tuple[str, ...] = argument(tuple(CASES), "what to tune", tuple(CASES))
    minutes: float = argument(1.5, "candidates that would start later are left out; shared evenly by the layouts")
    dry_run: bool = argument(False, "no GPU: compile the candidates and say which would be timed")
    arch: int = argument(90, "compute capability of --dry-run", tuple(compile_report.SHARED))

    def __post_init__(self) -> None:
        check_least(self.minutes, 0, "--minutes")


def tune_all(flags: Flags, device: str) -> int:
    """Tune every layout; after each the table and the record are written, so that a run that is cut short leaves them."""
    end, layouts = time.monotonic() + 60 * flags.minutes, dict(tuning.tuned_layouts(device))
    major, minor = torch.cuda.get_device_capability()
    shared = launch.shared_memory(torch.device(gpu_bench.DEVICE))
    rows: list[dict] = []
    with compilers() as pool:
        left = [Candidates(CASES[name], shared, 10 * major + minor, pool) for name in flags.layouts]
        while left:
            tried, now = left.pop(0), time.monotonic()
            found = tried.search(now + max(0.0, end - now) / (len(left) + 1))
            show(tried.trials, found)
            rows += [dataclasses.asdict(trial) for trial in tried.trials]
            if found:
                layouts[tried.layout] = found
                save_table(layouts, device, flags.out)
            record = BenchmarkResult("tuning", rows, Environment.here(device=gpu_bench.DEVICE))
            save_result(record, flags.out / "tune.json")
            torch.cuda.empty_cache()
    return 0 if any(row["microseconds"] for row in rows) else 1


def save_table(layouts: dict[str, tuning.Tuned], device: str, out: Path) -> None:
    """Write the table for the user, from where it is read, and into the results."""
    table = tuning.Table(device=device, kernels=tuning.kernels(), layouts=layouts)
    for folder in (tuning.folder(), out):
        tuning.save(table, folder / tuning.file_name(device))


def dry_run(flags: Flags) -> None:
    """Show what would be timed on a GPU that is not here."""
    shared = compile_report.SHARED[flags.arch]
    with compilers() as pool:
        for tried in [Candidates(CASES[name], shared, flags.arch, pool) for name in flags.layouts]:
            leave_out(tried.trials, tried.compiled, shared)
            show(tried.trials, None)


def main() -> int:
    flags = parse(Flags, description=__doc__)
    if flags.dry_run:
        dry_run(flags)
        return 0
    device = tuning.device_name(torch.device(gpu_bench.DEVICE))
    if device is None:
        print(
            "tune_gpu.py times kernels on a CUDA GPU and there is none here. Without one: --dry-run.", file=sys.stderr
        )
        return 2
    torch.manual_seed(0)
    return tune_all(flags, device)


if __name__ == "__main__":
    sys.exit(main())
