"""How soon a second turn begins over a long history, with the kept cache of the first one and without, on this machine.

    python benchmarks/serving_cpu.py --model path/to/smollm2-135m-instruct --tokens 4000
    python benchmarks/serving_cpu.py --k-bits 4 --v-bits 4    # a cache of these options

A server listens on 127.0.0.1 and is asked through HTTP. A conversation's first turn has a prompt of so many tokens; the second one
adds a short question. The time is from asking to the first token of the answer, by a server that keeps caches and by one that does
not (--cache-memory 0B); a round has a prompt of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decode_cpu import default_model
from paths import RESULTS  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.cli.command import argument, check_least, group, parse
from modules.cli.generate.warm import warm_up
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.models.families import load_any
from modules.options import KIVIOptions
from modules.serving.flags import Serve
from modules.serving.run import Server, served_by

QUESTION, ANSWER_TOKENS = "\nWhat comes next?", 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str | None = argument(None, "a folder; None: SmolLM2-135M-Instruct, fetched")
    tokens: tuple[int, ...] = argument((4000,), "of the first turn")
    rounds: int = argument(5, "conversations")
    threads: int | None = argument(None, "of torch; None: as torch has it")
    output: Path = argument(RESULTS / "serving_cpu.json", "the result")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        for count in self.tokens:
            check_least(count, 200, "--tokens")
        check_least(self.rounds, 1, "--rounds")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")


@contextlib.contextmanager
def serving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache_memory: str) -> Iterator[tuple[str, int]]:
    """The address of a server that runs meanwhile."""
    command = Serve(model="measured", port=0, cache_memory=cache_memory)
    server = Server(served_by(command, model, tokenizer), command)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.addresses:
            time.sleep(0.01)
        yield server.addresses[0]
    finally:
        server.should_exit = True
        thread.join()


def ask(address: tuple[str, int], prompt: list[int]) -> tuple[float, int, str]:
    """Seconds to the first token, tokens of the prompt that a kept cache held, and the text of the answer."""
    body = {"model": "measured", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection(*address)
    start = time.perf_counter()
    data = json.dumps(body | {"stream_options": {"include_usage": True}})
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    first, chunks = None, []
    for line in reply:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            chunks.append(json.loads(line[6:]))
    connection.close()
    if reply.status != 200 or first is None or "error" in chunks[-1]:
        raise RuntimeError(f"the server answered {reply.status}: {chunks[-1:]}")
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    return first, chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"], text


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, rounds: int) -> dict[str, Any]:
    """Times to the first token of a second turn (milliseconds, median), and what of its prompt was kept (tokens).

    Two servers have the same model; they are never asked at once.
    """
    times: dict[str, list[float]] = {"1GB": [], "0B": []}
    kept = 0
    with serving(model, tokenizer, "1GB") as keeping, serving(model, tokenizer, "0B") as forgetting:
        for number in range(rounds):
            generator = torch.Generator().manual_seed(number)
            first = torch.randint(100, model.config.vocab_size, (tokens,), generator=generator).tolist()
            _, _, said = ask(keeping, first)
            second = first + tokenizer(said + QUESTION, add_special_tokens=False).input_ids
            for memory, address in (("1GB", keeping), ("0B", forgetting)):
                seconds, cached, _ = ask(address, second)
                times[memory].append(1e3 * seconds)
                kept = max(kept, cached)
    with_cache, without = (1000 * statistics.median(times[memory]) for memory in ("1GB", "0B"))
    return {"tokens": tokens, "kept": kept, "with_ms": with_cache, "without_ms": without, "ratio": without / with_cache}


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    name = flags.model or default_model()
    model, tokenizer = load_any(name, dtype=torch.float32, **dataclasses.asdict(flags.cache))
    warm_up(model, model.create_kivi_cache())
    rows = [measure(model, tokenizer, tokens, flags.rounds) for tokens in flags.tokens]
    here, settings = Environment.here(), {"model": Path(name).name, "dtype": "float32"}
    title = f"{settings['model']}, float32: {here.machine}; {here.versions}; {here.date}"
    table = Table("tokens", "of them kept", "first token, kept ms", "fed anew ms", "sooner", title=title)
    for row in rows:
        times = [f"{row[f'{what}_ms']:.0f}" for what in ("with", "without")]
        table.add_row(str(row["tokens"]), str(row["kept"]), *times, f"{row['ratio']:.1f}×")
    Console().print(table)
    save_result(BenchmarkResult("serving", rows, here, settings), flags.output)


if __name__ == "__main__":
    main()
