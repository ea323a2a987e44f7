"""The time of one piece of a prompt over tokens that are stored, on this machine: KIVI caches against transformers' own.

    python benchmarks/pieces_cpu.py --model path/to/smollm2-135m-instruct
    python benchmarks/pieces_cpu.py --pieces 64 --k-bits 4 --v-bits 4    # only the cache of these options

Each cache holds the same random tokens. In turns, a copy of each takes a piece in one forward; making the copy is not in the
time. A `StaticCache` is just large enough.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decode_cpu import default_model
from paths import RESULTS  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from modules.cli.command import argument, check_least, group, parse
from modules.evaluation.candidates import changes, written
from modules.evaluation.decoding import fill
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.evaluation.timing import balanced_orders
from modules.models.families import load_any
from modules.options import KIVIOptions

CONTENDERS: dict[str, dict[str, Any]] = {"KIVI 2 bits": {}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str | None = argument(None, "a folder; None: SmolLM2-135M-Instruct, fetched")
    stored: int = argument(6000, "tokens that are there before")
    pieces: tuple[int, ...] = argument((128, 512, 1024), "new tokens of a forward")
    dtypes: tuple[str, ...] = argument(("float32", "bfloat16"), "of the weights", ("float32", "bfloat16"))
    rounds: int = argument(2, "repetitions, after one that is not counted")
    threads: int | None = argument(None, "of torch; None: as torch has it")
    output: Path = argument(RESULTS / "pieces_cpu.json", "the result")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        for count in (self.stored, *self.pieces):
            check_least(count, 1, "--pieces and --stored")
        check_least(self.rounds, 1, "--rounds")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")

    @property
    def contenders(self) -> dict[str, dict[str, Any]]:
        """Options of the KIVI caches by name: those that were given, else the usual ones."""
        given = changes(self.cache)
        return {f"KIVI {written(given)}": given} if given else CONTENDERS


def measure(model: PreTrainedModel, flags: Flags, new: int) -> list[dict[str, Any]]:
    """The median time of a forward of `new` tokens in milliseconds, for each cache."""
    caches: dict[str, Cache] = {
        "StaticCache": StaticCache(model.config, max_cache_len=flags.stored + new),
        "DynamicCache": DynamicCache(),
    }
    caches |= {name: model.create_kivi_cache(**options) for name, options in flags.contenders.items()}
    ids = torch.randint(model.config.vocab_size, (1, new), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in caches}
    orders = itertools.cycle(balanced_orders(list(caches)))
    with torch.inference_mode():
        fill(caches, model.config, flags.stored, model.dtype)
        for number in range(1 + flags.rounds):
            for name in next(orders):
                cache = copy.deepcopy(caches[name])
                start = time.perf_counter()
                model(ids, past_key_values=cache, logits_to_keep=1)
                if number:
                    times[name].append(1e3 * (time.perf_counter() - start))
    about = {"piece": new, "tokens": flags.stored, "dtype": str(model.dtype).removeprefix("torch.")}
    rows: list[dict[str, Any]] = [
        {"cache": name, **about, "p50_ms": statistics.median(samples)} for name, samples in times.items()
    ]
    return [row | {"speedup": rows[0]["p50_ms"] / row["p50_ms"]} for row in rows]


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    name, rows = flags.model or default_model(), []
    for dtype in flags.dtypes:
        model, _ = load_any(name, dtype=getattr(torch, dtype))
        for new in flags.pieces:
            rows += measure(model, flags, new)
    here, settings = Environment.here(), {"model": Path(name).name}
    table = Table(
        *("dtype", "stored", "piece", "cache", "p50 ms", "against StaticCache"),
        title=f"{settings['model']}: {here.machine}; {here.versions}; {here.date}",
    )
    for row in rows:
        figures = [f"{row['p50_ms']:.0f}", f"{row['speedup']:.2f}x"]
        table.add_row(row["dtype"], str(row["tokens"]), str(row["piece"]), row["cache"], *figures)
    Console().print(table)
    save_result(BenchmarkResult("pieces", rows, here, settings), flags.output)


if __name__ == "__main__":
    main()
