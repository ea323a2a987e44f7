"""One decode step of a whole model on this machine: `DynamicCache` against KIVI caches, in turns within one run.

    python benchmarks/decode_cpu.py --model path/to/smollm2-135m-instruct --tokens 512 8000

The caches are filled with random keys and values of the model's shapes (the time of a step does not depend on them); each
round then takes one step with every cache, so that what else the machine does hits them alike.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import pathlib
import sys

import torch
from machine import RESULTS, ROOT, environment  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table
from timing import percentiles, take_turns
from transformers import DynamicCache

from modeling_llama_kivi import load_llama_kivi
from modules.kivi_cache_general import KIVICache, Step
from modules.options import head_dim_of

DTYPES = ("float32", "bfloat16")


def contenders(model) -> dict[str, object]:
    """Empty caches by name."""
    caches: dict[str, object] = {"DynamicCache": DynamicCache()}
    for backend in ("torch", "numba"):
        caches[f"KIVI 2 bits, {backend}"] = model.create_kivi_cache(backend=backend)
    caches["KIVI 4 bits, numba"] = model.create_kivi_cache(k_bits=4, v_bits=4, backend="numba")
    caches["KIVI 8 bits, numba"] = model.create_kivi_cache(k_bits=8, v_bits=8, backend="numba")
    return caches


def fill(caches: dict[str, object], config, tokens: int, dtype: torch.dtype) -> None:
    """Put the same random tokens into every layer of every cache."""
    shape = (1, config.num_key_value_heads, tokens, head_dim_of(config))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
    for cache in caches.values():
        if not isinstance(cache, KIVICache):
            for index in range(config.num_hidden_layers):
                cache.update(key.clone(), value.clone(), index)
            continue
        first = cache.layers[0]
        first.append(key, value, Step.of(None, 1, tokens))
        for index, layer in enumerate(cache.layers[1:], start=1):
            layer.__dict__.update(copy.deepcopy(first).__dict__, layer_idx=index)


def measure(model, tokens: int, rounds: int) -> list[dict]:
    """p20, p50 and p80 of a step in milliseconds for every cache at `tokens` tokens of context."""
    caches = contenders(model)
    fill(caches, model.config, tokens, model.dtype)
    token = torch.tensor([[100]])
    steps = {name: functools.partial(model, token, past_key_values=cache) for name, cache in caches.items()}
    with torch.inference_mode():
        times = take_turns(steps, rounds)
    about = {"tokens": tokens, "dtype": str(model.dtype).removeprefix("torch.")}
    rows = [{"cache": name, **about, **percentiles(samples)} for name, samples in times.items()]
    return [row | {"speedup": rows[0]["p50_ms"] / row["p50_ms"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8000])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "decode_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        sys.path.insert(0, str(ROOT / "examples"))
        import common

        args.model = str(common.small_model("smollm2"))
    rows = []
    for dtype in args.dtypes:
        model, _ = load_llama_kivi(args.model, dtype=getattr(torch, dtype))
        for tokens in args.tokens:
            rows += measure(model, tokens, args.rounds)
    about = {"model": pathlib.Path(args.model).name} | environment()
    table = Table("dtype", "tokens", "cache", "p20 ms", "p50 ms", "p80 ms", "against DynamicCache", title=str(about))
    for row in rows:
        figures = [f"{row[name]:.1f}" for name in ("p20_ms", "p50_ms", "p80_ms")]
        table.add_row(row["dtype"], str(row["tokens"]), row["cache"], *figures, f"{row['speedup']:.2f}x")
    Console().print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
