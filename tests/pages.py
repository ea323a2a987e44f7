"""README.md and docs/*.md as the tests read them: blocks of code, headings, links; and how a block is run."""

from __future__ import annotations

import functools
import io
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from modules.cli import __main__ as kivi

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?",
    flags=re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block: its language and code, the line of the page before the code, the text after it that it prints.

    `not_run` is why no test runs it, as a comment before the block says; "" where one does.
    """

    page: Path
    line: int
    language: str
    code: str
    output: str
    not_run: str

    @property
    def commands(self) -> list[str]:
        """The lines of a block of a shell, without comments."""
        return [line for text in self.code.splitlines() if (line := text.split(" #")[0].strip())]


@functools.cache
def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language, in order."""
    text = page.read_text()
    found = [
        Block(page, text.count("\n", 0, match.start(3)), match[2], match[3], match[4] or "", match[1] or "")
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files and anchors that a page links to; those of other hosts are left out."""
    for target in _LINK.findall(prose(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def run_python(block: Block, names: dict[str, Any], replaced: Mapping[str, str]) -> None:
    """Run a block among `names`, with parts of its text replaced by pattern; errors show the line of the page."""
    code = block.code
    for pattern, text in replaced.items():
        code = re.sub(pattern, text, code)
    exec(compile("\n" * block.line + code, str(block.page), "exec"), names)


def run_kivi(line: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command `kivi …` on a model; its stdin is the file that the line names, else turns of a chat."""
    line, _, source = line.partition(" < ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(source).read_text() if source else "one\n/stats\n"))
    name, *arguments = shlex.split(line.replace("path/to/model", str(model)))
    if name != "kivi":
        raise ValueError(f"{line!r} is no command of kivi.")
    try:
        return kivi.main(arguments)
    except SystemExit as mistake:  # in the flags
        return int(mistake.code or 0)
