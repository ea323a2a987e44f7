"""Time of one decode step in one layer on the CPU: sequences that fill their groups together, and at random phases, each by
products of bytes and by exact ones.

    python benchmarks/ragged_cpu.py --batch 16 --tokens 2048 --threads 1

All run through the same number of steps, taking turns, so that each sequence packs equally often in each: all at the same
step, or about `batch / group_size` of them at each.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import random
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from modules.codecs.kivi import codecs_of  # noqa: E402
from modules.kernels.backend import Backend  # noqa: E402
from modules.kernels.registry import backend  # noqa: E402
from modules.options import KIVIOptions  # noqa: E402
from modules.store.layer import PackedLayer  # noqa: E402
from modules.store.ledger import Geometry, Ledger  # noqa: E402
from modules.store.step import Step  # noqa: E402

SHAPES = {"smollm2-135m": (9, 3, 64), "llama-3.1-8b": (32, 8, 128)}  # heads, KV heads, size


def filled(lengths: list[int], kv_heads: int, head_dim: int, options: KIVIOptions, numba: Backend) -> PackedLayer:
    """A layer that holds `lengths[b]` random tokens of sequence `b`."""
    ledger = Ledger(Geometry(options.group_size, options.residual_length, options.sink_length))
    states = torch.randn(len(lengths), kv_heads, max(lengths), head_dim)
    codecs, exact = codecs_of(options, (2, 2), head_dim), options.exact_products
    layer = PackedLayer.empty(states, codecs, ledger, options.rotates_values(2), exact)
    ledger.clear([0] * len(lengths))
    step = Step.of_lengths(lengths, max(lengths))
    layer.make_room(step)
    numba.append(layer, states, layer.rotate(states), step)
    ledger.commit(step)
    return layer


def milliseconds(shape: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Of every step, with aligned sequences and with ragged ones, in bytes and exact."""
    heads, kv_heads, head_dim = SHAPES[shape]
    options, numba, rng = KIVIOptions(), backend("numba"), random.Random(0)
    ragged = [args.tokens + rng.randrange(options.group_size) for _ in range(args.batch)]
    layers = {
        name + kind: filled(lengths, kv_heads, head_dim, dataclasses.replace(options, exact_products=bool(kind)), numba)
        for kind in ("", ", exact")
        for name, lengths in (("aligned", [args.tokens] * args.batch), ("ragged", ragged))
    }
    token = [torch.randn(args.batch, count, 1, head_dim) for count in (heads, kv_heads, kv_heads)]
    times: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(args.steps + 1):
        for name, layer in list(layers.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            numba.decode(*token, layer, head_dim**-0.5)
            if number:  # the first one compiles
                times[name].append(1e3 * (time.perf_counter() - start))
            layer.ledger.commit(Step.of(None, args.batch, 1))
    return times


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="of each sequence; ragged ones have up to a group more"
    )
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for shape in args.shapes:
        times = milliseconds(shape, args)
        for statistic in (statistics.median, statistics.fmean):
            values = {name: statistic(samples) for name, samples in times.items()}
            figures = ", ".join(f"{name} {value:.3f} ms" for name, value in values.items())
            print(
                f"{shape:14} {statistic.__name__:6} {figures}, ratio {values['ragged'] / values['aligned']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
