"""The command `kivi`, also `python -m modules.cli`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Sequence

from modules.cli.command import parse
from modules.cli.status import OK, USAGE, run


@dataclasses.dataclass(frozen=True)
class Entry:
    """A command of `kivi`. Modules are named and not imported: `kivi --help` is to need neither torch nor a second.

    Attributes:
        summary: its line of the help.
        run: the module whose `run(command)` does it; of a command that reads its own flags, whose `main(arguments, prog=)`
            gives the exit status.
        flags: the module of its flags, with a dataclass `COMMAND` and a text `DESCRIPTION`; None where it reads its own.
    """

    summary: str
    run: str
    flags: str | None = None


COMMANDS = {
    "memory": Entry(
        "the bytes of a cache by arithmetic, and what fits in a GPU",
        "modules.cli.memory.run",
        "modules.cli.memory.flags",
    ),
    "generate": Entry(
        "answer prompts, or chat, over a quantized cache",
        "modules.cli.generate.run",
        "modules.cli.generate.flags",
    ),
    "serve": Entry(
        "an endpoint that speaks OpenAI's API",
        "modules.serving.run",
        "modules.serving.flags",
    ),
    "evaluate": Entry("what quantization costs: perplexity, KL, passkeys", "modules.evaluation.__main__"),
    "calibrate": Entry("fixed INT8 ranges from a YAML file and texts", "modules.calibration.__main__"),
    "benchmark": Entry(
        "the time of a decode step beside transformers' own caches",
        "modules.cli.benchmark.run",
        "modules.cli.benchmark.flags",
    ),
}

HELP = """usage: kivi COMMAND [options]

A packed, quantized KV cache for Llama and Qwen (KIVI, arXiv 2402.02750).

{commands}

Examples:
  kivi memory llama-3-8b --tokens 32k 100000        how large is the cache, at 2 bits and at 16?
  kivi memory llama-2-7b --gpu-memory 24GB          what fits beside the weights?
  kivi generate path/to/model --prompt "Hello"      an answer, streamed, and what its cache took
  kivi generate path/to/model --chat                several turns over one cache
  kivi COMMAND --help                               the options of a command, with examples
"""


def help_text() -> str:
    """What `kivi --help` prints."""
    width = max(map(len, COMMANDS))
    return HELP.format(commands="\n".join(f"  {name:{width}}  {entry.summary}" for name, entry in COMMANDS.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0, 1 after an error, 2 after a mistake in the flags, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(help_text(), end="")
        return OK if given else USAGE
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        print(f"kivi has no command {name!r}{hint} See: kivi --help", file=sys.stderr)
        return USAGE
    status = OK

    def command() -> None:
        nonlocal status
        status = _run(COMMANDS[name], rest, f"kivi {name}")

    return run(command) or status


def _run(entry: Entry, arguments: list[str], prog: str) -> int:
    if entry.flags is None:
        return importlib.import_module(entry.run).main(arguments, prog=prog)
    flags = importlib.import_module(entry.flags)
    command = parse(flags.COMMAND, arguments, description=flags.DESCRIPTION, prog=prog)
    importlib.import_module(entry.run).run(command)
    return OK


if __name__ == "__main__":
    sys.exit(main())
