"""The demos behind `example_llama_kivi.py` and `example_qwen_kivi.py`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from common import (
    ModelFlags,
    TextStream,
    UserError,
    answer,
    chat_ids,
    load_as_asked,
    offline_text,
    run,
    source_of,
    stop_tokens,
)

from modules.cli.command import argument, parse
from modules.options import KIVIOptions, head_dim_of

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 32768)
QUESTIONS = (
    "Name three colours.",
    "Which of them is the darkest?",
    "Write one sentence about that colour.",
)
PROMPTS = ("The capital of France is", "Water boils at a temperature of", "Hello")
COMPARED_TOPICS = ("with", "for", "while")


@dataclasses.dataclass(frozen=True)
class Family:
    """What the demos need to know of a model family.

    Attributes:
        script: the example of the family, which loads model types that begin with the family's name.
        small_model: the default model, by its name in `common.SMALL_MODELS`.
        example: the model whose shape the memory table takes where no model is given.
        shape: its layers, KV heads and head size.
    """

    script: str
    small_model: str
    example: str
    shape: tuple[int, int, int]


FAMILIES = {
    "llama": Family("example_llama_kivi.py", "smollm2", "Llama-3.1-8B", (32, 8, 128)),
    "qwen": Family("example_qwen_kivi.py", "qwen2.5-coder", "Qwen2.5-7B", (28, 4, 128)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags):
    """The command line, but for the demo."""

    prompt: str | None = argument(None, "a text instead of the demo's own")


def memory(args: Flags, family: Family) -> None:
    """The compression table, by arithmetic; needs no model."""
    from rich.console import Console
    from rich.table import Table

    options = args.cache
    name, shape = _shape(args, family)
    table = Table(
        title=f"k_bits={options.k_bits} v_bits={options.v_bits} group_size={options.group_size} "
        f"residual_length={options.residual_length} sink_length={options.sink_length}",
        caption=f"{name}: {shape[0]} layers, {shape[1]} KV heads of {shape[2]}; one sequence; against 16 bits an element.\n"
        "Nominal: codes, and the window at 16 bits. Stored: also scales, minima, sinks and the window's whole ring. "
        "Capacity for growth (up to 6 % of the packed part) comes on top.",
        caption_justify="left",
    )
    for column in ("tokens", "nominal bits", "ratio", "memory", "stored bits", "ratio", "memory", "MB", "of MB"):
        table.add_column(column, justify="right")
    for tokens in LENGTHS:
        nominal, total, dense = _sizes(options, tokens, shape)
        table.add_row(
            str(tokens),
            f"{nominal:.2f}",
            f"{16 / nominal:.2f}x",
            f"{nominal / 16:.1%}",
            f"{16 * total / dense:.2f}",
            f"{dense / total:.2f}x",
            f"{total / dense:.1%}",
            f"{total / 1e6:.1f}",
            f"{dense / 1e6:.1f}",
        )
    Console().print(table)


def _sizes(options: KIVIOptions, tokens: int, shape: tuple[int, int, int]) -> tuple[float, float, float]:
    """Nominal bits an element, and the bytes of a cache of all layers and of the same tokens at 16 bits."""
    from modules.cache.report import cache_bytes, nominal_bits

    layers, heads, head_dim = shape
    bits = collections.Counter(options.bits_of_layer(layer, layers) for layer in range(layers))
    nominal = nominal_bits(
        tokens, sum(sum(pair) * n for pair, n in bits.items()) / (2 * layers), options.residual_length
    )
    total = dense = 0.0
    for (k_bits, v_bits), count in bits.items():
        chosen = {**dataclasses.asdict(options), "k_bits": k_bits, "v_bits": v_bits}
        size = cache_bytes(tokens, num_hidden_layers=1, num_key_value_heads=heads, head_dim=head_dim, **chosen)
        total, dense = total + count * size["total"], dense + count * size["dense"]
    return nominal, total, dense


def _shape(args: Flags, family: Family) -> tuple[str, tuple[int, int, int]]:
    """Name and shape of the model given, else of the family's example."""
    name, shape = family.example, family.shape
    if args.model:
        config = _config(args.model)
        name, shape = args.model, (config.num_hidden_layers, config.num_key_value_heads, head_dim_of(config))
    args.cache.check_head_dim(shape[2])
    return name, shape


def _config(model: str) -> Any:
    from transformers import AutoConfig

    name, source = source_of(model)
    return AutoConfig.from_pretrained(name, **source)


def check_family(model: str, family: str) -> None:
    """Refuse a checkpoint of another family, naming the example that loads it."""
    model_type = _config(model).model_type
    if model_type.startswith(family):
        return
    other = [entry.script for name, entry in FAMILIES.items() if model_type.startswith(name)]
    hint = f"use {other[0]}" if other else f"the examples load {' and '.join(FAMILIES)} models"
    raise UserError(f"{model} is of the model type {model_type!r}; {FAMILIES[family].script} loads {family}: {hint}.")


def basic(args: Flags, family: Family) -> None:
    """generate() with a KIVI cache, and what it holds afterwards."""
    from modeling_llama_kivi import print_kivi_stats

    model, tokenizer = load_as_asked(args, family.small_model)
    inputs = tokenizer(args.prompt or PROMPTS[0], return_tensors="pt").to(model.device)
    cache = model.create_kivi_cache()
    outputs = model.generate(
        **inputs, past_key_values=cache, use_cache=True, max_new_tokens=args.max_new_tokens, do_sample=False
    )
    print(tokenizer.decode(outputs[0], skip_special_tokens=True))
    print()
    print_kivi_stats(cache)


