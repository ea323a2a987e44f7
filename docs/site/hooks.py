"""What MkDocs does not do by itself: the README as the front page, notebooks as pages, formulas without scripts."""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
CODE = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
INDENT = re.compile(r"^( +)(?=\S)", flags=re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/: their text is read, not copied."""
    files.append(File.generated(config, "index.md", content=_of_ours(README.read_text(), ROOT)))
    for notebook in NOTEBOOKS:
        node = nbformat.read(notebook, nbformat.NO_CONVERT)
        node.metadata["language_info"] = {"name": "python"}  # which highlights the code
        text, resources = MarkdownExporter().from_notebook_node(node, {"output_files_dir": notebook.stem})
        text = re.sub(r"<table[^>]*>", "<table>", text)  # those of pandas look like the others
        files.append(File.generated(config, f"{notebook.stem}.md", content=_relinked(text, notebook.parent)))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, name, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the pages in docs/ to the README, notebooks and code."""
    return markdown if page.file.generated_by else _of_ours(markdown, Path(config.docs_dir))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return FORMULA.sub(
        lambda found: convert(unescape(found[2]), display="block" if found[1] == "div" else "inline"), html
    )


def _of_ours(markdown: str, folder: Path) -> str:
    """A page of the project as MkDocs reads it: links, and lists indented by four where GitHub takes two."""
    parts = CODE.split(_relinked(markdown, folder))
    return "".join(part if number % 2 else INDENT.sub(r"\1\1", part) for number, part in enumerate(parts))


def _relinked(markdown: str, folder: Path) -> str:
    """Links from a file in `folder`, as the site has their targets; what is no page of it is named without a link."""

    def replace(found: re.Match[str]) -> str:
        image, text, path, anchor = found[1], found[2], found[3], found[4] or ""
        target = Path(os.path.normpath(folder / path))
        if target == README:
            return f"[{text}](index.md{anchor})"
        if target in NOTEBOOKS:
            return f"[{text}]({target.stem}.md{anchor})"
        if target.parent == ROOT / "docs":
            return f"{image}[{text}]({target.name}{anchor})"
        return text if target.exists() else found[0]

    parts = CODE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(replace, part) for number, part in enumerate(parts))
