"""Time of one decode step's attention in one layer on the CPU: packed caches against `DynamicCache` and SDPA.

    python benchmarks/attention_cpu.py --shapes llama-3.1-8b --lengths 8192 32768 --threads 1

All contenders of a row take turns within the same loop, so that what else the machine does hits them alike. Each does what
its model does a layer and step: the baseline appends to a `DynamicCache`, which concatenates everything, then SDPA; ours
checks and rotates the new token, attends, rotates back and stores the token. No step here fills a group, as one in 32 does;
packing is in the times of whole steps (`decode_cpu.py`).
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib

import torch
from machine import RESULTS, environment  # which puts the project's folder on the path
from timing import percentiles, take_turns
from transformers import DynamicCache

from modules.kivi_cache_general import KIVICacheLayer, Step
from modules.options import KIVIOptions

SHAPES = {"smollm2-135m": (9, 3, 64), "llama-3.1-8b": (32, 8, 128), "qwen2.5-7b": (28, 4, 128)}  # heads, KV heads, size
DTYPES = ("float32", "bfloat16", "float16")


def packed_step(backend: str, bits: int, query, key, value, past):
    """A function that attends with one token over a packed layer holding `past`, stores the token and forgets it."""
    options = KIVIOptions(k_bits=bits, v_bits=bits, backend=backend)
    layer = KIVICacheLayer(options, (bits, bits))
    layer.append(*past, Step.of(None, 1, past[0].shape[2]))
    if layer.state.packs_at(0, 1):
        raise ValueError(f"a step after {past[0].shape[2]} tokens packs a group; choose another length.")
    kept, scaling, one = layer.state.lengths, query.shape[-1] ** -0.5, Step.of(None, 1, 1)

    def step():
        out = layer.attend(query, key, value, scaling, one)
        layer.state.lengths = kept
        return out

    return step


def dense_step(query, key, value, past):
    """A function that appends one token to a `DynamicCache` holding `past`, attends, and forgets it."""
    cache = DynamicCache()
    cache.update(*past, 0)
    layer = cache.layers[0]
    kept = layer.keys, layer.values

    def step():
        keys, values = cache.update(key, value, 0)
        layer.keys, layer.values = kept
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return step


def rows_of(shape: str, length: int, dtype: str, args: argparse.Namespace) -> list[dict]:
    """One row of results a contender."""
    heads, kv_heads, head_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def states(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, count, tokens, head_dim, generator=generator).to(getattr(torch, dtype))

    past = states(kv_heads, length), states(kv_heads, length)
    token = states(heads, 1), states(kv_heads, 1), states(kv_heads, 1)
    steps = {"DynamicCache+SDPA": dense_step(*token, past)}
    for backend in args.backends:
        for bits in args.bits:
            steps[f"{backend} {bits} bits"] = packed_step(backend, bits, *token, past)
    times = take_turns(steps, args.rounds, args.seconds)
    rows = []
    for name, samples in times.items():
        row = {"shape": shape, "tokens": length, "dtype": dtype, "contender": name, **percentiles(samples)}
        rows.append(row | {"min_ms": min(samples), "rounds": len(samples)})
    return [row | {"speedup_p50": rows[0]["p50_ms"] / row["p50_ms"]} for row in rows]


def write(rows: list[dict], about: dict, folder: pathlib.Path) -> pathlib.Path:
    """`attention_cpu.json` and `.csv` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attention_cpu.json"
    path.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    return path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768], help="stored tokens")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--backends", nargs="+", choices=["numba", "torch"], default=["numba", "torch"])
    parser.add_argument("--bits", nargs="+", type=int, choices=[2, 4, 8], default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of Numba")
    parser.add_argument("--seconds", type=float, default=5.0, help="about how long to measure each row")
    parser.add_argument("--rounds", type=int, default=200, help="at most this many repetitions")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the JSON and CSV")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    about, rows = environment(), []
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'shape':14} {'tokens':>6} {'dtype':9} {'':18} {'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8} {'faster':>7}")
    for shape in args.shapes:
        for dtype in args.dtypes:
            for length in args.lengths:
                for row in rows_of(shape, length, dtype, args):
                    rows.append(row)
                    print(
                        f"{shape:14} {length:6} {dtype:9} {row['contender']:18} {row['p20_ms']:8.3f} {row['p50_ms']:8.3f} "
                        f"{row['p80_ms']:8.3f} {row['speedup_p50']:6.1f}x",
                        flush=True,
                    )
    print(f"written to {write(rows, about, args.out)} and .csv")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
