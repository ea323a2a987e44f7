"""One decode step of a whole model on this machine: transformers' caches against KIVI caches, in turns within one run.

    python benchmarks/decode_cpu.py --model path/to/smollm2-135m-instruct --tokens 512 8000
    python benchmarks/decode_cpu.py --k-bits 4 --v-bits 2    # only the cache of these options

The caches are filled with random keys and values of the model's shapes (the time of a step does not depend on them); each
round then takes one step with every cache, so that what else the machine does hits them alike. A `StaticCache` is just large
enough for all rounds; "compiled" is the stock model's forward under `torch.compile` with one.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from paths import RESULTS, ROOT  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table
from timing import WARM_UP, percentiles, take_turns
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from modules.cli.command import argument, check_least, group, parse
from modules.evaluation.candidates import changes, written
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.kivi_cache_general import KIVICache
from modules.models.families import load_any
from modules.options import KIVIOptions, head_dim_of
from modules.store.step import Step

DTYPES = ("float32", "bfloat16")
COMPILED = "StaticCache, compiled"
CONTENDERS = {
    "KIVI 2 bits, torch": {"backend": "torch"},
    "KIVI 2 bits, numba": {"backend": "numba"},
    "KIVI 4 bits, numba": {"k_bits": 4, "v_bits": 4, "backend": "numba"},
    "KIVI 8 bits, numba": {"k_bits": 8, "v_bits": 8, "backend": "numba"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str | None = argument(None, "a folder; None: SmolLM2-135M-Instruct, fetched")
    tokens: tuple[int, ...] = argument((512, 8000), "of context")
    dtypes: tuple[str, ...] = argument(DTYPES, "of the weights", DTYPES)
    rounds: int = argument(60, "repetitions")
    compiled: bool = argument(True, "also the stock model under torch.compile, which takes minutes to compile")
    threads: int | None = argument(None, "of torch and of Numba; None: as torch has it")
    output: Path = argument(RESULTS / "decode_cpu.json", "the result")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        for count in self.tokens:
            check_least(count, 1, "--tokens")
        check_least(self.rounds, 1, "--rounds")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")

    def contenders(self) -> dict[str, dict[str, Any]]:
        """Options of the caches by name: those that were given, else the usual ones."""
        given = changes(self.cache)
        return {f"KIVI {written(given)}": given} if given else CONTENDERS


def fill(caches: dict[str, Cache], config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> None:
    """Put the same random tokens into every layer of every cache."""
    shape = (1, config.num_key_value_heads, tokens, head_dim_of(config))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
    step = Step.of(None, 1, tokens)
    for cache in caches.values():
        if isinstance(cache, KIVICache):
            for layer in cache.kivi_layers:
                layer.append(key, value, step)
            cache.ledger.commit(step)
        else:
            for index in range(config.num_hidden_layers):
                cache.update(key.clone(), value.clone(), index)


def measure(name: str, dtype: str, flags: Flags) -> list[dict[str, Any]]:
    """p20, p50 and p80 of a step in milliseconds for every cache and length, with weights of `dtype`."""
    weights = getattr(torch, dtype)
    model = load_any(name, dtype=weights)[0]
    stock = AutoModelForCausalLM.from_pretrained(name, dtype=weights).eval() if flags.compiled else None
    return [row for tokens in flags.tokens for row in measure_at(model, stock, tokens, flags)]


def measure_at(
    model: PreTrainedModel, stock: PreTrainedModel | None, tokens: int, flags: Flags
) -> list[dict[str, Any]]:
    """The same at `tokens` tokens of context; `stock` is compiled where it is there."""
    room = tokens + flags.rounds + 2 * WARM_UP
    caches: dict[str, Cache] = {
        "StaticCache": StaticCache(model.config, max_cache_len=room),
        "DynamicCache": DynamicCache(),
    }
    caches |= {name: model.create_kivi_cache(**options) for name, options in flags.contenders().items()}
    token = torch.tensor([[100]])
    steps = {name: functools.partial(model, token, past_key_values=cache) for name, cache in caches.items()}
    if stock is not None:
        caches[COMPILED] = StaticCache(model.config, max_cache_len=room)
        torch._dynamo.reset()  # each length is a program of its own, as for a user who has one length
        steps[COMPILED] = functools.partial(torch.compile(stock.forward), token, past_key_values=caches[COMPILED])
    with torch.inference_mode():
        fill(caches, model.config, tokens, model.dtype)
        times = take_turns(steps, flags.rounds)
    about = {"tokens": tokens, "dtype": str(model.dtype).removeprefix("torch.")}
    rows = [{"cache": name, **about, **percentiles(samples)} for name, samples in times.items()]
    return [row | {"speedup": rows[0]["p50_ms"] / row["p50_ms"]} for row in rows]


def default_model() -> str:
    """The small model of the demo, fetched on first use."""
    sys.path.insert(0, str(ROOT / "examples"))
    import common

    return str(common.small_model("smollm2"))


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    name = flags.model or default_model()
    rows = [row for dtype in flags.dtypes for row in measure(name, dtype, flags)]
    here, settings = Environment.here(), {"model": Path(name).name}
    title = f"{settings['model']}: {here.machine}; {here.versions}"
    table = Table("dtype", "tokens", "cache", "p20 ms", "p50 ms", "p80 ms", "against StaticCache", title=title)
    for row in rows:
        figures = [f"{row[name]:.1f}" for name in ("p20_ms", "p50_ms", "p80_ms")]
        table.add_row(row["dtype"], str(row["tokens"]), row["cache"], *figures, f"{row['speedup']:.2f}x")
    Console().print(table)
    save_result(BenchmarkResult("decode", rows, here, settings), flags.output)


if __name__ == "__main__":
    main()
