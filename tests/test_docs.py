"""The README and the pages of docs/: what they show runs, where they point to is there, and the site builds."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demos
import headline
import pages
import pytest
import torch
from conftest import REAL_MODELS, real_model_path
from pages import DOCS, PAGES, ROOT, Block

from modeling_llama_kivi import load_llama_kivi
from modules.cli.command import parse, parse_one_of
from modules.evaluation import __main__ as evaluation

README = ROOT / "README.md"
FIRST_USAGE = Path(__file__).parent / "data" / "first_usage.md"
HERE = [page for page in PAGES if page.name not in ("saved-prompts.md", "command.md", "extending.md", "server.md")]
ELSEWHERE = {  # pages whose blocks other tests run
    "saved-prompts.md": "tests/test_saved.py",
    "command.md": "tests/test_kivi_command.py",
    "extending.md": "tests/test_architecture.py",
    "server.md": "tests/test_serving.py",
}
NOT_RUN = {  # commands, and who runs them instead, or why nobody does
    r"python3 start\.py (demo|test)": "tests/test_start.py",
    r"pip install .*": "tests/test_wheel.py installs the wheel",
    r"cd examples": "the lines below it are run there",
    r"python examples/common\.py [\w.-]+": "it fetches a model; tests/test_examples.py does so from a folder",
    r"bash benchmarks/run_gpu\.sh": "it needs a GPU",
}
SHORTER = {
    r"max_new_tokens=\d+": "max_new_tokens=4",
    r"range\(100\)": "range(4)",
    r"generate\(\.\.\.": "generate(**inputs",
}
HUB = {r"(?:meta-llama|mistralai|HuggingFaceTB)/[\w.-]+": "llama", r"Qwen/[\w.-]+": "qwen2"}


@functools.cache
def replaced() -> dict[str, str]:
    """What stands for what in a block: a model on disk for each on the hub, and fewer tokens."""
    return SHORTER | {pattern: str(real_model_path(family)) for pattern, family in HUB.items()}


def ids_of(found: list) -> list[str]:
    return [str(each.relative_to(ROOT)) for each in found]


# snippets


def given(page: Path) -> dict[str, Any]:
    """What a page takes for granted: names, and the file that it shows."""
    if page == FIRST_USAGE:
        return {"torch": torch}
    if page.name != "int8.md":
        return {}
    Path("spec.yaml").write_text(pages.blocks(page, "yaml")[0].code)
    model, tokenizer = load_llama_kivi(real_model_path("llama"), dtype=torch.float32)
    inputs = tokenizer("A text that is read. " * 20, return_tensors="pt")
    return {"model": model, "inputs": inputs, "batches": [inputs.input_ids]}


@pytest.mark.real_model
@pytest.mark.filterwarnings("ignore:KIVI attends with plain torch")
@pytest.mark.parametrize(
    "page", found := [p for p in [*HERE, FIRST_USAGE] if pages.blocks(p, "python")], ids=ids_of(found)
)
def test_snippets_run(page, without_numba, tmp_path, monkeypatch, capsys):
    """One after the other, as a reader would, on models of the same families; no statement of theirs is left out."""
    monkeypatch.chdir(tmp_path)
    names = given(page)
    for block in pages.blocks(page, "python"):
        if not block.not_run:
            pages.run_python(block, names, replaced())


def test_snippets_name_no_other_model():
    """Each name of the hub stands for a family that is on disk."""
    text = "".join(block.code for page in HERE for block in pages.blocks(page, "python") if not block.not_run)
    named = set(re.findall(r'(?:load_\w+|from_pretrained)\(\s*"([^"]+)"', text))
    assert len(named) > 3 and set(HUB.values()) <= set(REAL_MODELS)
    assert all(any(re.fullmatch(pattern, name) for pattern in HUB) for name in named), named


def test_pages_that_others_run_are_run_there():
    for page, test in ELSEWHERE.items():
        assert pages.blocks(DOCS / page, "python") or pages.blocks(DOCS / page, "bash")
        assert f'"{page}"' in (ROOT / test).read_text(), f"{test} does not run docs/{page}"


def flags_of(script: str) -> Callable[[list[str]], object]:
    """A function that reads the flags of a script of ours, and complains of those that it does not have."""
    if script == "-m modules.evaluation":
        return lambda arguments: parse_one_of(evaluation.COMMANDS, arguments, prog="", description="")
    if script == "-m modules.calibration":
        calibration = importlib.import_module("modules.calibration.__main__")
        return lambda arguments: parse(calibration.Calibrate, arguments, description="")
    if script == "-m modules.cli.table" or script.startswith("docs/site/"):
        return lambda arguments: None if not arguments else pytest.fail(f"{script} has no flags")
    module = importlib.import_module(Path(script).stem)
    return lambda arguments: parse(module.Flags, arguments, description="")


LAUNCHERS = ("python", r"torchrun --nproc_per_node \d+", r"accelerate launch --num_processes \d+")
COMMANDS = [(block, line) for page in HERE for block in pages.blocks(page, "bash") for line in block.commands]


@pytest.mark.parametrize("block,line", COMMANDS, ids=[f"{block.page.name}: {line}" for block, line in COMMANDS])
def test_commands_are_right(block: Block, line: str, tmp_path, monkeypatch):
    """Scripts that take minutes and more have the flags they are given; what `kivi` and the demos do is run below."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("A text.")
    if any(re.fullmatch(pattern, line) for pattern in NOT_RUN) or line.startswith(("kivi ", "python example_")):
        return
    script = re.match(rf"(?:{'|'.join(LAUNCHERS)}) (-m [\w.]+|\S+)", line)
    assert script, f"nothing is known of `{line}` in {block.page.name}"
    assert script[1].startswith("-m") or (ROOT / script[1]).is_file()
    flags_of(script[1])(shlex.split(line[script.end() :]))


