"""Time of one decode step's attention in one layer on the CPU: packed caches against transformers' own and SDPA.

    python benchmarks/attention_cpu.py --shapes llama-3.1-8b --lengths 8192 32768 --threads 1
    python benchmarks/attention_cpu.py --k-bits 4 --v-bits 2    # only the cache of these options

All contenders of a row take turns within the same loop, so that what else the machine does hits them alike. Each does what
its model does a layer and step: a `StaticCache`, the baseline, writes the token in place, a `DynamicCache` concatenates
everything, then both attend as transformers does under "sdpa"; ours checks and rotates the new token, attends, rotates back
and stores the token. No step here fills a group, as one in 32 does;
packing is in the times of whole steps (`decode_cpu.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paths import RESULTS  # which puts the project's folder on the path
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modules.cache.layer import KIVICacheLayer
from modules.cli.command import argument, check_least, group, parse
from modules.evaluation.candidates import changes, written
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.evaluation.tables import write_csv
from modules.evaluation.timing import percentiles, take_turns
from modules.options import KIVIOptions
from modules.store.ledger import Geometry, Ledger
from modules.store.step import Step

SHAPES = {"smollm2-135m": (9, 3, 64), "llama-3.1-8b": (32, 8, 128), "qwen2.5-7b": (28, 4, 128)}  # heads, KV heads, size
DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("numba", "torch")
BITS = (2, 4, 8)
Past = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    shapes: tuple[str, ...] = argument(tuple(SHAPES), "of the models whose layer is measured", tuple(SHAPES))
    lengths: tuple[int, ...] = argument((512, 2048, 8192, 32768), "stored tokens")
    dtypes: tuple[str, ...] = argument(("float32", "bfloat16"), "of the states", DTYPES)
    backends: tuple[str, ...] = argument(BACKENDS, "contenders, each with all of --bits", BACKENDS)
    bits: tuple[int, ...] = argument(BITS, "of keys and values", BITS)
    threads: int | None = argument(None, "of torch and of Numba; None: as torch has it")
    seconds: float = argument(5.0, "about how long to measure each row")
    rounds: int = argument(200, "at most this many repetitions")
    out: Path = argument(RESULTS, "folder of the JSON and CSV")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_least(length, 1, "--lengths")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")
        check_least(self.seconds, 0, "--seconds")
        check_least(self.rounds, 1, "--rounds")

    def contenders(self) -> dict[str, KIVIOptions]:
        """The caches by name: that of the options that were given, else every backend with every number of bits."""
        given = changes(self.cache)
        if given:
            return {written(given): self.cache}
        pairs = itertools.product(self.backends, self.bits)
        found = {f"{name} {bits} bits": KIVIOptions(k_bits=bits, v_bits=bits, backend=name) for name, bits in pairs}
        exact = {
            f"{name}, exact": dataclasses.replace(found[name], exact_products=True) for name in found if "numba" in name
        }
        return found | exact


def packed_step(
    options: KIVIOptions, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: Past
) -> Callable[[], torch.Tensor]:
    """A function that attends with one token over a packed layer holding `past` and stores the token; as nothing moves the
    ledger on, each call does the same."""
    tokens = past[0].shape[2]
    ledger = Ledger(Geometry(options.group_size, options.residual_length, options.sink_length))
    layer = KIVICacheLayer(options, options.bits_of_layer(0, 1), 0, ledger)
    prompt, one = Step.of(None, 1, tokens), Step.of(None, 1, 1)
    layer.append(*past, prompt)
    ledger.commit(prompt)
    if ledger.packs(0, 1):
        raise ValueError(f"a step after {tokens} tokens packs a group; choose another length.")
    return lambda: layer.attend(query, key, value, query.shape[-1] ** -0.5, one)


def dynamic_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: Past) -> Callable[[], torch.Tensor]:
    """A function that appends one token to a `DynamicCache` holding `past`, attends, and forgets it."""
    cache, module = DynamicCache(), _attention_module(query, key)
    cache.update(*past, 0)
    layer = cache.layers[0]
    kept = layer.keys, layer.values

    def step() -> torch.Tensor:
        keys, values = cache.update(key, value, 0)
        layer.keys, layer.values = kept
        return sdpa_attention_forward(module, query, keys, values, None)[0]

    return step


def static_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: Past) -> Callable[[], torch.Tensor]:
    """A function that writes one token into the layer of a `StaticCache` just large enough, attends, and forgets it."""
    tokens = past[0].shape[2] + 1
    layer, module = StaticLayer(tokens), _attention_module(query, key)
    layer.update(*past)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)

    def step() -> torch.Tensor:
        keys, values = layer.update(key, value)
        layer.cumulative_length.sub_(1)
        return sdpa_attention_forward(module, query, keys, values, mask)[0]

    return step


def _attention_module(query: torch.Tensor, key: torch.Tensor) -> Any:
    """What transformers' function asks of the layer it attends for."""
    return types.SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)


def rows_of(shape: str, length: int, dtype: str, flags: Flags) -> list[dict[str, Any]]:
    """One row of results a contender."""
    heads, kv_heads, head_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def states(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, count, tokens, head_dim, generator=generator).to(getattr(torch, dtype))

    past = states(kv_heads, length), states(kv_heads, length)
    token = states(heads, 1), states(kv_heads, 1), states(kv_heads, 1)
    steps = {"StaticCache+SDPA": static_step(*token, past), "DynamicCache+SDPA": dynamic_step(*token, past)}
    steps |= {name: packed_step(options, *token, past) for name, options in flags.contenders().items()}
    times = take_turns(steps, flags.rounds, flags.seconds)
    rows = []
    for name, samples in times.items():
        row = {"shape": shape, "tokens": length, "dtype": dtype, "contender": name, **percentiles(samples)}
        rows.append(row | {"min_ms": min(samples), "rounds": len(samples)})
    return [row | {"speedup_p50": rows[0]["p50_ms"] / row["p50_ms"]} for row in rows]


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    here, rows = Environment.here(), []
    print(f"{here.machine}; {here.versions}")
    print(f"{'shape':14} {'tokens':>6} {'dtype':9} {'':18} {'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8} {'faster':>7}")
    for shape, dtype, length in itertools.product(flags.shapes, flags.dtypes, flags.lengths):
        for row in rows_of(shape, length, dtype, flags):
            rows.append(row)
            print(
                f"{shape:14} {length:6} {dtype:9} {row['contender']:18} {row['p20_ms']:8.3f} {row['p50_ms']:8.3f} "
                f"{row['p80_ms']:8.3f} {row['speedup_p50']:6.1f}x",
                flush=True,
            )
    result, path = BenchmarkResult("attention", rows, here), flags.out / "attention_cpu.json"
    save_result(result, path)
    write_csv(result, path.with_suffix(".csv"))
    print(f"written to {path} and .csv")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
