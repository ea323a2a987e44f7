"""Measure the GPU backend: attention against PyTorch's and others' kernels, packing, and decoding of a whole model.

    python benchmarks/gpu_bench.py --out results            # everything, under nine minutes on an H100
    python benchmarks/gpu_bench.py --only attention --minutes 2

Times are medians of CUDA-graph replays between device events. Each replay goes round several caches that together exceed
the L2 cache four times, so that codes come from device memory as they do inside a model. Bytes are those a step must read:
codes, metadata and the full-precision tokens, or keys and values for the full-precision kernels; the share is of the
copy bandwidth measured on the spot (bytes read plus bytes written of a large device copy).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import environment  # which puts the project's folder on the path

from modules.kivi_options import KIVIOptions
from modules.packed_state import PackedLayer

SHAPES = {"Llama-2-7B": (32, 32, 128), "Llama-3.1-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}
TOKENS = (2048, 8192, 32768, 131072)
BATCHES = (1, 4, 16, 64)
DTYPE = torch.bfloat16
REPLAYS = 20
LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rope_theta=500000.0, pad_token_id=0,
)  # fmt: skip


@dataclasses.dataclass
class Row:
    """One measurement; `error` says why there is no time."""

    part: str
    shape: str
    method: str
    batch: int
    tokens: int
    microseconds: float | None = None
    gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    per_second: float | None = None
    error: str = ""


def _median_of_events(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `run` on the device."""
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def time_graphed(steps: list[Callable[[], object]]) -> float:
    """Microseconds of one of `steps`, which all do the same work on different memory."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    torch.cuda.synchronize()
    return _median_of_events(graph.replay, REPLAYS) * 1000 / len(steps)


def copy_bandwidth() -> float:
    """GB/s of a copy of 2 GiB within the device, bytes read plus bytes written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.numel() / _median_of_events(lambda: target.copy_(source), REPLAYS) / 1e6


