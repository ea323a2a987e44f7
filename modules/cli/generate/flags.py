"""Answers to prompts, streamed, over a quantized KV cache.

Without --prompt and --chat the prompt is what comes from stdin. The answer goes to stdout and all else to stderr. Several prompts, or --chat, are turns of one
conversation: each feeds only what is new, and the cache holds the history. Ctrl-C ends an answer; in a chat the next
turn goes on from what there is. At the end: tokens a second, and the cache's bytes beside float16's.

Examples:
  kivi generate path/to/model --prompt "Name three colours."
  kivi generate path/to/model --prompt "Name three colours." "Which is the darkest?" --k-bits 4 --v-bits 4
  kivi generate path/to/model --chat --temperature 0.7
  kivi generate path/to/model --save-cache report.kivi < report.txt
  kivi generate path/to/model --load-cache report.kivi --prompt "What did it say of costs?"
  kivi generate path/to/folder --gguf-file model.gguf --raw --prompt "The capital of France is"

In a chat: /help lists the commands; Ctrl-D ends it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from modules.cli.command import argument, check_least, group
from modules.cli.source import MODEL_HELP
from modules.options import KIVIOptions

DTYPES = ("float32", "float16", "bfloat16", None)
DESCRIPTION = (__doc__ or "").strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The flags of whatever runs a model over its cache."""

    dtype: str | None = argument(None, "of the weights; None: float32 on a CPU, float16 on a GPU", DTYPES)
    device: str | None = argument(None, "as torch names it; None: a GPU where there is one")
    max_new_tokens: int = argument(128, "longest answer, in tokens")
    threads: int | None = argument(None, "CPU threads; None: as torch has it")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        check_least(self.max_new_tokens, 1, "--max-new-tokens")
        if self.threads is not None:
            check_least(self.threads, 1, "--threads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(RunFlags):
    """The command line."""

    model: str = argument(help=MODEL_HELP, positional=True)
    prompt: tuple[str, ...] = argument((), "one or several, answered in turn; none: what comes from stdin")
    chat: bool = argument(False, "a conversation in the terminal, after the prompts if there are any")
    system: str | None = argument(None, "what the model is told before the first turn")
    raw: bool = argument(False, "prompts as they are, without the model's chat template")
    temperature: float = argument(0.0, "0 takes the likeliest token; above, tokens are drawn")
    top_p: float = argument(1.0, "draw from the likeliest tokens that have this probability together")
    seed: int | None = argument(None, "of the draws")
    gguf_file: str | None = argument(None, "a GGUF file in the folder MODEL")
    prefill_chunk: int | None = argument(
        None,
        "longest piece of a prompt that goes through the model at once (tokens); None: by the model, for long prompts",
    )
    load_cache: str | None = argument(None, "go on from a conversation that --save-cache wrote, with the same model")
    save_cache: str | None = argument(None, "write the conversation's cache here at the end")
    stats: bool = argument(True, "print what it took, on stderr")
    json: bool = argument(False, "print JSON and nothing else")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self.temperature, 0, "--temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1; got {self.top_p}.")
        if self.prefill_chunk is not None:
            check_least(self.prefill_chunk, 1, "--prefill-chunk")
        if any(not prompt.strip() for prompt in self.prompt):
            raise ValueError("--prompt must not be empty.")
        if not (self.prompt or self.chat) and sys.stdin.isatty():
            raise ValueError("there is nothing to answer: give --prompt TEXT, --chat, or a text on stdin.")
        if self.json and self.chat:
            raise ValueError("--json is for --prompt; a --chat is for a terminal.")
        if self.system is not None and (self.raw or self.load_cache):
            raise ValueError(
                "--system is a part of the chat template, at the beginning; leave --raw and --load-cache out."
            )
        if self.save_cache is not None and not Path(self.save_cache).expanduser().absolute().parent.is_dir():
            raise ValueError(f"--save-cache: there is no folder {Path(self.save_cache).parent}; make it first.")


COMMAND = Generate
