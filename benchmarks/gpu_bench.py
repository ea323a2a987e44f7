"""Measure the GPU backend: attention against PyTorch's and others' kernels, packing, and decoding of a whole model.

    python benchmarks/gpu_bench.py --out results            # everything, under nine minutes on an H100
    python benchmarks/gpu_bench.py --only attention --minutes 2    # beside what the file has of the other parts

Times are medians of CUDA-graph replays between device events. Each replay goes round several caches that together exceed
the L2 cache four times, so that codes come from device memory as they do inside a model. Bytes are those a step must read:
codes, metadata and the full-precision tokens, or keys and values for the full-precision kernels; the share is of the
copy bandwidth measured on the spot (bytes read plus bytes written of a large device copy).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paths  # noqa: F401, which puts the project's folder on the path
import torch

from modules.cli.command import argument, check_least, parse
from modules.codecs.kivi import codecs_of
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, load_result, save_result
from modules.evaluation.tables import plain, write_csv
from modules.kernels.registry import backend
from modules.options import KIVIOptions
from modules.store.layer import PackedLayer
from modules.store.ledger import Geometry, Ledger
from modules.store.step import Step

SHAPES = {"Llama-2-7B": (32, 32, 128), "Llama-3.1-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}
TOKENS = (32768, 8192, 131072, 2048)  # what time does not allow for comes last
BATCHES = (1, 8, 16, 64)
LARGE_METADATA = {"metadata_bits": 16, "wide_channels": 0.25}  # as many bits as the defaults
PACKED: dict[str, tuple[int, dict[str, Any]]] = {  # bits of keys and values, and other options
    "packed K2 V2": (2, {}),
    "packed K4 V4": (4, {}),
    "packed K8 V8": (8, {}),
    "packed K2 V2, metadata of 16 bits": (2, LARGE_METADATA),
}
PARTS = ("packing", "end-to-end", "attention")
DTYPE = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there its layers are only made, in tests
REPLAYS = 20
FLASHINFER_PAGE = 16  # tokens
COMPILED = "stock StaticCache, torch.compile"
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
    peak_gigabytes: float | None = None
    error: str = ""

    def fail(self, error: Exception) -> Row:
        """Say in one line what went wrong."""
        self.error = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}"
        return self


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
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.numel() / _median_of_events(lambda: target.copy_(source), REPLAYS) / 1e6


def rotation(bytes_of_one: float) -> int:
    """How many caches exceed the L2 cache four times; at least two."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 0
    return max(2, int(-(-4 * l2 // bytes_of_one)))


def new_ledger(tokens: int, room: int) -> Ledger:
    """A ledger of no sequences yet, with place for `tokens` and `room` more."""
    options = KIVIOptions()
    geometry = Geometry(options.group_size, options.residual_length, options.sink_length)
    return Ledger(geometry, max_length=tokens + room)


def count_tokens(ledger: Ledger, batch: int, tokens: int) -> None:
    """Say that every layer holds `tokens` tokens of `batch` sequences, on the host and on the device."""
    ledger.clear([0] * batch)
    ledger.commit(Step.of(None, batch, tokens))
    ledger.counts(torch.device(DEVICE))


def filled_layer(
    batch: int, kv_heads: int, head_dim: int, bits: tuple[int, int], ledger: Ledger, **chosen: Any
) -> PackedLayer:
    """A layer of random codes and plausible metadata; nothing is quantized. `chosen` are `KIVIOptions`'."""
    options = KIVIOptions(k_bits=bits[0], v_bits=bits[1], **chosen)
    like = torch.empty(batch, kv_heads, 1, head_dim, dtype=DTYPE, device=DEVICE)
    layer = PackedLayer.empty(like, codecs_of(options, bits, head_dim), ledger, options.rotates_values(bits[1]))
    for side in layer.sides:
        side.codes.random_()
        if side.extra is not None:
            side.extra.random_()
        scale, minimum = (torch.empty(side.scale.shape, device=DEVICE) for _ in range(2))
        numbers = side.codec.metadata.pack(scale.uniform_(0.2, 0.6), minimum.uniform_(-1.0, -0.5), side.bits)
        side.scale, side.minimum = (each.contiguous() for each in numbers)
        side.sinks.normal_()
        side.window.normal_()
    return layer


def single_layer(
    batch: int, kv_heads: int, head_dim: int, tokens: int, bits: tuple[int, int], **chosen: Any
) -> PackedLayer:
    """A filled layer with a ledger of its own, `tokens` long with place for 64 more; `chosen` are `KIVIOptions`'."""
    ledger = new_ledger(tokens, 64)
    layer = filled_layer(batch, kv_heads, head_dim, bits, ledger, **chosen)
    count_tokens(ledger, batch, tokens)
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


def states(batch: int, heads: int, tokens: int, head_dim: int) -> torch.Tensor:
    """Random states of new tokens."""
    return torch.randn(batch, heads, tokens, head_dim, dtype=DTYPE, device=DEVICE)


def packed_layers(shape, batch: int, tokens: int, bits: tuple[int, int], **chosen: Any) -> list[PackedLayer]:
    """Layers that together exceed the L2 cache; `chosen` are `KIVIOptions`'."""
    _, kv_heads, head_dim = shape
    estimate = 2 * batch * kv_heads * tokens * head_dim * (sum(bits) / 16 + 0.125)
    return [single_layer(batch, kv_heads, head_dim, tokens, bits, **chosen) for _ in range(rotation(estimate))]


def packed_steps(shape, batch: int, tokens: int, bits: tuple[int, int], **chosen: Any):
    """Attention steps over packed layers, and the bytes of one; `chosen` are `KIVIOptions`'."""
    heads, kv_heads, head_dim = shape
    layers = packed_layers(shape, batch, tokens, bits, **chosen)
    query = states(batch, heads, 1, head_dim)
    key, value = (states(batch, kv_heads, 1, head_dim) for _ in range(2))
    one = Step.of(None, batch, 1)

    def step(layer):
        return lambda: backend("triton").attend(query, key, value, layer, head_dim**-0.5, one)

    return [step(layer) for layer in layers], bytes_read(layers[0])


def flashinfer_steps(query: torch.Tensor, caches: list[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    """Attention steps of FlashInfer for queries `[B, H, D]` over caches `[2, B, T, Hkv, D]`; several sequences are pages of its
    paged cache, planned once, as their lengths stay."""
    import flashinfer

    (batch, heads, head_dim), (tokens, kv_heads) = query.shape, caches[0].shape[2:4]
    if batch == 1:
        return [lambda c=c: flashinfer.single_decode_with_kv_cache(query[0], c[0, 0], c[1, 0]) for c in caches]
    pages = tokens // FLASHINFER_PAGE
    counts = dict(dtype=torch.int32, device=DEVICE)
    first = torch.arange(batch + 1, **counts) * pages
    whole = torch.full((batch,), FLASHINFER_PAGE, **counts)
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=heads > kv_heads)
    wrapper.plan(
        first,
        torch.arange(batch * pages, **counts),
        whole,
        heads,
        kv_heads,
        head_dim,
        FLASHINFER_PAGE,
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
    )
    paged = [tuple(side.reshape(-1, FLASHINFER_PAGE, kv_heads, head_dim) for side in cache) for cache in caches]
    return [lambda c=c: wrapper.run(query, c) for c in paged]


def full_precision_steps(shape, batch: int, tokens: int, method: str):
    """Attention steps of a full-precision kernel, and the bytes of one."""
    heads, kv_heads, head_dim = shape
    size = 2 * batch * kv_heads * tokens * head_dim * 2
    caches = [
        torch.randn(2, batch, kv_heads, tokens, head_dim, dtype=DTYPE, device=DEVICE) for _ in range(rotation(size))
    ]
    query = torch.randn(batch, heads, 1, head_dim, dtype=DTYPE, device=DEVICE)
    if method == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        caches = [cache.transpose(2, 3).contiguous() for cache in caches]
        return [
            lambda c=c: flash_attn_with_kvcache(query.transpose(1, 2), c[0], c[1], causal=True) for c in caches
        ], size
    if method == "flashinfer":
        caches = [cache.transpose(2, 3).contiguous() for cache in caches]
        return flashinfer_steps(query[:, :, 0], caches), size
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
    """Time what `make` returns; whatever goes wrong becomes an error, and the others are measured."""
    try:
        steps, size = make()
        row.microseconds = time_graphed(steps)
        row.gigabytes_per_second = size / row.microseconds / 1e3
        row.share_of_copy = row.gigabytes_per_second / copy
    except Exception as error:  # of a library that is measured
        row.fail(error)
    steps = None
    torch.cuda.empty_cache()
    return row


def attention(copy: float, until: float) -> Iterator[Row]:
    """Every shape, batch and length that fits a third of the memory, until time is up."""
    memory = torch.cuda.get_device_properties(0).total_memory
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    for tokens, batch, (name, shape) in itertools.product(TOKENS, BATCHES, SHAPES.items()):
        size = max(2 * 4 * batch * shape[1] * tokens * shape[2], 4 * l2)
        if size > memory / 3 or time.monotonic() > until:
            continue
        for method, (bits, chosen) in PACKED.items():
            make = functools.partial(packed_steps, shape, batch, tokens, (bits, bits), **chosen)
            yield measure(Row("attention", name, method, batch, tokens), make, copy)
        for method in ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "flash-attn", "flashinfer"):
            make = functools.partial(full_precision_steps, shape, batch, tokens, method)
            yield measure(Row("attention", name, method, batch, tokens), make, copy)


def packing_steps(what: str, bits: int, method: str, tokens: int = 32768, **chosen: Any):
    """Steps that quantize a prompt into a layer of Llama-3.1-8B's heads, and the bytes of one, read and written; `chosen` are
    `KIVIOptions`'."""
    size = 8 * tokens * 128 * (2 + bits / 8 + 0.125)
    steps = []
    for _ in range(rotation(size)):
        layer = single_layer(1, 8, 128, tokens, (bits, bits), **chosen)
        side = layer.key if what == "keys" else layer.value
        side.codec = dataclasses.replace(side.codec, method=method)
        states = torch.randn(1, 8, layer.packed[0], 128, dtype=DTYPE, device=DEVICE)
        steps.append(functools.partial(backend("triton").pack, side, slice(0, 1), 0, states))
    return steps, size


def append_steps(tokens: int = 32768):
    """Steps that append a token and pack nothing, and the bytes of one."""
    layer = single_layer(1, 8, 128, tokens, (2, 2))
    token = torch.randn(1, 8, 1, 128, dtype=DTYPE, device=DEVICE)
    return [functools.partial(backend("triton").append, layer, token, token, Step.of(None, 1, 1))], 4 * token.numel()


def packing(copy: float) -> Iterator[Row]:
    """Quantizing a prompt of 32k tokens into the cache, and one decode append."""
    for what, bits, method in (
        ("keys", 2, "lsq"), ("keys", 2, "minmax"), ("keys", 4, "lsq"), ("values", 2, "clipped"), ("values", 4, "minmax"),
    ):  # fmt: skip
        row = Row("packing", f"{what} {bits} bits {method}", "pack_groups", 1, 32768)
        yield measure(row, functools.partial(packing_steps, what, bits, method), copy)
    for what, method in (("keys", "lsq"), ("values", "clipped")):
        row = Row("packing", f"{what} 2 bits {method}, metadata of 16 bits", "pack_groups", 1, 32768)
        yield measure(row, functools.partial(packing_steps, what, 2, method, **LARGE_METADATA), copy)
    yield measure(Row("packing", "one token", "append_token", 1, 32768), append_steps, copy)


def random_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A KIVI model of Llama-3.1-8B's shape and a stock one with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from modeling_llama_kivi import LlamaForCausalLM_KIVI, LlamaKIVIConfig

    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM_KIVI(LlamaKIVIConfig(**LLAMA_8B)).eval()
        with torch.device("meta"):
            stock = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, attn_implementation="sdpa")).eval()
    finally:
        torch.set_default_dtype(default)
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.model.rotary_emb = model.model.rotary_emb
    return model, stock


def filled_cache(model, method: str, batch: int, tokens: int, room: int):
    """The cache of `method` with `tokens` random tokens of every sequence and place for `room` more."""
    from transformers import DynamicCache, StaticCache

    config = model.config
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    if method.startswith("KIVI"):
        cache = model.create_kivi_cache(max_length=tokens + room)
        for layer in cache.layers:
            layer.store, layer.backend = (
                filled_layer(batch, kv_heads, head_dim, layer.bits, cache.ledger),
                backend("triton"),
            )
            layer.dtype, layer.device, layer.is_initialized = DTYPE, torch.device(DEVICE), True
        count_tokens(cache.ledger, batch, tokens)
        return cache
    if "StaticCache" in method:
        cache = StaticCache(config, max_cache_len=tokens + room)
        cache.early_initialization(batch, kv_heads, head_dim, DTYPE, torch.device(DEVICE))
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(tokens)
        return cache
    cache = DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, batch, kv_heads, tokens, head_dim, dtype=DTYPE, device=DEVICE), index)
    return cache


