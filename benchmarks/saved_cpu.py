"""A prompt in a file on this machine: the time to feed it, to save its cache and to load it, and what it takes on disk.

    python benchmarks/saved_cpu.py --model path/to/smollm2-135m-instruct --tokens 4000
    python benchmarks/saved_cpu.py --k-bits 4 --v-bits 4    # a cache of these options

The prompt is fed once; the file is saved and loaded in turns. The system keeps a file that was just written in memory, so the
disk is not in the time of loading.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from decode_cpu import default_model
from paths import RESULTS  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from modules.cli.command import argument, check_least, group, parse
from modules.evaluation.candidates import changes
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.evaluation.timing import percentiles, take_turns
from modules.models.families import load_any
from modules.options import KIVIOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str | None = argument(None, "a folder; None: SmolLM2-135M-Instruct, fetched")
    tokens: tuple[int, ...] = argument((1000, 4000), "of the prompt")
    rounds: int = argument(20, "repetitions of saving and loading")
    threads: int | None = argument(None, "of torch; None: as torch has it")
    output: Path = argument(RESULTS / "saved_cpu.json", "the result")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        for count in self.tokens:
            check_least(count, 1, "--tokens")
        check_least(self.rounds, 1, "--rounds")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")


def measure(model: PreTrainedModel, tokens: int, flags: Flags) -> dict[str, Any]:
    """Seconds to feed a prompt, milliseconds to save and to load it (p50), and its bytes: of the file, of the cache's living
    tokens, and of all that the cache has allocated."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = model.create_kivi_cache(**changes(flags.cache))
    start = time.perf_counter()
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    fed = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.safetensors"
        cache.save(path, tokens=ids)
        file_bytes = path.stat().st_size
        steps = {
            "save": functools.partial(cache.save, path, tokens=ids),
            "load": functools.partial(model.load_kivi_cache, path),
        }
        times = {name: percentiles(samples)["p50_ms"] for name, samples in take_turns(steps, flags.rounds).items()}
    size = cache.get_cache_info()["bytes"]
    return {
        "tokens": tokens,
        "feed_s": fed,
        "save_ms": times["save"],
        "load_ms": times["load"],
        "file_bytes": file_bytes,
        "alive_bytes": size["total"] - size["slack"],
        "allocated_bytes": size["total"],
        "dense_bytes": size["dense"],
    }


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    name = flags.model or default_model()
    model, _ = load_any(name, dtype=torch.float32)
    rows = [measure(model, tokens, flags) for tokens in flags.tokens]
    here, settings = Environment.here(), {"model": Path(name).name, "dtype": "float32"}
    title = f"{settings['model']}, float32: {here.machine}; {here.versions}; {here.date}"
    heads = ("tokens", "feed s", "save ms", "load ms", "file MB", "alive MB", "allocated MB", "unquantized MB")
    table = Table(*heads, title=title)
    for row in rows:
        times = [f"{row['feed_s']:.1f}", f"{row['save_ms']:.0f}", f"{row['load_ms']:.0f}"]
        sizes = [f"{row[f'{of}_bytes'] / 1e6:.2f}" for of in ("file", "alive", "allocated", "dense")]
        table.add_row(str(row["tokens"]), *times, *sizes)
    Console().print(table)
    save_result(BenchmarkResult("saved", rows, here, settings), flags.output)


if __name__ == "__main__":
    main()
