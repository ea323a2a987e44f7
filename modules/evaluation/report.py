"""`docs/quality.md` and its plot, from the JSON of measurements."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules.evaluation.candidates import BEST, DEFAULTS, FOUR_BITS, FULL, PAPER
from modules.evaluation.plots import panels, save
from modules.evaluation.results import Environment, PasskeyResult, QualityResult, QualityRow, load_result
from modules.evaluation.tables import MISSING, compared, markdown, number, passkey_rows, percent, quality_rows

TEMPLATE = Path(__file__).with_name("report.md")
SERIES = {  # kind: how it is drawn, and its name in the legend
    "kivi": ("o", "#1f6feb", "ours"),
    "paper": ("s", "#d1242f", "KIVI as in the paper"),
    "transformers": ("^", "#8250df", "transformers' QuantizedCache"),
}
WORST_SHOWN = 10.0


def read_results(folder: str | Path) -> tuple[list[QualityResult], list[PasskeyResult]]:
    """Every `quality*.json` of a folder, by name.

    Raises:
        ValueError: where there is no measurement of quality, or a file holds something else.
    """
    results = [load_result(path) for path in sorted(Path(folder).glob("quality*.json"))]
    quality = [result for result in results if isinstance(result, QualityResult)]
    if not quality:
        raise ValueError(
            f"{folder} has no quality*.json; measure first: `python -m modules.evaluation report --measure all`."
        )
    return quality, [result for result in results if isinstance(result, PasskeyResult)]


def write_report(folder: str | Path, output: str | Path) -> list[Path]:
    """Write the report from the results in a folder, and its plot beside it.

    Returns:
        The paths written.
    """
    quality, passkeys = read_results(folder)
    quality.sort(key=lambda result: (-len(result.rows), result.model, result.text != "prose"))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    plot = output.with_suffix(".svg")
    draw(quality, plot)
    output.write_text(render(quality, passkeys, plot.name))
    return [output, plot]


def render(quality: Sequence[QualityResult], passkeys: Sequence[PasskeyResult], plot: str) -> str:
    """The report as Markdown."""
    measured: list[Any] = [*quality, *passkeys]
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        summary=_summary(quality),
        choices=_choices(quality),
        plot=plot,
        tables="\n\n".join(_section(result) for result in quality),
        passkey=_passkey(passkeys),
        chunk=quality[0].chunk,
        skip=quality[0].skip,
        environment=_environment([result.environment for result in measured]),
    )


def _has(result: QualityResult, name: str) -> bool:
    return any(row.name == name and row.kl is not None for row in result.rows)


_SUMMARIZED = (DEFAULTS, BEST, PAPER, FOUR_BITS)


def _summary(quality: Sequence[QualityResult]) -> str:
    """One line a text: the defaults, the best option, the paper's setting and 4 bits."""
    header = [
        "",
        "defaults: KL",
        "perplexity",
        "top-1",
        f"{BEST}: KL",
        "perplexity",
        "paper's setting: KL",
        "is … times ours",
        "4 bits: KL",
        "perplexity",
    ]
    rows = [header]
    for result in quality:
        if not all(_has(result, name) for name in _SUMMARIZED):
            continue
        full, ours, best, paper, four = (result.row(name) for name in (FULL, *_SUMMARIZED))
        rows.append(
            [
                f"{result.model}, {result.text}",
                number(ours.kl, 4),
                percent(ours.perplexity, full.perplexity),
                number(ours.top1, 3),
                number(best.kl, 4),
                percent(best.perplexity, full.perplexity),
                number(paper.kl, 4),
                f"{paper.kl / ours.kl:.1f}" if ours.kl else MISSING,
                number(four.kl, 4),
                percent(four.perplexity, full.perplexity),
            ]
        )
    return markdown(rows)


def _choices(quality: Sequence[QualityResult]) -> str:
    """The caches that several texts have, from the smallest to the largest, with the range of what they cost."""
    names = dict.fromkeys(row.name for result in quality for row in compared(result))
    measured = {name: [(r.row(FULL), r.row(name)) for r in quality if _has(r, name)] for name in names}
    lines = []
    for name, found in measured.items():
        if len(found) >= min(2, len(quality)):
            bits = found[0][1].stored_bits
            order = (math.inf if bits is None else bits, max(row.kl for _, row in found))
            lines.append((order, [name, number(bits, 2), str(len(found)), *_costs(found)]))
    header = ["cache", "stored bits", "texts", "KL (nats)", "top-1", "largest rise of perplexity"]
    return markdown([header] + [cells for _, cells in sorted(lines)], bold=DEFAULTS)


