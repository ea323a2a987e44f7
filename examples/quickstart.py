"""A small real model reads a long prompt and answers token by token from a 2-bit KV cache; then the numbers.

    python3 start.py demo                                       SmolLM2-135M-Instruct, fetched on the first run
    python examples/quickstart.py --model PATH --prompt FILE    any Llama or Qwen, any text

The table compares with the stock model and transformers' DynamicCache: same prompt, same loop, same run. Ctrl-C ends
the answer; the table is printed all the same.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ModelFlags, UserError, load_as_asked, offline_text, run

from modules.cli.command import argument, parse

if TYPE_CHECKING:
    from modules.cli.generate.streaming import Answer

TOPICS = ("with", "context-managers", "for", "while", "break", "del")
QUESTION = "What is the with statement used for? Answer in one paragraph."
WARM_UP_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart(ModelFlags):
    """The command line."""

    prompt: str | None = argument(None, "a text file to ask about or continue; None: Python's own manual")
    compare: bool = argument(True, "run the stock model too")


def read_prompt(file: str | None) -> str:
    """The prompt: a text and then a question about it, or what the user gave."""
    if file is None:
        return f"{offline_text(*TOPICS)}\n\n{QUESTION}"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not text.strip():
        raise UserError(f"{file} is empty.")
    return text


def warm_up(model: Any, input_ids: Any, cache: Any) -> None:
    """A short run, so that what is built or allocated once is not timed."""
    from modules.cli.generate.streaming import answer

    answer(model, input_ids[:, :256], cache, max_new_tokens=WARM_UP_TOKENS, stop=set())


def where_they_part(tokenizer: Any, ours: Answer, stock: Answer) -> str:
    """How far the two answers are the same."""
    length = min(len(ours.tokens), len(stock.tokens))
    same = next((i for i in range(length) if ours.tokens[i] != stock.tokens[i]), length)
    if same == len(ours.tokens) == len(stock.tokens):
        return f"Both answers are the same {same} tokens."
    text = tokenizer.decode(stock.tokens, skip_special_tokens=True)
    return f"The first {same} tokens are the same; the stock model's answer:\n\n{text}"


def dense_bytes(cache: Any) -> int:
    """Bytes of a DynamicCache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def table(cache: Any, ours: Answer, dtype: Any, stock: tuple[Answer, int] | None) -> Any:
    """What the cache holds and how fast it was, as a rich table."""
    from rich.table import Table

    info = cache.get_cache_info()
    tokens, size, bits = info["tokens"], info["bytes"], info["bits"]
    name = str(dtype).removeprefix("torch.")
    dense, dense16 = size["dense"], size["dense"] * 2 // dtype.itemsize
    seen = sum(tokens[part] for part in ("sinks", "packed", "window"))

    def megabytes(count: float) -> str:
        return f"{count / 1e6:.2f} MB"

    result = Table()
    result.add_column("")
    result.add_column("KIVI cache", justify="right")
    result.add_column("stock DynamicCache", justify="right")
    rows = [
        ("bits of keys, values", f"{cache.options.k_bits}, {cache.options.v_bits}", name),
        ("tokens in the cache", str(seen), str(seen)),
        ("  sinks (the first), full precision", str(tokens["sinks"]), ""),
        ("  packed", str(tokens["packed"]), ""),
        ("  window (the newest), full precision", str(tokens["window"]), ""),
        ("bits an element, all stored", f"{bits['stored']:.2f}", f"{8 * dtype.itemsize}"),
        ("  packed part, scales included", f"{bits['packed']:.2f}", ""),
        ("  nominal: codes, 16-bit window", f"{bits['nominal']:.2f}", ""),
        ("bytes of the cache", megabytes(size["total"]), megabytes(stock[1] if stock else dense)),
        (f"  less than {name} (the model's)", f"{dense / size['total']:.2f} times", ""),
        (f"  less than float16 ({megabytes(dense16)})", f"{dense16 / size['total']:.2f} times", ""),
    ]
    other = stock[0] if stock else None
    rows += [
        (
            "seconds to the first token",
            f"{ours.first_seconds:.2f}",
            f"{other.first_seconds:.2f}" if other else "not run",
        ),
        ("tokens a second after it (median)", speed(ours), speed(other) if other else "not run"),
    ]
    if other and ours.step_seconds and other.step_seconds:
        rows.append(("  KIVI to stock", f"{ours.tokens_per_second / other.tokens_per_second:.2f} times", ""))
    for row in rows:
        result.add_row(*row)
    return result


def speed(result: Answer) -> str:
    """Tokens a second, and how many there were."""
    return f"{result.tokens_per_second:.2f} (of {len(result.tokens)})"


def compare(args: Quickstart, input_ids: Any, length: int) -> tuple[Answer, int] | None:
    """The stock model on the same prompt: its answer and its cache's bytes; None where Ctrl-C came first."""
    from transformers import DynamicCache

    from modules.cli.generate.streaming import answer, stop_tokens
    from modules.cli.progress import progress

    model, tokenizer = load_as_asked(args, "smollm2", stock=True)
    warm_up(model, input_ids, DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    with progress("The stock model answers", length, unit="tokens") as update:
        done: list[int] = []
        result = answer(
            model,
            input_ids,
            cache,
            max_new_tokens=length,
            stop=stop_tokens(model, tokenizer),
            on_token=lambda token: (done.append(token), update(len(done))),
        )
    return None if result.interrupted else (result, dense_bytes(cache))


def main() -> None:
    """Load, answer, compare, print."""
    args = parse(Quickstart, description=__doc__)
    from rich.console import Console

    from modules.cli.generate.conversation import Conversation

    console = Console()
    prompt = read_prompt(args.prompt)
    model, tokenizer = load_as_asked(args, "smollm2")
    conversation = Conversation(model, tokenizer, model.create_kivi_cache())
    input_ids = conversation.new_ids(conversation.ids(prompt))
    conversation.check_length(input_ids.shape[1], args.max_new_tokens)
    warm_up(model, input_ids, model.create_kivi_cache())

    where = f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}"
    console.print(f"\nThe prompt has {input_ids.shape[1]} tokens ({where}). It ends:", style="bold")
    print(f"… {prompt[-200:].strip().splitlines()[-1]}\n")
    _, ours = conversation.ask(
        prompt, max_new_tokens=args.max_new_tokens, write=lambda text: print(text, end="", flush=True)
    )
    print("\n")
    if ours.interrupted:
        console.print("Stopped; what there is so far:", style="bold")
    stock = None
    if args.compare and not ours.interrupted:
        try:
            stock = compare(args, input_ids, args.max_new_tokens)
        except KeyboardInterrupt:
            console.print("\nThe comparison was stopped.")
    if stock:
        print(where_they_part(tokenizer, ours, stock[0]), end="\n\n")
    if ours.tokens:
        console.print(table(conversation.cache, ours, model.dtype, stock))
    if ours.tokens and not conversation.cache.get_cache_info()["tokens"]["packed"]:
        least = args.cache.sink_length + args.cache.residual_length + args.cache.group_size
        console.print(f"Nothing is packed yet: that starts at {least} tokens. Give a longer --prompt.")


if __name__ == "__main__":
    sys.exit(run(main))
