"""Decode steps of other engines' quantized caches on this CPU, beside ours: one small model, read from one GGUF file.

    pip install xllamacpp ik-llama-cpp-python openvino     # whichever you want to compare with
    python benchmarks/peers_cpu.py                                 # all that are installed, and ours
    python benchmarks/peers_cpu.py --only "llama.cpp q8_0" "KIVI 2 bits"   # the others keep their rows

Each row is the time of a step after 512, 8,000 and 30,000 tokens. The engines multiply weights in other ways, and Python's share
differs; so attention's part is shown apart: what a step after the most tokens takes more than one after the fewest. But for
llama.cpp's, whose server takes whole requests and is left out after 30,000 tokens, the caches are filled without running that long
a prompt: a step's time depends on the number of tokens, not on what they are.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peer_ik_llama
import peer_llama_cpp
import peer_openvino
import torch
from paths import RESULTS  # which puts the project's folder on the path
from transformers import DynamicCache, PreTrainedModel, StaticCache

from modules.cli.command import argument, check_least, parse
from modules.cli.folder import SMOLLM2, models_folder
from modules.cli.generate.loading import load
from modules.evaluation.decoding import fill
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, load_result, save_result
from modules.evaluation.timing import WARM_UP, percentiles, take_turns

TOKENS = (512, 8000, 30000)
OURS: dict[str, dict[str, Any]] = {
    "KIVI 2 bits": {"k_bits": 2, "v_bits": 2},
    "KIVI 4 bits": {"k_bits": 4, "v_bits": 4},
    "KIVI 8 bits": {"k_bits": 8, "v_bits": 8},
}
STOCK = ("StaticCache", "DynamicCache")
LEAST_REQUESTS = 5
Step = Callable[[], object]


class Contender(NamedTuple):
    """A cache of an engine."""

    sample: Callable[[Flags, int], list[float]]  # milliseconds of steps after so many tokens
    about: Callable[[], str]  # the package, its version, and what it was built for
    most_tokens: int = max(TOKENS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    gguf: Path | None = argument(None, "of the model; None: SmolLM2-135M-Instruct in the folder of the models")
    model: Path | None = argument(None, "a folder with the same model, for ours; None: likewise")
    only: tuple[str, ...] | None = argument(None, "rows to measure; None: all that are installed")
    tokens: tuple[int, ...] = argument(TOKENS, "of context")
    rounds: int = argument(24, "steps of each")
    threads: int = argument(2, "of every engine")
    output: Path = argument(RESULTS / "peers_cpu.json", "the result, to whose rows these are added")

    def __post_init__(self) -> None:
        for count in self.tokens:
            check_least(count, 1, "--tokens")
        check_least(self.rounds, 5, "--rounds")
        check_least(self.threads, 1, "--threads")
        unknown = set(self.only or ()) - set(contenders())
        if unknown:
            raise ValueError(f"--only must name rows of {', '.join(contenders())}; got {', '.join(sorted(unknown))}.")

    @property
    def gguf_file(self) -> Path:
        return self.gguf or models_folder() / f"{SMOLLM2}.gguf"

    @property
    def model_folder(self) -> Path:
        return self.model or models_folder() / SMOLLM2


def contenders() -> dict[str, Contender]:
    """Every row by name, ours first."""
    found = {name: Contender(functools.partial(our_samples, name), our_version) for name in (*STOCK, *OURS)}
    for cache in peer_llama_cpp.CACHES:
        found[f"llama.cpp {cache}"] = Contender(
            functools.partial(llama_cpp_samples, cache), peer_llama_cpp.version, peer_llama_cpp.MOST_TOKENS
        )
    for engine, peer in (("ik_llama.cpp", peer_ik_llama), ("OpenVINO", peer_openvino)):
        for cache in peer.CACHES:
            found[f"{engine} {cache}"] = Contender(functools.partial(peer_samples, peer, cache), peer.version)
    return found


def timed(step: Step, rounds: int) -> list[float]:
    """Milliseconds of a step, after two that warm up."""
    return take_turns({"": step}, rounds)[""]


def peer_samples(peer: types.ModuleType, cache: str, flags: Flags, tokens: int) -> list[float]:
    """Steps of an engine that gives a function a step."""
    return timed(peer.decode_step(flags.gguf_file, cache, tokens, flags.threads), flags.rounds)


def llama_cpp_samples(cache: str, flags: Flags, tokens: int) -> list[float]:
    """Steps of llama.cpp, as means over the tokens of its requests."""
    steps = peer_llama_cpp.request_steps(flags.gguf_file, cache, tokens, flags.threads)
    return [steps() for _ in range(max(LEAST_REQUESTS, flags.rounds // peer_llama_cpp.NEW))]


def our_samples(name: str, flags: Flags, tokens: int) -> list[float]:
    """Steps of transformers with one of its caches or ours."""
    torch.set_num_threads(flags.threads)
    model = our_model(flags.model_folder)
    room = tokens + flags.rounds + 2 * WARM_UP
    caches: dict[str, Callable[[], Any]] = {
        "StaticCache": lambda: StaticCache(model.config, max_cache_len=room),
        "DynamicCache": lambda: DynamicCache(config=model.config),
    }
    cache = caches[name]() if name in caches else model.create_kivi_cache(**OURS[name])
    fill({name: cache}, model.config, tokens, torch.float32)
    return timed(functools.partial(model, torch.tensor([[100]]), past_key_values=cache), flags.rounds)


@functools.cache
def our_model(folder: Path) -> PreTrainedModel:
    """The model as a KIVI model, in float32, in which transformers' own caches are fastest on a CPU."""
    return load(str(folder), dtype=torch.float32)[0]


def our_version() -> str:
    """What ours and transformers' caches run on."""
    return f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}, float32"


@torch.inference_mode()
def row_of(name: str, contender: Contender, flags: Flags, tokens: int) -> dict[str, Any]:
    """The times of a contender after `tokens` tokens."""
    return {"cache": name, "tokens": tokens, **percentiles(contender.sample(flags, tokens)), "with": contender.about()}


def merged(row: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The rows of a file with `row` in the place of that of the same cache and tokens, in the order of `contenders`."""
    earlier = load_result(path).rows if path.exists() else []
    rows = {(each["cache"], each["tokens"]): each for each in [*earlier, row]}
    order = list(contenders())
    return sorted(rows.values(), key=lambda each: (order.index(each["cache"]), each["tokens"]))


def measure(flags: Flags) -> list[str]:
    """Measure what is asked for and installed, and write after every row; the names of what is not installed."""
    missing = []
    settings = {"model": flags.gguf_file.stem, "rounds": flags.rounds, "threads": flags.threads}
    for name, contender in contenders().items():
        if flags.only is not None and name not in flags.only:
            continue
        try:
            for tokens in flags.tokens:
                if tokens <= contender.most_tokens:
                    row = row_of(name, contender, flags, tokens)
                    print(f"{name:18} {tokens:6} tokens  {row['p50_ms']:8.2f} ms", flush=True)
                    result = BenchmarkResult("peers", merged(row, flags.output), Environment.here(), settings)
                    save_result(result, flags.output)
        except ModuleNotFoundError as error:
            missing.append(f"{name}: {error}")
    return missing


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    for line in measure(flags):
        print(f"left out: {line}")


if __name__ == "__main__":
    main()
