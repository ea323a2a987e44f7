"""The tables of figures in README.md and docs/choosing-options.md, from the results of the other benchmarks.

python benchmarks/headline.py            # prints them
python benchmarks/headline.py --write    # puts them into the pages
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from paths import RESULTS, ROOT  # which puts the project's folder on the path
from report import load

from modules.cli.command import argument, parse
from modules.cli.memory.figures import Plan, model_config
from modules.evaluation.candidates import DEFAULTS, FOUR_BITS, FULL, PAPER, PAPER_OPTIONS, SMALL
from modules.evaluation.report import read_results
from modules.evaluation.results import BenchmarkResult, QualityResult
from modules.evaluation.tables import MISSING, markdown, number, percent
from modules.options import PRESETS, KIVIOptions

PLACE = re.compile(r"(<!-- This table: python benchmarks/headline.py -->\n).*?(<!-- until here -->)", flags=re.DOTALL)
HQQ = "transformers hqq, 4 bits"
SHAPE, DTYPES = "llama-3.1-8b", ("float32", "bfloat16")
CACHE_TOKENS, ATTENTION_TOKENS, STEP_TOKENS = 32768, 8192, 8000


@dataclasses.dataclass(frozen=True)
class Line:
    """A cache of the README's table.

    Attributes:
        title: in the table; quality: its name in the results of quality.
        options: None where it is not one of ours.
        attention, step: its names in the results of speed; "" for the baseline, None where it was not measured.
    """

    title: str
    quality: str
    options: dict[str, Any] | None = None
    attention: str | None = None
    step: str | None = None


LINES = (
    Line("full precision", FULL, {"use_kivi": False}, "", ""),
    Line("2 bits, the defaults", DEFAULTS, {}, "numba 2 bits", "KIVI 2 bits, numba"),
    Line("4 bits", FOUR_BITS, {"k_bits": 4, "v_bits": 4}, "numba 4 bits", "KIVI 4 bits, numba"),
    Line("2 bits as in the KIVI paper", PAPER, PAPER_OPTIONS),
    Line("transformers' `QuantizedCache`, HQQ, 4 bits", HQQ),
)

NEEDS: tuple[tuple[str, str, dict[str, Any]], ...] = (  # what for, the name in the results of quality, the options
    ('memory first, `preset="small"`', SMALL, PRESETS["small"]),
    ('the defaults, `preset="balanced"`', DEFAULTS, {}),
    ("keys in more bits", "K 4 bits, V 2 bits", {"k_bits": 4, "v_bits": 2}),
    ("quality first, less metadata", "K 4 bits, V 4 bits, groups of 64", {"k_bits": 4, "v_bits": 4, "group_size": 64}),
    ('quality first, `preset="quality"`', FOUR_BITS, {"k_bits": 4, "v_bits": 4}),
    ("next to exact", "K 8 bits, V 8 bits", {"k_bits": 8, "v_bits": 8}),
    ("the paper's figures", PAPER, {"sink_length": 0, "k_range": "minmax"}),
)


def spread(values: Sequence[float]) -> str:
    """The least and the largest, with two digits; below 0.0001 four decimals."""
    low, high = (f"{value:.2g}" if value >= 1e-4 else f"{value:.4f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def quality_cells(name: str, results: list[QualityResult]) -> list[str]:
    """Stored bits, and KL and the largest rise of perplexity over the texts on which this cache was measured."""
    if name == FULL:
        return [number(results[0].row(FULL).stored_bits, 2), MISSING, MISSING]
    measured = [
        (row.stored_bits, row.kl, row.perplexity / full)
        for result in results
        for row in result.rows
        if row.name == name and row.kl is not None and row.perplexity and (full := result.row(FULL).perplexity)
    ]
    if not measured:
        return [MISSING] * 3
    bits, costs, rises = zip(*measured)
    note = "" if len(measured) == len(results) else f" ({len(measured)} of {len(results)} texts)"
    return [number(bits[0], 2), spread(costs) + note, percent(max(rises), 1)]


def memory_cell(options: dict[str, Any] | None) -> str:
    """Megabytes of a cache, and how many times fewer than in float16."""
    if options is None:
        return MISSING
    row = Plan(model_config(SHAPE)).row(KIVIOptions(**options), CACHE_TOKENS)
    if not options.get("use_kivi", True):
        return f"{row['float16_bytes'] / 1e6:,.0f} MB"
    stored = row["stored"]
    return f"{stored['bytes'] / 1e6:,.0f} MB, {stored['ratio']:.1f}×"


def speed_cell(rows: list[dict[str, Any]], key: str, name: str | None) -> str:
    """Milliseconds in each dtype, and how many times faster than the baseline, the first of those that ran together."""
    if name is None:
        return MISSING
    found = []
    for dtype in DTYPES:
        times = {row[key]: row["p50_ms"] for row in rows if row["dtype"] == dtype}
        baseline = next(iter(times.values()))
        found.append((times[name], baseline / times[name]) if name else (baseline, 1.0))
    digits = 0 if min(time for time, _ in found) >= 10 else 1
    shown = " / ".join(f"{time:.{digits}f}" for time, _ in found) + " ms"
    return f"{shown}, {' / '.join(f'{faster:.1f}×' for _, faster in found)}" if name else shown


def speed_of(folder: Path, name: str) -> BenchmarkResult:
    """A result of speed.

    Raises:
        ValueError: where it is missing.
    """
    result = load(folder / f"{name}.json")
    if result is None:
        raise ValueError(f"{folder} has no {name}.json; measure first: `python benchmarks/{name}.py`.")
    return result


def headline(folder: Path) -> str:
    """The README's table as Markdown, and what its columns are.

    Raises:
        ValueError: where a result is missing.
    """
    quality = read_results(folder)[0]
    decode, layer = speed_of(folder, "decode_cpu"), speed_of(folder, "attention_cpu")
    attention = [row for row in layer.rows if (row["shape"], row["tokens"]) == (SHAPE, ATTENTION_TOKENS)]
    steps = [row for row in decode.rows if row["tokens"] == STEP_TOKENS]
    lines = [
        [
            line.title,
            *quality_cells(line.quality, quality),
            memory_cell(line.options),
            speed_cell(attention, "contender", line.attention),
            speed_cell(steps, "cache", line.step),
        ]
        for line in LINES
    ]
    header = ["cache", "bits", "KL (nats)", "perplexity", "memory", "attention", "decode step"]
    models = " and ".join(sorted({result.model for result in quality}))
    return f"""{markdown(pandas.DataFrame(lines, columns=header), LINES[1].title)}

