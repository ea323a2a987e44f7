"""`docs/quality.md` and its plot, from the JSON of measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from modules.evaluation.candidates import DEFAULTS, FOUR_BITS, FULL, PAPER, SMALL
from modules.evaluation.environment import Environment
from modules.evaluation.pages import render
from modules.evaluation.plots import panels, save
from modules.evaluation.results import (
    BenchmarkResult,
    FreeResult,
    PasskeyResult,
    QualityResult,
    QualityRow,
    Result,
    TasksResult,
    load_result,
)
from modules.evaluation.tables import (
    MISSING,
    ablation_table,
    compared,
    free_table,
    number,
    passkey_table,
    percent,
    quality_table,
    tasks_table,
)

TEMPLATE = Path(__file__).with_name("quality.md.jinja")
SERIES = {  # kind: how it is drawn, and its name in the legend
    "kivi": ("o", "#1f6feb", "ours"),
    "paper": ("s", "#d1242f", "KIVI as in the paper"),
    "transformers": ("^", "#8250df", "transformers' QuantizedCache"),
    "reference": ("D", "#bf8700", "KVarN and TurboQuant, our references"),
    "package": ("v", "#1a7f37", "the package tiny-turboquant"),
}
WORST_SHOWN = 10.0


Other = PasskeyResult | FreeResult | TasksResult


def read_results(folder: str | Path) -> tuple[list[QualityResult], list[Other]]:
    """Every `quality*.json` of a folder, by name: those of one text, and the others.

    Raises:
        ValueError: where there is no measurement of quality, or a file holds something else.
    """
    results = _read(folder, "quality*.json")
    quality = [result for result in results if isinstance(result, QualityResult)]
    if not quality:
        raise ValueError(
            f"{folder} has no quality*.json; measure first: `python -m modules.evaluation report --measure all`."
        )
    return quality, [result for result in results if isinstance(result, Other)]


def write_report(folder: str | Path, output: str | Path) -> list[Path]:
    """Write the report from the results in a folder, and its plot beside it.

    Returns:
        The paths written.
    """
    quality, others = read_results(folder)
    quality.sort(key=lambda result: (-len(result.rows), result.model, result.text != "prose"))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    plot = output.with_suffix(".svg")
    draw(quality, plot)
    output.write_text(page(quality, others, plot.name, read_ablations(folder)))
    return [output, plot]


def read_ablations(folder: str | Path) -> list[BenchmarkResult]:
    """Every `ablations*.json` of a folder, by name.

    Raises:
        ValueError: where a file holds something else.
    """
    return [result for result in _read(folder, "ablations*.json") if isinstance(result, BenchmarkResult)]


def _read(folder: str | Path, pattern: str) -> list[Result]:
    return [load_result(path) for path in sorted(Path(folder).glob(pattern))]


def page(
    quality: Sequence[QualityResult],
    others: Sequence[Other],
    plot: str,
    ablations: Sequence[BenchmarkResult] = (),
) -> str:
    """The report as Markdown."""
    passkeys = [result for result in others if isinstance(result, PasskeyResult)]
    models = dict.fromkeys(result.model for result in passkeys)
    return render(
        TEMPLATE,
        summary=_summary(quality),
        choices=_choices(quality),
        plot=plot,
        quality=quality,
        passkeys={model: [result for result in passkeys if result.model == model] for model in models},
        free=[result for result in others if isinstance(result, FreeResult)],
        tasks=[result for result in others if isinstance(result, TasksResult)],
        environment=measured_on([result.environment for result in [*quality, *others]]),
        defaults=DEFAULTS,
        days_of=_days_of,
        quality_table=quality_table,
        passkey_table=passkey_table,
        free_table=free_table,
        tasks_table=tasks_table,
        ablations=ablations,
        ablation_table=ablation_table,
    )


def _has(result: QualityResult, name: str) -> bool:
    return any(row.name == name and row.kl is not None for row in result.rows)


_SUMMARIZED = (DEFAULTS, SMALL, PAPER, FOUR_BITS)


def _summary(quality: Sequence[QualityResult]) -> pandas.DataFrame:
    """One line a text: the defaults, fewer bits, the paper's setting and 4 bits."""
    header = ["", "defaults: KL", "perplexity", "top-1", f"{SMALL}: KL", "perplexity", "paper's setting: KL"]
    header += ["is … times ours", "4 bits: KL", "perplexity"]
    rows = []
    for result in quality:
        if not all(_has(result, name) for name in _SUMMARIZED):
            continue
        full = result.row(FULL).perplexity
        ours, small, paper, four = (result.row(name) for name in _SUMMARIZED)
        rows.append(
            [
                f"{result.model}, {result.text}",
                number(ours.kl, 4),
                percent(ours.perplexity, full),
                number(ours.top1, 3),
                number(small.kl, 4),
                percent(small.perplexity, full),
                number(paper.kl, 4),
                f"{paper.kl / ours.kl:.1f}" if paper.kl and ours.kl else MISSING,
                number(four.kl, 4),
                percent(four.perplexity, full),
            ]
        )
    return pandas.DataFrame(rows, columns=header)


