"""What `kivi benchmark` does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modules.cli.benchmark.flags import Benchmark, StepFlags
from modules.cli.generate.loading import load
from modules.cli.progress import progress
from modules.evaluation.candidates import changes, written
from modules.evaluation.decoding import CONTENDERS, measure_steps
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result


def run(command: Benchmark) -> None:
    """Measure, print and write."""
    result = measure(command, command.model)
    if command.output:
        save_result(result, command.output)
    if command.json:
        print(
            json.dumps(
                {"settings": result.settings, "machine": result.environment.machine, "rows": result.rows}, indent=2
            )
        )
        return
    show(result)


def contenders(flags: StepFlags) -> dict[str, dict[str, Any]]:
    """Options of the caches by name: those that were given, else the usual ones."""
    given = changes(flags.cache)
    return {f"KIVI {written(given)}": given} if given else CONTENDERS


def measure(flags: StepFlags, model: str) -> BenchmarkResult:
    """Every dtype and length, with a bar."""
    if flags.threads:
        torch.set_num_threads(flags.threads)
    pairs = list(itertools.product(flags.dtypes, flags.tokens))
    loaded: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with progress("Measuring", len(pairs), unit="lengths") as update:
        for done, (dtype, tokens) in enumerate(pairs, 1):
            if dtype not in loaded:
                loaded = {dtype: load(model, dtype=getattr(torch, dtype))[0]}  # one at a time
            rows += measure_steps(loaded[dtype], tokens, contenders(flags), flags.rounds)
            update(done)
    return BenchmarkResult("decode", rows, Environment.here(), {"model": Path(model).name})


def show(result: BenchmarkResult) -> None:
    """A row a cache, length and dtype."""
    title = f"{result.settings['model']}: {result.environment.machine}; {result.environment.versions}"
    names = ("dtype", "tokens", "cache", "p20 ms", "p50 ms", "p80 ms", "speedup")
    table = Table(*names, title=title, box=SIMPLE_HEAD)
    for row in result.rows:
        figures = [f"{row[name]:.1f}" for name in ("p20_ms", "p50_ms", "p80_ms")]
        table.add_row(row["dtype"], str(row["tokens"]), row["cache"], *figures, f"{row['speedup']:.2f}x")
    Console().print(table)
