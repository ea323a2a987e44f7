"""What `kivi benchmark` does."""

from __future__ import annotations

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
from modules.evaluation.decoding import COMPILED_STEPS, CONTENDERS, measure_steps
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
    rows: list[dict[str, Any]] = []
    kinds = [(dtype, weights) for weights in flags.weights for dtype in flags.dtypes]
    measured = contenders(flags)
    compiled = [name for name in measured if name in COMPILED_STEPS or measured is not CONTENDERS]
    with progress("Measuring", len(kinds) * len(flags.tokens), unit="lengths") as update:
        for dtype, weights in kinds:
            torch._dynamo.reset()  # of models before
            options = {"dtype": getattr(torch, dtype), **WEIGHTS[weights]()}
            loaded = load(model, **options)[0].eval()
            stock = load(model, stock=True, **options)[0].eval() if flags.compiled else None
            for tokens in flags.tokens:
                rows += measure_steps(
                    loaded, tokens, measured, flags.rounds, stock, compiled if flags.compiled else ()
                )
                update(len(rows))
    return BenchmarkResult("decode", rows, Environment.here(), {"model": Path(model).name})


def show(result: BenchmarkResult) -> None:
    """A row a cache, length and dtype."""
    title = f"{result.settings['model']}: {result.environment.machine}; {result.environment.versions}"
    names = ("dtype", "tokens", "cache", "p20 ms", "p50 ms", "p80 ms", "against StaticCache")
    table = Table(*names, title=title, box=SIMPLE_HEAD)
    for row in result.rows:
        figures = [f"{row[name]:.1f}" for name in ("p20_ms", "p50_ms", "p80_ms")]
        table.add_row(row["dtype"], str(row["tokens"]), row["cache"], *figures, f"{row['speedup']:.2f}x")
    Console().print(table)