def stepper(
    model, cache, token: torch.Tensor, *, graphed: bool = False, compiled: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from a token `[B, 1]` to the next; `graphed` records a stock model's step in a CUDA graph, `compiled` has
    torch.compile make one, as transformers' documentation of a static cache does."""

    def step(token: torch.Tensor) -> torch.Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    if compiled:
        return torch.compile(step, mode="reduce-overhead")
    if not graphed:
        return step
    still = token.clone()
    step(still)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        following = step(still)

    def replay(token: torch.Tensor) -> torch.Tensor:
        still.copy_(token)
        graph.replay()
        return following

    return replay


@torch.no_grad()
def seconds_a_step(model, method: str, batch: int, tokens: int, steps: int) -> float:
    """Mean seconds of a decode step, three before them not counted."""
    cache = filled_cache(model, method, batch, tokens, steps + 64)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    step = stepper(model, cache, token, graphed=method.endswith(", graph"), compiled=method == COMPILED)
    for count in range(steps + 3):
        if count == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        token = step(token).clone()  # what is replayed writes the next one there
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def sequences_that_fit(method: str, tokens: int) -> int:
    """About how many sequences of `tokens` tokens fit the free memory: bytes of a KIVI cache, or of 16-bit states."""
    layers, kv_heads, head_dim = (LLAMA_8B[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    bits = 3.25 if method.startswith("KIVI") else 16  # with window and sinks
    one = 2 * layers * kv_heads * head_dim * tokens * bits / 8
    return max(1, int(0.92 * torch.cuda.mem_get_info()[0] / one))


def end_to_end(until: float, steps: int = 32) -> Iterator[Row]:
    """Tokens a second of a random model of Llama-3.1-8B's shape over filled caches: at equal batch, at the largest batch
    that fits (a tenth less after each failure), and last, as it takes minutes to compile, under torch.compile."""
    model, stock = random_models()
    methods = ("stock DynamicCache", "stock StaticCache, graph", "KIVI eager", "KIVI graph")
    cases = [(batch, tokens, method) for batch, tokens in ((1, 32768), (8, 32768)) for method in methods]
    cases += [(0, 32768, method) for method in methods[1::2]]
    cases += [
        (batch, tokens, method) for batch, tokens in ((1, 2048), (32, 4096), (1, 131072 - 128)) for method in methods
    ]
    cases.append((1, 32768, COMPILED))
    for wanted, tokens, method in cases:
        batch = wanted or sequences_that_fit(method, tokens)
        model.use_cuda_graphs = method == "KIVI graph"
        while time.monotonic() < until:
            name = method if wanted else f"{method}, largest batch"
            row = Row("end-to-end", "Llama-3.1-8B, random", name, batch, tokens)
            torch.cuda.reset_peak_memory_stats()
            try:
                seconds = seconds_a_step(model if method.startswith("KIVI") else stock, method, batch, tokens, steps)
                row.microseconds, row.per_second = seconds * 1e6, batch / seconds
                row.peak_gigabytes = torch.cuda.max_memory_allocated() / 1e9
            except Exception as error:  # most often memory
                row.fail(error)
            gc.collect()
            torch.cuda.empty_cache()
            if row.error and not wanted and batch > 1:
                batch = min(batch - 1, int(0.9 * batch))
                continue
            yield row
            break


def line(row: Row) -> str:
    """A row as aligned text."""
    widths = (10, 22, 40, 6, 8, 10, 8, 8, 8, 8, 0)
    return "  ".join(plain(value).ljust(width) for value, width in zip(dataclasses.astuple(row), widths))


def earlier_rows(folder: Path, parts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows that `gpu_bench.json` has of the same GPU and packages, but for those of `parts`."""
    path = folder / "gpu_bench.json"
    if not path.exists():
        return []
    result, here = load_result(path), Environment.here(device=DEVICE)
    if (result.environment.processor, result.environment.packages) != (here.processor, here.packages):
        return []
    return [row for row in result.rows if row["part"] not in parts]


def write(rows: list[dict[str, Any]], copy: float, folder: Path) -> None:
    """`gpu_bench.json` and `gpu_bench.csv`; after every row, so that a run that is cut short leaves what it has."""
    settings = {"copy_gigabytes_per_second": copy}
    result = BenchmarkResult("gpu", rows, Environment.here(device=DEVICE), settings)
    save_result(result, folder / "gpu_bench.json")
    write_csv(result, folder / "gpu_bench.csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    out: Path = argument(Path("results"), "folder for gpu_bench.json and gpu_bench.csv")
    only: tuple[str, ...] = argument(PARTS, "parts to run", PARTS)
    minutes: float = argument(7.0, "measurements that would start later are left out")

    def __post_init__(self) -> None:
        check_least(self.minutes, 0, "--minutes")


def main() -> int:
    flags = parse(Flags, description=__doc__)
    if not torch.cuda.is_available():
        print(
            "gpu_bench.py measures a CUDA GPU and there is none here. Without one: benchmarks/compile_report.py.",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    begin, seconds = time.monotonic(), 60 * flags.minutes
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy bandwidth {copy:.0f} GB/s")
    rows = earlier_rows(flags.out, flags.only)
    shared = "end-to-end" in flags.only and "attention" in flags.only
    parts = {
        "packing": lambda: packing(copy),
        "end-to-end": lambda: end_to_end(begin + seconds * (0.5 if shared else 1)),
        "attention": lambda: attention(copy, begin + seconds),
    }
    for row in itertools.chain.from_iterable(parts[name]() for name in flags.only):
        rows.append(dataclasses.asdict(row))
        print(line(row), flush=True)
        write(rows, copy, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