@pytest.mark.real_model
@pytest.mark.parametrize("page", found := [p for p in HERE if any(b.page == p for b, _ in COMMANDS)], ids=ids_of(found))
def test_commands_of_kivi_run(page, without_numba, tmp_path, monkeypatch, capsys):
    lines = [line for block, line in COMMANDS if block.page == page and line.startswith("kivi ")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.txt").write_text("What is said here is not much. " * 10)
    for line in lines:
        short = line.replace("kivi generate", "kivi generate --dtype float32 --max-new-tokens 4", 1)
        if "--max-new-tokens" in line:
            short = line.replace("kivi generate", "kivi generate --dtype float32", 1)
        assert pages.run_kivi(short, real_model_path("llama"), monkeypatch) == 0, (line, capsys.readouterr().err)


def demo_lines(page: Path) -> list[str]:
    return [line for block in pages.blocks(page, "bash") for line in block.commands if "example_" in line]


@pytest.mark.real_model
def test_demos_run(without_numba, capsys):
    """The commands of the examples, with fewer tokens; they are those of the first document."""
    lines = demo_lines(README)
    assert len(lines) == 4 and lines == demo_lines(FIRST_USAGE)
    for line in lines:
        family = re.search(r"example_(\w+)_kivi\.py", line)[1]
        for pattern, path in replaced().items():
            line = re.sub(pattern, path, line)
        arguments = shlex.split(line)[2:]
        if "basic" in arguments:
            arguments += ["--max-new-tokens", "4"]
        assert demos.main(family, arguments) == 0, (line, capsys.readouterr().err)
        assert capsys.readouterr().out.strip()


# figures and pictures


def test_tables_are_those_of_the_results():
    for page in headline.PAGES:
        assert headline.filled(page, headline.RESULTS) == page.read_text(), "python benchmarks/headline.py --write"


def test_a_table_names_its_baseline_and_what_is_missing(tmp_path):
    rows = [
        {"dtype": dtype, "cache": name, "p50_ms": time}
        for dtype in headline.DTYPES
        for name, time in (("A", 30), ("B", 3))
    ]
    assert headline.speed_cell(rows, "cache", "") == "30 / 30 ms"
    assert headline.speed_cell(rows, "cache", "B") == "3.0 / 3.0 ms, 10.0× / 10.0×"
    with pytest.raises(ValueError, match="measure first"):
        headline.speed_of(tmp_path, "decode_cpu")


def test_drawings_are_drawn_by_their_command(tmp_path):
    runpy.run_path(str(DOCS / "site" / "drawings.py"))["main"](tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn and all((DOCS / name).is_file() and name in (DOCS / "method.md").read_text() for name in drawn)


def test_every_picture_is_shown():
    shown = {path for page in PAGES for path, _ in pages.links(page) if path.suffix == ".svg"}
    assert shown == set(DOCS.glob("*.svg"))


# links and the site


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_links_lead_somewhere(page):
    for path, anchor in pages.links(page):
        assert path.exists(), f"{page.name} links to {path}, which is not there"
        if anchor:
            assert anchor in pages.anchors(path), f"{page.name} links to #{anchor}, which {path.name} does not have"


def test_every_page_is_reached_from_the_readme():
    seen, todo = set(), [README]
    while todo:
        page = todo.pop()
        seen.add(page)
        todo += [path for path, _ in pages.links(page) if path.suffix == ".md" and path not in seen]
    assert set(PAGES) == seen


def test_no_page_is_long():
    """But for those that a command writes."""
    lines = {page: len(page.read_text().splitlines()) for page in PAGES if "<!-- Written by" not in page.read_text()}
    assert max(lines.values()) < 220 and lines[README] <= 188


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `mkdocs build --strict` does; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page(site):
    front = (site / "index.html").read_text()
    assert re.search(r"<h1[^>]*>A packed 2-bit KV cache", front) and 'href="usage/#another-model"' in front
    for page in PAGES[1:]:
        assert (site / page.stem / "index.html").is_file()
    for notebook in (ROOT / "examples").glob("*.ipynb"):
        page = (site / notebook.stem / "index.html").read_text()
        assert page.count("<img") >= 4 and 'class="highlight"' in page


def test_the_site_needs_no_other_host(site):
    """No font, script, style or picture comes from elsewhere; links may lead there."""
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = file.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^>]*>", text), file
        assert not re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|preload)[^>]*href=\"?(?:https?:)?//", text), (
            file
        )
        assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", text), file
        assert 'class="mermaid"' not in text, "a script of another host would draw it; see docs/site/drawings.py"


def test_formulas_need_no_script(site):
    page = (site / "method" / "index.html").read_text()
    assert page.count("<math") > 20 and 'display="block"' in page
    assert not any('class="arithmatex"' in file.read_text() for file in site.rglob("*.html"))


def test_lists_of_the_site_are_nested(site):
    """GitHub takes two spaces for it, Python-Markdown four."""
    page = (site / "architecture" / "index.html").read_text()
    step = page.split('id="a-decode-step"')[1].split("<h2")[0]
    assert step.count("<ul>") > 5