def _choices(quality: Sequence[QualityResult]) -> pandas.DataFrame:
    """The caches that several texts have, from the smallest to the largest, with the range of what they cost."""
    rows = pandas.DataFrame(
        [
            {
                "name": row.name,
                "bits": math.inf if row.stored_bits is None else row.stored_bits,
                "kl": row.kl,
                "top1": row.top1,
                "perplexity": math.inf if row.perplexity is None else row.perplexity,
                "full": result.row(FULL).perplexity,
            }
            for result in quality
            for row in compared(result)
        ]
    )
    several = rows.groupby("name").filter(lambda own: len(own) >= min(2, len(quality))).groupby("name")
    order = several.agg({"bits": "first", "kl": "max"}).sort_values(["bits", "kl"]).index
    lines = [_choice(str(name), several.get_group(name)) for name in order]
    header = ["cache", "stored bits", "texts", "KL (nats)", "top-1", "largest rise of perplexity"]
    return pandas.DataFrame(lines, columns=header)


def _choice(name: str, own: pandas.DataFrame) -> list[str]:
    """A cache's name, bits, texts, ranges of KL and top-1, and the largest rise of perplexity."""
    worst = own.loc[(own.perplexity / own.full).idxmax()]
    bits = own.bits.iloc[0]
    return [
        name,
        number(bits if math.isfinite(bits) else None, 2),
        str(len(own)),
        _range(own.kl, 4),
        _range(own.top1, 3),
        percent(worst.perplexity if math.isfinite(worst.perplexity) else None, worst.full),
    ]


def _range(values: pandas.Series, digits: int) -> str:
    low, high = number(values.min(), digits), number(values.max(), digits)
    return low if low == high else f"{low} to {high}"


def _days_of(result: QualityResult) -> list[str]:
    """On which other days rows were measured."""
    return sorted({day for row in result.rows if (day := result.day_of(row))})


def measured_on(environments: Sequence[Environment]) -> str:
    """Machines, versions and dates of several measurements in one sentence."""
    dates = sorted(environment.date for environment in environments)
    newest = max(environments, key=lambda environment: environment.date)
    machines = sorted({environment.machine for environment in environments})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(machines)}; {newest.versions}; {when}."


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


def _panel(axis: Any, result: QualityResult) -> None:
    points = [(row, row.stored_bits, row.kl) for row in compared(result) if row.stored_bits is not None and row.kl]
    rows = [(row, bits, min(kl, WORST_SHOWN)) for row, bits, kl in points if kl > 0]
    for kind, (marker, color, label) in SERIES.items():
        own = [(bits, height) for row, bits, height in rows if row.kind == kind]
        if own:
            axis.scatter(*zip(*own), marker=marker, color=color, s=28, label=label, zorder=3)
    for row, bits, height in rows:
        axis.annotate(
            _label(row),
            (bits, height),
            xytext=(5, -8 if row.options.get("backend") == "hqq" else 3),
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
    if row.name.startswith(("paper +", "defaults,")) or any(isinstance(value, list) for value in options.values()):
        return ""
    if row.kind == "reference":
        bits = options.get("bits") or f"{options['k_bits']}/{options['v_bits']}"
        return f"{options['method']} {bits}{' signs' if options.get('signs') else ''}"
    if row.kind == "package":
        return str(options["compression"])
    if row.kind == "transformers":
        return f"{options['backend']} {options.get('nbits', '')}".strip() if "backend" in options else row.name
    label = f"{options.get('k_bits', 2)}/{options.get('v_bits', 2)}"
    if row.name == SMALL:
        return "small"
    if "group_size" in options:
        label += f" g{options['group_size']}"
    return label
