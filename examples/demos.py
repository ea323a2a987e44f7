"""The demos behind `example_llama_kivi.py` and `example_qwen_kivi.py`: the command `kivi` with a model at hand.

What they import of it is imported where it is used, so that `--help` needs nothing installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from common import ModelFlags, RunFlags, UserError, load_as_asked, offline_text, run, small_model

from modules.cli.command import argument, parse

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
        preset: the model of `kivi memory` that the memory table takes where no model is given.
    """

    script: str
    small_model: str
    preset: str


FAMILIES = {
    "llama": Family("example_llama_kivi.py", "smollm2", "llama-3.1-8b"),
    "qwen": Family("example_qwen_kivi.py", "qwen2.5-coder", "qwen2.5-7b"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags):
    """The command line, but for the demo."""

    prompt: str | None = argument(None, "a text instead of the demo's own")


def check_family(model: str, family: str) -> None:
    """Refuse a checkpoint of another family, naming the example that loads it."""
    from modules.cli.memory.figures import model_config

    model_type = model_config(model).model_type
    if model_type.startswith(family):
        return
    other = [entry.script for name, entry in FAMILIES.items() if model_type.startswith(name)]
    hint = f"use {other[0]}" if other else f"the examples load {' and '.join(FAMILIES)} models"
    raise UserError(f"{model} is of the model type {model_type!r}; {FAMILIES[family].script} loads {family}: {hint}.")


def memory(args: Flags, family: Family) -> None:
    """The compression table, by arithmetic; needs no model (kivi memory)."""
    from modules.cli.memory.flags import Memory
    from modules.cli.memory.run import run

    run(Memory(model=args.model or family.preset, cache=args.cache))


def _generate(args: Flags, family: Family, *prompts: str, raw: bool = False) -> None:
    """`kivi generate` with these prompts."""
    from modules.cli.generate.flags import Generate
    from modules.cli.generate.run import run

    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(RunFlags)}
    run(Generate(model=args.model or str(small_model(family.small_model)), prompt=prompts, raw=raw, **shared))


def basic(args: Flags, family: Family) -> None:
    """A text goes on (kivi generate --raw)."""
    _generate(args, family, args.prompt or PROMPTS[0], raw=True)


def stream(args: Flags, family: Family) -> None:
    """A question is answered, token by token (kivi generate)."""
    _generate(args, family, args.prompt or QUESTIONS[0])


def chat(args: Flags, family: Family) -> None:
    """Three turns over one cache: each turn feeds only what is new (kivi generate with several prompts)."""
    _generate(args, family, args.prompt or QUESTIONS[0], *QUESTIONS[1:])


def batch(args: Flags, family: Family) -> None:
    """Prompts of unequal length in one padded batch: each gets the text that it gets alone."""
    model, tokenizer = load_as_asked(args, family.small_model)
    prompts = [args.prompt, *PROMPTS[1:]] if args.prompt else list(PROMPTS)
    together = _texts(model, tokenizer, prompts, args)
    for prompt, text in zip(prompts, together):
        alone = _texts(model, tokenizer, [prompt], args)[0]
        print(f"> {prompt}\n{text}\n  [{'the same as alone' if text == alone else f'alone: {alone}'}]\n")


def beam(args: Flags, family: Family) -> None:
    """Beam search; the cache follows the beams."""
    model, tokenizer = load_as_asked(args, family.small_model)
    texts = _texts(model, tokenizer, [args.prompt or PROMPTS[0]], args, num_beams=4, num_return_sequences=2)
    for number, text in enumerate(texts, 1):
        print(f"{number}. {text}\n")


def _texts(model: Any, tokenizer: Any, prompts: list[str], args: Flags, **options: Any) -> list[str]:
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
    from modules.cli.generate.conversation import Conversation

    model, tokenizer = load_as_asked(args, family.small_model)
    prompt = args.prompt or f"{offline_text(*COMPARED_TOPICS)}\n\nWhat is the with statement used for?"
    for bits in (2, 4, 8, 16):
        cache = model.create_kivi_cache(k_bits=bits, v_bits=bits)
        print(f"{bits} bits:")
        _, result = Conversation(model, tokenizer, cache).ask(
            prompt, max_new_tokens=args.max_new_tokens, write=lambda piece: print(piece, end="", flush=True)
        )
        if result.interrupted:
            raise KeyboardInterrupt
        info = cache.get_cache_info()
        print(f"\n  [{info['bytes']['total'] / 1e6:.2f} MB, {info['bits']['stored']:.2f} bits an element]\n")


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