def _costs(found: Sequence[tuple[QualityRow, QualityRow]]) -> list[str]:
    """Ranges of KL and top-1, and the largest rise of perplexity, of (full precision's row, a cache's row)."""
    full, row = max(found, key=lambda pair: (pair[1].perplexity or math.inf) / pair[0].perplexity)
    return [
        _range([row.kl for _, row in found], 4),
        _range([row.top1 for _, row in found], 3),
        percent(row.perplexity, full.perplexity),
    ]


def _range(values: Sequence[float], digits: int) -> str:
    low, high = number(min(values), digits), number(max(values), digits)
    return low if low == high else f"{low} to {high}"


def _section(result: QualityResult) -> str:
    kept = sorted({day for row in result.rows if (day := result.day_of(row))})
    lines = [
        f"### {result.model}, {result.text}",
        f"{result.tokens:,} tokens, {result.predictions:,} predictions; token ids SHA-256 `{result.digest}…`.",
        markdown(quality_rows(result), bold=DEFAULTS),
    ]
    if kept:
        lines.append(f"\\* measured earlier ({', '.join(kept)}) on the same text with the same versions.")
    return "\n\n".join(lines)


def _passkey(passkeys: Sequence[PasskeyResult]) -> str:
    if not passkeys:
        return "Not measured yet: `python -m modules.evaluation passkey --model MODEL --lengths 2000`."
    parts = []
    for model in dict.fromkeys(result.model for result in passkeys):
        own = [result for result in passkeys if result.model == model]
        parts += [f"### {model}", markdown(passkey_rows(own))]
        parts += [f"{name}: {note}." for result in own for name, note in result.notes.items()]
    return "\n\n".join(parts)


def _environment(environments: Sequence[Environment]) -> str:
    dates = sorted(environment.date for environment in environments)
    newest = max(environments, key=lambda environment: environment.date)
    machines = sorted(
        {f"{e.processor}, {e.threads} thread{'s' if e.threads > 1 else ''}, {e.dtype}" for e in environments}
    )
    packages = ", ".join(f"{name} {version}" for name, version in newest.packages.items())
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(machines)}; Python {newest.python}, {packages}; {when}."


def draw(quality: Sequence[QualityResult], path: Path) -> None:
    """KL against stored bits, a panel a text, two in a row, as SVG."""
    columns = min(2, len(quality))
    figure, axes = panels(-(-len(quality) // columns), columns, (5.6, 4.6), sharey=True)
    places = [axis for row in axes for axis in row]
    for axis, result in zip(places, quality):
        _panel(axis, result)
    for axis in places[len(quality) :]:
        axis.remove()
    for row in axes:
        row[0].set_ylabel("KL from full precision (nats, log scale)")
    handles = {label: handle for axis in places for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    save(figure, path)


def _panel(axis, result: QualityResult) -> None:
    rows = [row for row in compared(result) if row.stored_bits is not None and row.kl > 0]
    for kind, (marker, color, label) in SERIES.items():
        own = [row for row in rows if row.kind == kind]
        if own:
            heights = [min(row.kl, WORST_SHOWN) for row in own]
            axis.scatter(
                [row.stored_bits for row in own], heights, marker=marker, color=color, s=28, label=label, zorder=3
            )
    for row in rows:
        axis.annotate(
            _label(row),
            (row.stored_bits, min(row.kl, WORST_SHOWN)),
            xytext=(5, -8 if row.options.get("backend") == "hqq" or "wide_channels" in row.options else 3),
            textcoords="offset points",
            fontsize=7,
            color="#57606a",
        )
    axis.set_yscale("log")
    axis.margins(x=0.14)  # room for the labels
    axis.set_title(f"{result.model}\n{result.text}, {result.tokens:,} tokens", fontsize=9)
    axis.set_xlabel("stored bits an element (K and V, with metadata)")
    axis.grid(True, which="major", alpha=0.3)


def _label(row: QualityRow) -> str:
    """Short: bits of K/V and the group size; nothing for variants, which crowd around the defaults."""
    options = row.options
    if row.name.startswith(("paper +", "defaults,")) or isinstance(options.get("k_bits"), list):
        return ""
    if row.kind == "transformers":
        return f"{options['backend']} {options.get('nbits', '')}".strip() if "backend" in options else row.name
    label = f"{options.get('k_bits', 2)}/{options.get('v_bits', 2)}"
    if "wide_channels" in options:
        label += " wide"
    if "group_size" in options:
        label += f" g{options['group_size']}"
    return label
