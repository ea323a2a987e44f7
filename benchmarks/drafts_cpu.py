"""Tokens a second of greedy decoding with drafts, over KIVI caches and transformers' own, on this machine.

    python benchmarks/drafts_cpu.py --model path/to/smollm2-135m-instruct
    python benchmarks/drafts_cpu.py --tokens 2000 --k-bits 4 --v-bits 4    # a cache of these options

The text is source code, in which much comes again. Drafts are looked up in the prompt, or made by the model itself as its own
assistant: that saves no time, and shows what is accepted where every draft is right but for what a cache changes. What is accepted
of two texts cannot be compared, and a 2-bit cache goes on with another text after a while. So every cache goes along one text as
well, what a DynamicCache makes without drafts: each of its tokens comes whatever is predicted, and drafts from the prompt are accepted
where the cache predicts them and the text goes on so. The prompt is fed to each cache once, and all goes on from copies, but
`generate()` with a DynamicCache: over one that is filled transformers drafts wrongly. Times begin with the first token that is given:
prompts, also the assistant's, are not in them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_cpu import default_model
from paths import RESULTS  # which puts the project's folder on the path
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.streamers import BaseStreamer

from modules.cli.command import argument, check_least, group, parse
from modules.evaluation.candidates import changes
from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.evaluation.texts import encode, load_text
from modules.models.families import load_any
from modules.options import KIVIOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str | None = argument(None, "a folder; None: SmolLM2-135M-Instruct, fetched")
    text: str = argument("code", "prose, code or a file")
    tokens: int = argument(8000, "of the prompt")
    new_tokens: int = argument(64, "that are made")
    lookup: tuple[int, ...] = argument((4, 10), "tokens of a draft from the prompt, at most")
    assisted_tokens: int = argument(2000, "of the prompt with the model as its own assistant, which takes it once more")
    dtype: str = argument("float32", "of the weights", ("float32", "bfloat16"))
    threads: int | None = argument(None, "of torch; None: as torch has it")
    output: Path = argument(RESULTS / "drafts_cpu.json", "the result")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        check_least(self.tokens, 2, "--tokens")
        check_least(self.assisted_tokens, 2, "--assisted-tokens")
        check_least(self.new_tokens, 2, "--new-tokens")
        for count in self.lookup:
            check_least(count, 1, "--lookup")
        check_least(1 if self.threads is None else self.threads, 1, "--threads")


class Clock(BaseStreamer):
    """When how many tokens were given; the first time it is the prompt that comes."""

    def __init__(self) -> None:
        self.given: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        """Tokens of a step."""
        self.given.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing more comes."""

    @property
    def steps(self) -> list[tuple[float, int]]:
        """Time and tokens of each step of the model."""
        return self.given[1:]

    @property
    def tokens_a_second(self) -> float:
        """From the end of the first step on."""
        (start, _), (end, _) = self.steps[0], self.steps[-1]
        return sum(count for _, count in self.steps[1:]) / (end - start)

    @property
    def accepted(self) -> int:
        """Tokens beyond the one that each step of the model gives anyway."""
        return sum(count - 1 for _, count in self.steps)


