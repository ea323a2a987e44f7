"""What `kivi generate` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from modules.cli.generate.conversation import Conversation
from modules.cli.generate.flags import Generate
from modules.cli.generate.loading import load_for
from modules.cli.generate.stats import answer_figures, cache_figures, stats_table
from modules.cli.generate.streaming import Answer, drawn
from modules.cli.generate.warm import warm_up
from modules.cli.status import UsageError, UserError
from modules.evaluation.candidates import changes
from modules.kivi_cache_general import KIVICache

HELP = """/help    this
/stats   what the conversation took so far
/reset   forget it and begin anew
/exit    end the chat, as Ctrl-D does
Ctrl-C ends an answer; at the prompt it ends the chat."""


def run(command: Generate) -> None:
    """Answer the prompts, chat, save, and show what it took.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once what there is has been shown.
    """
    Session(command).run()


class Session:
    """One run of the command."""

    def __init__(self, command: Generate) -> None:
        self.command = command
        self.prompts = prompts(command)
        self.err = Console(file=sys.stderr)
        self.choose = drawn(command.temperature, command.top_p, command.seed)
        self.conversation = start(command)
        self.answers: list[Answer] = []
        self.turns: list[dict[str, Any]] = []

    def run(self) -> None:
        """Prompts first, then the chat."""
        interrupted = False
        for prompt in self.prompts:
            if len(self.prompts) > 1 or self.command.chat:
                self._show(f"> {prompt}\n")
            interrupted = self.ask(prompt).interrupted
            if interrupted and not self.command.chat:
                break
        if self.command.chat:
            interrupted = self.chat()
        try:
            if self.command.save_cache and (self.command.chat or not interrupted):
                self.save(self.command.save_cache)
        finally:
            self.finish()
        if interrupted:
            raise KeyboardInterrupt

    def ask(self, prompt: str) -> Answer:
        """One turn, streamed."""
        text, result = self.conversation.ask(
            prompt, max_new_tokens=self.command.max_new_tokens, write=self._show, choose=self.choose
        )
        self._show("\n")
        self.answers.append(result)
        self.turns.append({"prompt": prompt, "text": text, **answer_figures(result)})
        return result

    def _show(self, text: str) -> None:
        if not self.command.json:
            print(text, end="", flush=True)

    def chat(self) -> bool:
        """Turns from the terminal, or the lines of stdin; whether Ctrl-C ended it."""
        if sys.stdin.isatty():
            self.err.print("/help lists the commands; Ctrl-D ends the chat.", style="dim")
        try:
            for line in lines():
                self.take(line)
        except KeyboardInterrupt:
            return True
        except EOFError:
            self._show("\n")
        return False

    def take(self, line: str) -> None:
        """A line of the chat: a command or a turn."""
        if line in ("/exit", "/quit"):
            raise EOFError
        if line == "/stats":
            self.show_stats()
        elif line == "/reset":
            self.conversation.reset()
            self.answers, self.turns = [], []
        elif line.startswith("/"):
            self.err.print(HELP if line == "/help" else f"There is no {line}.\n{HELP}", highlight=False, markup=False)
        elif line:
            try:
                if self.ask(line).interrupted:
                    self.err.print("(stopped; the chat goes on from here)", style="dim")
            except UserError as error:  # a turn too long
                self.err.print(f"error: {error}", style="red", highlight=False, markup=False)

    def save(self, path: str) -> None:
        """Write the cache and its tokens."""
        conversation = self.conversation
        conversation.cache.save(path, tokens=torch.tensor([conversation.tokens]), model=conversation.model)
        self.err.print(f"written: {path}", highlight=False)

    def figures(self) -> dict[str, Any]:
        """What there is to say of the cache."""
        return cache_figures(self.conversation.cache, self.conversation.model.dtype.itemsize)

    def show_stats(self) -> None:
        """The table, on stderr."""
        if self.answers and self.conversation.tokens:
            self.err.print(stats_table(self.answers, self.figures()))

    def finish(self) -> None:
        """The figures of the whole run."""
        if self.command.json:
            print(json.dumps({"model": self.command.model, "turns": self.turns, "cache": self.figures()}, indent=2))
        elif self.command.stats:
            self.show_stats()


def prompts(command: Generate) -> list[str]:
    """The prompts given, else what comes from stdin.

    Raises:
        UsageError: where there is nothing to answer.
    """
    if command.prompt or command.chat:
        return list(command.prompt)
    text = sys.stdin.read().strip()
    if not text:
        raise UsageError("stdin is empty; give --prompt TEXT, --chat, or a text on stdin.")
    return [text]


def start(command: Generate) -> Conversation:
    """The model and an empty conversation, or the one that was saved."""
    model, tokenizer = load_for(command, command.model, gguf_file=command.gguf_file)
    if command.prefill_chunk is not None:
        model.prefill_chunk = command.prefill_chunk
    warm_up(model, model.create_kivi_cache())
    if command.load_cache is None:
        return Conversation(model, tokenizer, model.create_kivi_cache(), system=command.system, raw=command.raw)
    cache = KIVICache.load(command.load_cache, model, **changes(command.cache))
    if cache.tokens is None or len(cache.tokens) != 1:
        raise UserError(
            f"{command.load_cache} does not hold the tokens of one conversation; give a file that --save-cache wrote."
        )
    return Conversation(model, tokenizer, cache, tokens=cache.tokens[0].tolist(), raw=command.raw)


def lines() -> Iterator[str]:
    """What is typed, line by line, stripped; lines that come from a file or a pipe are shown.

    Raises:
        EOFError: at the end.
    """
    terminal = sys.stdin.isatty()
    while True:
        line = input("> " if terminal else "").strip()
        if line and not terminal:
            print(f"> {line}", flush=True)
        yield line
