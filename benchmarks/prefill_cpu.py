"""The memory and the time of a long prompt on this machine: KIVI caches against transformers' own, whole and in pieces.

    python benchmarks/prefill_cpu.py --model path/to/smollm2-135m-instruct
    python benchmarks/prefill_cpu.py --tokens 32768 --contenders KIVI    # which takes minutes
    python benchmarks/prefill_cpu.py --contenders StaticCache "DynamicCache in 2048"    # the other ways

Every contender has a process of its own, in which `generate()` makes one token of a prompt of random tokens. The peak is that of the
resident memory (Linux counts it), from the loaded model on; what is beyond is the peak less the cache that remains, to be held
against the cache of the unquantized model.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_cpu import default_model
from paths import RESULTS  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from modules.cli.command import argument, check_least, parse
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.models.families import load_any
from modules.options import AUTO, head_dim_of

PIECE = 2048  # of transformers' caches in pieces
NEW_TOKENS = 64  # that a StaticCache has room for behind the prompt


@dataclasses.dataclass(frozen=True)
class Contender:
    """A cache, and how a prompt goes into it.

    Attributes:
        make: the cache, by model and tokens of the prompt.
        chunk: the model's `prefill_chunk`.
        stock_chunk: transformers' `prefill_chunk_size`.
    """

    make: Callable[[PreTrainedModel, int], Cache]
    chunk: int | str | None = None
    stock_chunk: int | None = None


def _kivi(model: PreTrainedModel, tokens: int) -> Cache:
    return model.create_kivi_cache()


def _static(model: PreTrainedModel, tokens: int) -> Cache:
    return StaticCache(model.config, max_cache_len=tokens + NEW_TOKENS)


def _dynamic(model: PreTrainedModel, tokens: int) -> Cache:
    return DynamicCache(config=model.config)


CONTENDERS = {
    "KIVI": Contender(_kivi, chunk=AUTO),
    "KIVI whole": Contender(_kivi),
    "DynamicCache": Contender(_dynamic),
    f"DynamicCache in {PIECE}": Contender(_dynamic, stock_chunk=PIECE),
    "StaticCache": Contender(_static),
    f"StaticCache in {PIECE}": Contender(_static, stock_chunk=PIECE),
}
USUAL = ("KIVI", "KIVI whole", "DynamicCache", f"StaticCache in {PIECE}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str | None = argument(None, "a folder; None: SmolLM2-135M-Instruct, fetched")
    tokens: tuple[int, ...] = argument((10240,), "of the prompt")
    dtype: str = argument("float32", "of the weights", ("float32", "bfloat16"))
    layers: int | None = argument(None, "of the model, the first ones; None: all")
    contenders: tuple[str, ...] = argument(USUAL, "to be measured", tuple(CONTENDERS))
    chunk: int | None = argument(None, "longest piece (tokens) of the contender KIVI; None: as the model picks")
    threads: int | None = argument(None, "of torch; None: as torch has it")
    here: bool = argument(False, "measure one contender in this process and print JSON")
    output: Path = argument(RESULTS / "prefill_cpu.json", "the result")

    def __post_init__(self) -> None:
        for count in self.tokens:
            check_least(count, 2, "--tokens")
        for name in ("layers", "chunk", "threads"):
            given = getattr(self, name)
            check_least(1 if given is None else given, 1, f"--{name}")


def measure(flags: Flags, name: str, tokens: int) -> dict[str, Any]:
    """Seconds of a prefill in this process, and its bytes: of the peak above the loaded model, of the cache that remains, of what
    the peak has beyond it, and of the unquantized cache."""
    contender = CONTENDERS[name]
    layers = {} if flags.layers is None else {"num_hidden_layers": flags.layers}
    model, _ = load_any(flags.model or default_model(), dtype=getattr(torch, flags.dtype), **layers)
    model.eval()
    ids = torch.randint(10, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    chunk = flags.chunk if name == "KIVI" and flags.chunk else contender.chunk

    def generate(prompt: torch.Tensor) -> Cache:
        cache = contender.make(model, prompt.shape[1])
        stock = {} if contender.stock_chunk is None else {"prefill_chunk_size": contender.stock_chunk}
        options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options, **stock)
        return cache

    for model.prefill_chunk in (256, chunk):
        generate(ids[:, :600])  # compiles kernels, also those for pieces, and fills torch's own caches
    before = reset_peak()
    start = time.perf_counter()
    cache = generate(ids)
    seconds = time.perf_counter() - start
    peak, kept = peak_bytes() - before, cache_bytes(cache)
    itemsize, text = model.dtype.itemsize, model.config
    dense = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim_of(text) * tokens * itemsize
    sizes = {"peak_bytes": peak, "cache_bytes": kept, "beyond_bytes": peak - kept, "dense_bytes": dense}
    return {"cache": name, "tokens": tokens, "seconds": seconds, **sizes, "beyond_share": (peak - kept) / dense}


def reset_peak() -> int:
    """Bytes that are resident now, from which on the peak counts.

    Raises:
        RuntimeError: where the system does not let a process forget its peak.
    """
    Path("/proc/self/clear_refs").write_text("5")  # Linux, proc_pid_clear_refs(5)
    resident = _status("VmRSS")
    if peak_bytes() > 1.02 * resident + (8 << 20):
        raise RuntimeError(f"the peak stays at {peak_bytes()} bytes where {resident} are resident; measure elsewhere.")
    return resident


def peak_bytes() -> int:
    """The most bytes that were resident at once; `getrusage` would also count the process that started this one."""
    return _status("VmHWM")


def _status(name: str) -> int:
    """A size of this process in bytes, by its name in /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def cache_bytes(cache: Cache) -> int:
    """Of a cache's tensors."""
    if hasattr(cache, "get_cache_info"):
        return cache.get_cache_info()["bytes"]["total"]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measured(flags: Flags, name: str, tokens: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    given = {"tokens": tokens, "contenders": name, "dtype": flags.dtype, "model": flags.model or default_model()}
    given |= {key: getattr(flags, key) for key in ("layers", "chunk", "threads") if getattr(flags, key) is not None}
    arguments = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, __file__, "--here", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if flags.here:
        print(json.dumps(measure(flags, flags.contenders[0], flags.tokens[0])))
        return
    rows = [measured(flags, name, tokens) for tokens in flags.tokens for name in flags.contenders]
    name, here = Path(flags.model or default_model()).name, Environment.here()
    settings = {"model": name, "dtype": flags.dtype, "layers": flags.layers or "all"}
    heads = ("tokens", "cache", "seconds", "peak MB", "cache MB", "beyond MB", "of the unquantized cache")
    table = Table(*heads, title=f"{name}, {flags.dtype}: {here.machine}; {here.versions}; {here.date}")
    for row in rows:
        sizes = [f"{row[f'{of}_bytes'] / 1e6:.0f}" for of in ("peak", "cache", "beyond")]
        table.add_row(
            str(row["tokens"]), row["cache"], f"{row['seconds']:.1f}", *sizes, f"{100 * row['beyond_share']:.0f} %"
        )
    Console().print(table)
    save_result(BenchmarkResult("prefill", rows, here, settings), flags.output)


if __name__ == "__main__":
    main()
