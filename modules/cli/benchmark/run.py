"""What `kivi benchmark` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from modules.cli.benchmark.flags import Benchmark, StepFlags
from modules.cli.generate.loading import load
from modules.cli.progress import progress
from modules.evaluation.candidates import changes, written
from modules.evaluation.decoding import COMPILED_STEPS, CONTENDERS, measure_steps
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.evaluation.weights import WEIGHTS


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
    measured = contenders(flags)
    compiled = (COMPILED_STEPS if measured is CONTENDERS else tuple(measured)) if flags.compiled else ()
    kinds = [(dtype, weights) for weights in flags.weights for dtype in flags.dtypes]
    with progress("Measuring", len(kinds) * len(flags.tokens), unit="lengths") as update:
        for kind, (dtype, weights) in enumerate(kinds):
            torch._dynamo.reset()  # of the models before
            loaded = _load(model, dtype, weights)
            stock = _load(model, dtype, weights, stock=True) if flags.compiled else None
            suffix = "" if weights == "full" else f", {weights} weights"
            for number, tokens in enumerate(flags.tokens, 1):
                rows += measure_steps(loaded, tokens, measured, flags.rounds, stock, compiled, suffix)
                update(kind * len(flags.tokens) + number)
    return BenchmarkResult("decode", rows, Environment.here(), {"model": Path(model).name})


def _load(model: str, dtype: str, weights: str, stock: bool = False) -> PreTrainedModel:
    return WEIGHTS[weights](load(model, stock=stock, dtype=getattr(torch, dtype))[0].eval())


def show(result: BenchmarkResult) -> None:
    """A row a cache, length and dtype."""
    title = f"{result.settings['model']}: {result.environment.machine}; {result.environment.versions}"
    names = ("dtype", "tokens", "cache", "p20 ms", "p50 ms", "p80 ms", "against StaticCache")
    table = Table(*names, title=title, box=SIMPLE_HEAD)
    for row in result.rows:
        figures = [f"{row[name]:.1f}" for name in ("p20_ms", "p50_ms", "p80_ms")]
        table.add_row(row["dtype"], str(row["tokens"]), row["cache"], *figures, f"{row['speedup']:.2f}x")
    Console().print(table)