def stream(args: Flags, family: Family) -> None:
    """Your own loop: the prompt first, then one token at a time."""
    from modeling_llama_kivi import print_kivi_stats

    model, tokenizer = load_as_asked(args, family.small_model)
    cache = model.create_kivi_cache()
    _answer(model, tokenizer, [{"role": "user", "content": args.prompt or QUESTIONS[0]}], cache, args)
    print()
    print_kivi_stats(cache)


def chat(args: Flags, family: Family) -> None:
    """Three turns over one cache: each turn feeds only what is new."""
    model, tokenizer = load_as_asked(args, family.small_model)
    cache = model.create_kivi_cache()
    messages: list[dict[str, str]] = []
    stored: list[int] = []
    for question in (args.prompt, *QUESTIONS[1:]) if args.prompt else QUESTIONS:
        print(f"> {question}")
        messages.append({"role": "user", "content": question})
        tokens, text = _answer(model, tokenizer, messages, cache, args, stored)
        stored = tokens[: cache.get_seq_length()]  # the newest token is not in the cache yet
        messages.append({"role": "assistant", "content": text})
        print(f"  [{len(tokens)} tokens so far, {cache.get_cache_info()['tokens']['packed']} of them packed]\n")


def _answer(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], cache: Any, args: Flags, stored: Any = ()
) -> tuple[list[int], str]:
    """Stream an answer, feeding only the tokens after those the cache holds; all tokens, and the answer's text.

    A chat template may write an earlier answer otherwise than the model did, so the cache is first cropped to the
    tokens that it shares with the conversation.
    """
    ids = chat_ids(tokenizer, messages).to(model.device)
    tokens = ids[0].tolist()
    longest = min(len(stored), len(tokens) - 1)
    shared = next((i for i in range(longest) if tokens[i] != stored[i]), longest)
    if shared < cache.get_seq_length():
        cache.crop(shared - cache.get_seq_length())
    pieces: list[str] = []
    text = TextStream(tokenizer, lambda piece: (pieces.append(piece), print(piece, end="", flush=True)))
    result = answer(
        model,
        ids[:, shared:],
        cache,
        max_new_tokens=args.max_new_tokens,
        stop=stop_tokens(model, tokenizer),
        on_token=text.put,
    )
    text.end()
    print()
    if result.interrupted:
        raise KeyboardInterrupt
    return tokens + result.tokens, "".join(pieces)


def batch(args: Flags, family: Family) -> None:
    """Prompts of unequal length in one padded batch: each gets the text that it gets alone."""
    model, tokenizer = load_as_asked(args, family.small_model)
    prompts = [args.prompt, *PROMPTS[1:]] if args.prompt else list(PROMPTS)
    together = _generate(model, tokenizer, prompts, args)
    for prompt, text in zip(prompts, together):
        alone = _generate(model, tokenizer, [prompt], args)[0]
        print(f"> {prompt}\n{text}\n  [{'the same as alone' if text == alone else f'alone: {alone}'}]\n")


def beam(args: Flags, family: Family) -> None:
    """Beam search; the cache follows the beams."""
    model, tokenizer = load_as_asked(args, family.small_model)
    texts = _generate(model, tokenizer, [args.prompt or PROMPTS[0]], args, num_beams=4, num_return_sequences=2)
    for number, text in enumerate(texts, 1):
        print(f"{number}. {text}\n")


def _generate(model: Any, tokenizer: Any, prompts: list[str], args: Flags, **options: Any) -> list[str]:
    """The new text of each prompt, from one batch with its own KIVI cache."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    outputs = model.generate(
        **inputs,
        past_key_values=model.create_kivi_cache(),
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return tokenizer.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def compare(args: Flags, family: Family) -> None:
    """The same question with 2, 4, 8 and 16 bits, over a text long enough to be packed."""
    model, tokenizer = load_as_asked(args, family.small_model)
    prompt = args.prompt or f"{offline_text(*COMPARED_TOPICS)}\n\nWhat is the with statement used for?"
    for bits in (2, 4, 8, 16):
        cache = model.create_kivi_cache(k_bits=bits, v_bits=bits)
        print(f"{bits} bits:")
        _answer(model, tokenizer, [{"role": "user", "content": prompt}], cache, args)
        info = cache.get_cache_info()
        print(f"  [{info['bytes']['total'] / 1e6:.2f} MB, {info['bits']['stored']:.2f} bits an element]\n")


DEMOS: dict[str, Callable[[Flags, Family], None]] = {
    demo.__name__: demo for demo in (memory, basic, stream, chat, batch, beam, compare)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Flags):
    """The command line of an example."""

    demo: str = argument("basic", "which", tuple(DEMOS))


def main(family: str, arguments: list[str] | None = None) -> int:
    """The command line of one family's example; the exit status."""
    listed = "\n".join(f"  {name:8} {demo.__doc__.splitlines()[0]}" for name, demo in DEMOS.items())
    description = f"{family.capitalize()} with a packed KIVI cache. The demos:\n\n{listed}"

    def demo() -> None:
        args = parse(Example, arguments, description=description)
        if args.model:
            check_family(args.model, family)
        DEMOS[args.demo](args, FAMILIES[family])

    return run(demo)
