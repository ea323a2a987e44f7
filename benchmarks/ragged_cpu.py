"""Time of a decode step in one layer on the CPU: sequences that fill their groups together, and at random phases.

    python benchmarks/ragged_cpu.py
    python benchmarks/ragged_cpu.py --batches 16 --tokens 2048 --exact-products    # a cache of these options

Both batches go through the same steps, taking turns, so that each sequence packs equally often in each: all at the same step,
or about `batch / group_size` of them at each. The median step of aligned sequences packs nothing, and the mean has all.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from attention_cpu import SHAPES
from paths import RESULTS  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table

from modules.cli.command import argument, check_least, group, parse
from modules.codecs.kivi import codecs_of
from modules.evaluation.candidates import changes, written
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.kernels.registry import backend
from modules.options import KIVIOptions
from modules.store.layer import PackedLayer
from modules.store.ledger import Geometry, Ledger
from modules.store.step import Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    shapes: tuple[str, ...] = argument(("llama-3.1-8b",), "of the models whose layer is measured", tuple(SHAPES))
    batches: tuple[int, ...] = argument((1, 8, 32), "sequences")
    tokens: int = argument(8192, "of each sequence; ragged ones have up to a group more")
    groups: int = argument(3, "that each sequence fills while it is measured")
    threads: int | None = argument(None, "of torch and of Numba; None: as torch has it")
    output: Path = argument(RESULTS / "ragged_cpu.json", "the result")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        for batch in self.batches:
            check_least(batch, 1, "--batches")
        check_least(self.tokens, 1, "--tokens")
        check_least(self.groups, 1, "--groups")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")


def filled(lengths: list[int], kv_heads: int, head_dim: int, options: KIVIOptions) -> PackedLayer:
    """A layer that holds `lengths[b]` random tokens of sequence `b`."""
    ledger = Ledger(Geometry(options.group_size, options.residual_length, options.sink_length))
    states = torch.randn(len(lengths), kv_heads, max(lengths), head_dim, generator=torch.Generator().manual_seed(0))
    codecs = codecs_of(options, (options.k_bits, options.v_bits), head_dim)
    layer = PackedLayer.empty(states, codecs, ledger, options.rotates_values(options.v_bits), options.exact_products)
    ledger.clear([0] * len(lengths))
    step = Step.of_lengths(lengths, max(lengths))
    layer.make_room(step)
    backend("numba").append(layer, states, layer.rotate(states), step)
    ledger.commit(step)
    return layer


def measure(shape: str, batch: int, flags: Flags) -> list[dict[str, Any]]:
    """A row for aligned sequences and one for ragged ones: milliseconds of a step."""
    heads, kv_heads, head_dim = SHAPES[shape]
    options, numba, rng = flags.cache, backend("numba"), random.Random(0)
    phases = {"aligned": [0] * batch, "ragged": [rng.randrange(options.group_size) for _ in range(batch)]}
    layers = {
        name: filled([flags.tokens + phase for phase in own], kv_heads, head_dim, options)
        for name, own in phases.items()
    }
    generator = torch.Generator().manual_seed(1)
    token = [torch.randn(batch, count, 1, head_dim, generator=generator) for count in (heads, kv_heads, kv_heads)]
    times: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(flags.groups * options.group_size + 1):
        for name, layer in list(layers.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            numba.decode(*token, layer, head_dim**-0.5)
            if number:  # the first one compiles
                times[name].append(1e3 * (time.perf_counter() - start))
            layer.ledger.commit(Step.of(None, batch, 1))
    about = {"shape": shape, "batch": batch, "tokens": flags.tokens}
    rows = []
    for name, own in times.items():
        figures = {"p50_ms": statistics.median(own), "mean_ms": statistics.fmean(own), "max_ms": max(own)}
        rows.append({**about, "sequences": name, **figures})
    return rows


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    rows: list[dict[str, Any]] = []
    for shape, batch in itertools.product(flags.shapes, flags.batches):
        rows += measure(shape, batch, flags)
    given, here = changes(flags.cache), Environment.here()
    settings = {"cache": written(given)} if given else {}
    table = Table(*rows[0], title=f"{here.machine}; {here.versions}; {here.date}")
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console().print(table)
    save_result(BenchmarkResult("ragged", rows, here, settings), flags.output)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