def rotation(bytes_of_one: float) -> int:
    """How many caches exceed the L2 cache four times; at least two."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, int(-(-4 * l2 // bytes_of_one))))


def filled_layer(batch: int, kv_heads: int, head_dim: int, tokens: int, bits: tuple[int, int]) -> PackedLayer:
    """A layer of random codes and plausible metadata, as long as `tokens`, without quantizing anything."""
    options = KIVIOptions(k_bits=bits[0], v_bits=bits[1])
    like = torch.empty(batch, kv_heads, 1, head_dim, dtype=DTYPE, device="cuda")
    layer = PackedLayer.empty(like, bits, options, max_length=tokens + 64)
    layer.backend = "triton"
    layer.lengths = [tokens] * batch
    layer.packed = layer.packed_after_append()
    for side in layer.sides:
        side.codes.random_()
        if side.extra is not None:
            side.extra.random_()
        side.scale.uniform_(0.2, 0.6)
        side.minimum.uniform_(-1.0, -0.5)
        side.sinks.normal_()
        side.window.normal_()
    layer.device_counts()
    return layer


def bytes_read(layer: PackedLayer) -> int:
    """Bytes of the layer that a step must read."""
    packed, total = layer.packed[0], 0
    for side in layer.sides:
        for name, t in side.tensors().items():
            if name == "order":  # a list of channels, not of tokens
                continue
            per_token = t[0, 0, 0].numel() * t.element_size() * t.shape[0] * t.shape[1]
            if name == "window":
                total += per_token * (layer.lengths[0] - layer.sink_length - packed)
            elif name == "sinks":
                total += per_token * t.shape[2]
            else:
                total += per_token * (packed // (side.capacity // t.shape[2]))
    return total


def packed_steps(shape, batch: int, tokens: int, bits: tuple[int, int]):
    """Attention steps over packed layers, and the bytes of one."""
    from modules.kernels import triton_attention

    heads, kv_heads, head_dim = shape
    estimate = 2 * batch * kv_heads * tokens * head_dim * (sum(bits) / 16 + 0.125)
    layers = [filled_layer(batch, kv_heads, head_dim, tokens, bits) for _ in range(rotation(estimate))]
    query = torch.randn(batch, heads, 1, head_dim, dtype=DTYPE, device="cuda")
    key, value = (torch.randn(batch, kv_heads, 1, head_dim, dtype=DTYPE, device="cuda") for _ in range(2))

    def step(layer):
        return lambda: triton_attention.attend(query, key, value, layer, head_dim**-0.5, [1] * batch)

    return [step(layer) for layer in layers], bytes_read(layers[0])


def full_precision_steps(shape, batch: int, tokens: int, method: str):
    """Attention steps of a full-precision kernel, and the bytes of one."""
    heads, kv_heads, head_dim = shape
    size = 2 * batch * kv_heads * tokens * head_dim * 2
    caches = [
        torch.randn(2, batch, kv_heads, tokens, head_dim, dtype=DTYPE, device="cuda") for _ in range(rotation(size))
    ]
    query = torch.randn(batch, heads, 1, head_dim, dtype=DTYPE, device="cuda")
    if method == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        caches = [cache.transpose(2, 3).contiguous() for cache in caches]
        return [
            lambda c=c: flash_attn_with_kvcache(query.transpose(1, 2), c[0], c[1], causal=True) for c in caches
        ], size
    if method == "flashinfer":
        import flashinfer

        if batch > 1:
            raise NotImplementedError("measured at batch 1")
        caches = [cache.transpose(2, 3).contiguous() for cache in caches]
        return [
            lambda c=c: flashinfer.single_decode_with_kv_cache(query[0, :, 0], c[0, 0], c[1, 0]) for c in caches
        ], size
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }[method.removeprefix("sdpa-")]

    def step(cache):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, cache[0], cache[1], enable_gqa=heads != kv_heads
                )

        return run

    return [step(cache) for cache in caches], size


def measure(row: Row, make: Callable[[], tuple[list, int]], copy: float) -> Row:
    """Time what `make` returns; a kernel that is missing or refuses becomes an error."""
    try:
        steps, size = make()
        row.microseconds = time_graphed(steps)
        row.gigabytes_per_second = size / row.microseconds / 1e3
        row.share_of_copy = row.gigabytes_per_second / copy
    except (ImportError, NotImplementedError, RuntimeError) as error:
        row.error = (
            f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else type(error).__name__
        )
    steps = None
    torch.cuda.empty_cache()
    return row


def attention(copy: float, until: float) -> list[Row]:
    """Every shape, batch and length that fits a third of the memory, until time is up."""
    memory = torch.cuda.get_device_properties(0).total_memory
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    rows = []
    for tokens in TOKENS:
        for batch in BATCHES:
            for name, shape in SHAPES.items():
                size = max(2 * 4 * batch * shape[1] * tokens * shape[2], 4 * l2)
                if size > memory / 3 or time.monotonic() > until:
                    continue
                for bits in ((2, 2), (4, 4)):
                    row = Row("attention", name, f"packed K{bits[0]} V{bits[1]}", batch, tokens)
                    rows.append(measure(row, lambda s=shape, b=bits, n=batch, t=tokens: packed_steps(s, n, t, b), copy))
                for method in ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "flash-attn", "flashinfer"):
                    row = Row("attention", name, method, batch, tokens)
                    rows.append(
                        measure(
                            row, lambda s=shape, m=method, n=batch, t=tokens: full_precision_steps(s, n, t, m), copy
                        )
                    )
                print(table(rows[-7:]), flush=True)
    return rows


def packing(copy: float) -> list[Row]:
    """Quantizing a prompt of 32k tokens into the cache, and one decode append that packs nothing."""
    from modules.kernels import triton_quantize

    rows = []
    for bits, method in ((2, "lsq"), (2, "minmax"), (4, "lsq")):
        layer = filled_layer(1, 8, 128, 32768, (bits, bits))
        states = torch.randn(1, 8, layer.packed[0], 128, dtype=DTYPE, device="cuda")
        for side in layer.sides:
            side.method = method if side.what == "keys" else "minmax"
            row = Row("packing", f"{side.what} {bits} bits {side.method}", "pack_groups", 1, layer.packed[0])
            size = states.numel() * (2 + bits / 8 + 0.125)
            rows.append(
                measure(
                    row,
                    lambda s=side, x=states, n=size: ([lambda: triton_quantize.pack_groups(s, slice(0, 1), 0, x)], n),
                    copy,
                )
            )
    layer = filled_layer(1, 8, 128, 32768, (2, 2))
    token = torch.randn(1, 8, 1, 128, dtype=DTYPE, device="cuda")
    row = Row("packing", "one token", "append_token", 1, 32768)
    rows.append(
        measure(
            row, lambda: ([lambda: triton_quantize.append_token(layer, token, token, [1])], 4 * token.numel()), copy
        )
    )
    return rows


def decoding(until: float, steps: int = 32) -> list[Row]:
    """Tokens a second of a random model of Llama-3.1-8B's shape: stock with its caches, KIVI eager and from a graph."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    from modeling_llama_kivi import LlamaForCausalLM_KIVI, LlamaKIVIConfig
    from modules.decode_runner import DecodeRunner

    torch.set_default_dtype(DTYPE)
    rows = []
    with torch.device("cuda"):
        model = LlamaForCausalLM_KIVI(LlamaKIVIConfig(**LLAMA_8B)).eval()
        with torch.device("meta"):
            stock = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, attn_implementation="sdpa"))
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.model.rotary_emb = model.model.rotary_emb
    stock.eval()

    @torch.no_grad()
    def run(batch: int, tokens: int, method: str) -> float:
        ids = torch.randint(0, 32000, (batch, tokens), device="cuda")
        if method.startswith("KIVI"):
            chosen, cache = model, model.create_kivi_cache(max_length=tokens + steps + 64)
        else:
            chosen = stock
            cache = (
                StaticCache(stock.config, max_cache_len=tokens + steps + 64) if method == "stock StaticCache" else None
            )
        part = None
        for piece in ids.split(max(1, 8192 // batch), dim=1):
            part = chosen(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = part.past_key_values
        token = part.logits[:, -1:].argmax(-1)
        runner = DecodeRunner(model, cache) if method == "KIVI graph" else None
        for count in range(steps + 3):
            if count == 3:
                torch.cuda.synchronize()
                start = time.perf_counter()
            if runner is not None:
                logits = runner.step(token)
            else:
                logits = chosen(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    for batch, tokens in ((1, 2048), (1, 32768), (8, 8192), (1, 65536), (32, 4096)):
        for method in ("stock DynamicCache", "stock StaticCache", "KIVI eager", "KIVI graph"):
            if time.monotonic() > until:
                continue
            row = Row("decoding", "Llama-3.1-8B, random", method, batch, tokens)
            try:
                seconds = run(batch, tokens, method)
                row.microseconds, row.per_second = seconds * 1e6, batch / seconds
            except (RuntimeError, ValueError, TypeError) as error:
                row.error = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            torch.cuda.empty_cache()
            rows.append(row)
            print(table([row]), flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Aligned text."""

    def cell(value) -> str:
        return (
            ""
            if value is None
            else f"{value:.3g}"
            if isinstance(value, float) and value < 100
            else f"{value:.0f}"
            if isinstance(value, float)
            else str(value)
        )

    cells = [[cell(v) for v in dataclasses.astuple(row)] for row in rows]
    widths = (10, 22, 20, 6, 8, 10, 8, 8, 8, 0)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)) for line in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for gpu_bench.json and gpu_bench.csv")
    parser.add_argument("--only", choices=("attention", "packing", "decoding"), nargs="+", help="parts to run")
    parser.add_argument("--minutes", type=float, default=7.0, help="measurements that would start later are left out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu_bench.py measures a CUDA GPU and there is none here. Without one: benchmarks/compile_report.py.",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    begin = time.monotonic()
    until = begin + 60 * arguments.minutes
    wanted = arguments.only or ("packing", "decoding", "attention")
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy bandwidth {copy:.0f} GB/s")
    rows = packing(copy) if "packing" in wanted else []
    print(table(rows))
    if "decoding" in wanted:
        rows += decoding(begin + 60 * arguments.minutes * 0.5)
    if "attention" in wanted:
        rows += attention(copy, until)
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = environment() | {"device": torch.cuda.get_device_name(), "copy_gigabytes_per_second": copy}
    (arguments.out / "gpu_bench.json").write_text(
        json.dumps(about | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
    )
    with open(arguments.out / "gpu_bench.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows(dataclasses.astuple(row) for row in rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