def decode(
    model: PreTrainedModel, prompt: torch.Tensor, cache: Cache, new_tokens: int, **drafts: Any
) -> tuple[Clock, list[int]]:
    """Greedy tokens after a prompt, of which `cache` holds nothing or all but the last token, and how they came."""
    clock = Clock()
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, past_key_values=cache, streamer=clock, **options, **drafts)
    return clock, out[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
def go_along(
    model: PreTrainedModel, cache: Cache, prompt: torch.Tensor, text: list[int], lookup: int = 0
) -> tuple[Clock, int]:
    """How `text` came after a prompt, of which `cache` holds nothing or all but the last token, each step with a draft of
    `lookup` tokens from what is before; and how many tokens the drafts had."""
    clock, drafted = Clock(), 0
    ids = torch.cat((prompt, torch.tensor([text])), 1)
    done, end = prompt.shape[1], ids.shape[1]
    clock.put(prompt)
    candidates = PromptLookupCandidateGenerator(num_output_tokens=lookup, max_length=end) if lookup else None
    if candidates:
        cache.activate_past_recording()
    while done < end:
        known = candidates.get_candidates(ids[:, :done])[0][:, : end - 1] if candidates else ids[:, :done]
        draft = known[0, done:]
        new = known[:, int(cache.get_seq_length()) :]
        predicted = model(new, past_key_values=cache, logits_to_keep=len(draft) + 1).logits[0, :-1].argmax(-1)
        right = (predicted == draft) & (draft == ids[0, done : done + len(draft)])
        accepted = int(right.long().cumprod(0).sum())
        if accepted < len(draft):
            cache.crop(accepted - len(draft))
        drafted += len(draft)
        done += accepted + 1
        clock.put(ids[0, done - accepted - 1 : done])
    return clock, drafted


def in_common(first: list[int], second: list[int]) -> int:
    """Tokens before the first that differs."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def measure(
    model: PreTrainedModel, prompt: torch.Tensor, flags: Flags, assistant: PreTrainedModel | None = None
) -> list[dict[str, Any]]:
    """A row for each cache and way of decoding: without drafts, and with drafts of the assistant, or from the prompt."""
    ways: dict[str, dict[str, Any]] = {"none": {}}
    if assistant is None:
        ways |= {f"from the prompt, {count}": {"prompt_lookup_num_tokens": count} for count in flags.lookup}
    else:
        ways["by itself"] = {"assistant_model": assistant}
    for each in filter(None, (model, assistant)):
        each.generation_config.eos_token_id = None  # all are to make as many tokens
    filled: dict[str, Cache] = {"DynamicCache": DynamicCache(config=model.config)}
    filled["KIVI"] = model.create_kivi_cache(**changes(flags.cache))
    with torch.inference_mode():
        for cache in filled.values():
            model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
    caches: dict[str, Callable[[], Cache]] = {
        "DynamicCache": functools.partial(DynamicCache, config=model.config),
        "KIVI": functools.partial(copy.deepcopy, filled["KIVI"]),
    }
    rows: list[dict[str, Any]] = []
    text: list[int] = []
    for name, make in caches.items():
        alone: list[int] = []
        for drafts, way in ways.items():
            if assistant is not None:
                assistant.use_kivi_cache = name == "KIVI"
            clock, tokens = decode(model, prompt, make(), flags.new_tokens, **way)
            alone, text = alone or tokens, text or tokens
            row = {"tokens": prompt.shape[1], "cache": name, "drafts": drafts}
            row |= {"tokens_a_second": clock.tokens_a_second, "steps": len(clock.steps), "accepted": clock.accepted}
            row |= {"speedup": clock.tokens_a_second / rows[0]["tokens_a_second"] if rows else 1.0}
            row |= {"as_without": tokens == alone, "as_stock": in_common(tokens, text)}
            if assistant is None:
                count = way.get("prompt_lookup_num_tokens", 0)
                clock, drafted = go_along(model, copy.deepcopy(filled[name]), prompt, text, count)
                row |= {"along_tokens_a_second": clock.tokens_a_second, "along_accepted": clock.accepted}
                row |= {"along_drafted": drafted}
            rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write."""
    flags = parse(Flags, description=__doc__)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    name = flags.model or default_model()
    model, tokenizer = load_any(name, dtype=getattr(torch, flags.dtype))
    assistant, _ = load_any(name, dtype=getattr(torch, flags.dtype), **changes(flags.cache))
    ids = encode(tokenizer, load_text(flags.text), max(flags.tokens, flags.assisted_tokens), flags.text)
    rows = measure(model, ids[:, : flags.tokens], flags)
    rows += measure(model, ids[:, : flags.assisted_tokens], flags, assistant)
    settings = {"model": Path(name).name, "text": flags.text, "new tokens": flags.new_tokens, "dtype": flags.dtype}
    here = Environment.here()
    heads = ["tokens", "cache", "drafts", "tokens/s", "against DynamicCache", "steps", "accepted", "same tokens"]
    heads += ["as stock", "along: tokens/s", "along: accepted"]
    table = Table(*heads, title=f"{settings['model']}: {here.machine}; {here.versions}")
    for row in rows:
        figures = [f"{row['tokens_a_second']:.1f}", f"{row['speedup']:.2f}x", str(row["steps"]), str(row["accepted"])]
        figures += ["yes" if row["as_without"] else "no", str(row["as_stock"])]
        if "along_drafted" in row:
            figures += [f"{row['along_tokens_a_second']:.1f}", f"{row['along_accepted']} of {row['along_drafted']}"]
        table.add_row(str(row["tokens"]), row["cache"], row["drafts"], *figures)
    Console().print(table)
    save_result(BenchmarkResult("drafts", rows, here, settings), flags.output)


if __name__ == "__main__":
    main()
