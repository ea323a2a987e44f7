"""The demos behind `example_llama_kivi.py` and `example_qwen_kivi.py`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from common import (
    TextStream,
    add_options,
    answer,
    cache_options,
    chat_ids,
    load_as_asked,
    offline_text,
    run,
    stop_tokens,
)

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
        small_model: the default model, by its name in `common.SMALL_MODELS`.
        example: the model whose shape the memory table takes where no model is given.
        shape: its layers, KV heads and head size.
    """

    small_model: str
    example: str
    shape: tuple[int, int, int]


FAMILIES = {
    "llama": Family("smollm2", "Llama-3.1-8B", (32, 8, 128)),
    "qwen": Family("qwen2.5-coder", "Qwen2.5-7B", (28, 4, 128)),
}


def memory(args: argparse.Namespace, family: Family) -> None:
    """The compression table, by arithmetic; needs no model."""
    from rich.console import Console
    from rich.table import Table

    from modules.cache.report import cache_bytes, nominal_bits

    options = cache_options(args)
    name, (layers, heads, head_dim) = _shape(args, family)
    sides = {key: options[key] for key in ("k_bits", "v_bits", "group_size", "residual_length", "sink_length")}
    table = Table(
        title=f"k_bits={args.k_bits} v_bits={args.v_bits} group_size={args.group_size} "
        f"residual_length={args.residual_length} sink_length={args.sink_length}",
        caption=f"{name}: {layers} layers, {heads} KV heads of {head_dim}; one sequence; against 16 bits an element.\n"
        "Nominal: codes, and the window at 16 bits. Stored: also scales, minima, sinks and the window's whole ring. "
        "Capacity for growth (up to 6 % of the packed part) comes on top.",
        caption_justify="left",
    )
    for column in ("tokens", "nominal bits", "ratio", "memory", "stored bits", "ratio", "memory", "MB", "of MB"):
        table.add_column(column, justify="right")
    for tokens in LENGTHS:
        nominal = nominal_bits(tokens, (args.k_bits + args.v_bits) / 2, args.residual_length)
        size = cache_bytes(tokens, num_hidden_layers=layers, num_key_value_heads=heads, head_dim=head_dim, **sides)
        table.add_row(
            str(tokens),
            f"{nominal:.2f}",
            f"{16 / nominal:.2f}x",
            f"{nominal / 16:.1%}",
            f"{16 / size['ratio']:.2f}",
            f"{size['ratio']:.2f}x",
            f"{1 / size['ratio']:.1%}",
            f"{size['total'] / 1e6:.1f}",
            f"{size['dense'] / 1e6:.1f}",
        )
    Console().print(table)


def _shape(args: argparse.Namespace, family: Family) -> tuple[str, tuple[int, int, int]]:
    """Name and shape of the model given, else of the family's example."""
    from modules.options import KIVIOptions, head_dim_of

    name, shape = family.example, family.shape
    if args.model:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(args.model)
        name, shape = args.model, (config.num_hidden_layers, config.num_key_value_heads, head_dim_of(config))
    KIVIOptions(**cache_options(args)).check_head_dim(shape[2])
    return name, shape


def basic(args: argparse.Namespace, family: Family) -> None:
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


def stream(args: argparse.Namespace, family: Family) -> None:
    """Your own loop: the prompt first, then one token at a time."""
    from modeling_llama_kivi import print_kivi_stats

    model, tokenizer = load_as_asked(args, family.small_model)
    cache = model.create_kivi_cache()
    _answer(model, tokenizer, [{"role": "user", "content": args.prompt or QUESTIONS[0]}], cache, args)
    print()
    print_kivi_stats(cache)


def chat(args: argparse.Namespace, family: Family) -> None:
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
    model: Any, tokenizer: Any, messages: list[dict[str, str]], cache: Any, args: argparse.Namespace, stored: Any = ()
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


def batch(args: argparse.Namespace, family: Family) -> None:
    """Prompts of unequal length in one padded batch: each gets the text that it gets alone."""
    model, tokenizer = load_as_asked(args, family.small_model)
    prompts = [args.prompt, *PROMPTS[1:]] if args.prompt else list(PROMPTS)
    together = _generate(model, tokenizer, prompts, args)
    for prompt, text in zip(prompts, together):
        alone = _generate(model, tokenizer, [prompt], args)[0]
        print(f"> {prompt}\n{text}\n  [{'the same as alone' if text == alone else f'alone: {alone}'}]\n")


def beam(args: argparse.Namespace, family: Family) -> None:
    """Beam search; the cache follows the beams."""
    model, tokenizer = load_as_asked(args, family.small_model)
    texts = _generate(model, tokenizer, [args.prompt or PROMPTS[0]], args, num_beams=4, num_return_sequences=2)
    for number, text in enumerate(texts, 1):
        print(f"{number}. {text}\n")


def _generate(model: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace, **options: Any) -> list[str]:
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


def compare(args: argparse.Namespace, family: Family) -> None:
    """The same question with 2, 4, 8 and 16 bits, over a text long enough to be packed."""
    model, tokenizer = load_as_asked(args, family.small_model)
    prompt = args.prompt or f"{offline_text(*COMPARED_TOPICS)}\n\nWhat is the with statement used for?"
    for bits in (2, 4, 8, 16):
        cache = model.create_kivi_cache(k_bits=bits, v_bits=bits)
        print(f"{bits} bits:")
        _answer(model, tokenizer, [{"role": "user", "content": prompt}], cache, args)
        info = cache.get_cache_info()
        print(f"  [{info['bytes']['total'] / 1e6:.2f} MB, {info['bits']['stored']:.2f} bits an element]\n")


DEMOS: dict[str, Callable[[argparse.Namespace, Family], None]] = {
    demo.__name__: demo for demo in (memory, basic, stream, chat, batch, beam, compare)
}


def main(family: str, arguments: list[str] | None = None) -> int:
    """The command line of one family's example; the exit status."""
    listed = "\n".join(f"  {name:8} {demo.__doc__.splitlines()[0]}" for name, demo in DEMOS.items())
    parser = argparse.ArgumentParser(
        description=f"{family.capitalize()} with a packed KIVI cache. The demos:\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--demo", choices=DEMOS, default="basic", help="which (basic)")
    parser.add_argument("--prompt", metavar="TEXT", help="instead of the demo's own")
    add_options(parser)
    args = parser.parse_args(arguments)
    return run(lambda: DEMOS[args.demo](args, FAMILIES[family]))