- *Bits*: of a quantized element, its share of scale and minimum included.
- *KL* from full precision, and the largest rise of *perplexity*: over {len(quality)} texts of {models}.
- *Memory*: {CACHE_TOKENS:,} tokens of {SHAPE} in float16.
- *Attention*: one layer of {SHAPE} at {ATTENTION_TOKENS:,} tokens; *decode step*: {decode.settings["model"]} at {STEP_TOKENS:,}. Both on a
  CPU with {layer.environment.threads} threads, in {" / ".join(DTYPES)}, against {attention[0]["contender"]} and {steps[0]["cache"]} of transformers."""


def needs(folder: Path) -> str:
    """The table of docs/choosing-options.md as Markdown."""
    quality = read_results(folder)[0]
    lines = [
        [
            need,
            "the defaults" if not options else f"`{', '.join(f'{k}={v!r}' for k, v in options.items())}`",
            *quality_cells(name, quality),
            memory_cell(options),
        ]
        for need, name, options in NEEDS
    ]
    header = ["what for", "options", "bits", "KL (nats)", "perplexity", f"{SHAPE} at {CACHE_TOKENS:,}"]
    return markdown(pandas.DataFrame(lines, columns=header))


PAGES = {ROOT / "README.md": headline, ROOT / "docs" / "choosing-options.md": needs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    results: Path = argument(RESULTS, "folder of the results")
    write: bool = argument(False, "put the tables into the pages")


def filled(page: Path, folder: Path) -> str:
    """The text of a page with its table made anew."""
    table = PAGES[page](folder)
    return PLACE.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page.read_text())


def main() -> None:
    """Print the tables, or put them into the pages."""
    flags = parse(Flags, description=__doc__)
    for page, table in PAGES.items():
        if flags.write:
            page.write_text(filled(page, flags.results))
            print(f"written: {page}")
        else:
            print(f"{table(flags.results)}\n")


if __name__ == "__main__":
    main()
