"""Results as tables of text, the same for the terminal, for Markdown and for CSV."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas
from rich.console import Console
from rich.table import Table

from modules.evaluation.candidates import FULL
from modules.evaluation.results import (
    BenchmarkResult,
    FreeResult,
    FreeRow,
    PasskeyResult,
    QualityResult,
    QualityRow,
    TasksResult,
)
from modules.evaluation.statistics import mcnemar, wilson

MISSING = "–"


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals; large ones with fewer."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def percent(value: float | None, reference: float | None) -> str:
    """The change from a reference, e.g. "+1.2 %"."""
    if value is None or not reference:
        return MISSING
    change = 100 * (value / reference - 1)
    return f"{change:+,.0f} %" if abs(change) >= 100 else f"{change:+.1f} %"


def plain(value: object) -> str:
    """A cell of a table whose columns are not known beforehand: numbers with three digits or more, nothing for None."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def quality_table(result: QualityResult) -> pandas.DataFrame:
    """Cache, stored bits, perplexity and its change, KL with its standard error, top-1. Where full precision is not among the
    caches, the first one is what they are compared with, and finer figures are told apart."""
    full_is_there = any(row.name == FULL for row in result.rows)
    reference = result.row(FULL) if full_is_there else result.rows[0]
    digits = 4 if full_is_there else 7
    rows = [
        [
            row.name + (" *" if result.day_of(row) else ""),
            number(row.stored_bits, 2),
            row.note or number(row.perplexity, 3),
            MISSING if row is reference else percent(row.perplexity, reference.perplexity),
            MISSING if row is reference else number(row.kl, digits),
            MISSING if row is reference else number(row.kl_error, digits),
            number(row.top1, 3),
        ]
        for row in result.rows
    ]
    return pandas.DataFrame(rows, columns=["cache", "stored bits", "perplexity", "change", "KL (nats)", "±", "top-1"])


def passkey_table(results: Sequence[PasskeyResult]) -> pandas.DataFrame:
    """Cache, and keys found of those hidden at each length, with the day of the newest measurement."""
    days = {
        length: result.environment.date[:10]
        for result in sorted(results, key=lambda result: result.environment.date)
        for length in result.lengths
    }
    lengths = sorted(days)
    names = list(dict.fromkeys(name for result in results for name in result.names))
    rows = []
    for name in names:
        counts = [_sum(result.found(name, length) for result in results) for length in lengths]
        rows.append([name, *(f"{found} of {asked}" if asked else MISSING for found, asked in counts)])
    return pandas.DataFrame(rows, columns=["cache", *(f"{length:,} tokens, {days[length]}" for length in lengths)])


def free_table(result: FreeResult) -> pandas.DataFrame:
    """Cache, stored bits and what `modules.evaluation.free` measures, ± half a 95 % interval."""
    header = ["cache", "stored bits", "KL, own text", "±", "first to last quarter", "KL, full precision's text"]
    header += ["sequence KL", "log p", "change", "±", "equal tokens, greedy", "equal tokens, same seed"]
    return pandas.DataFrame([_free_cells(row) for row in result.rows], columns=header)


def _free_cells(row: FreeRow) -> list[str]:
    if row.note:
        return [row.name, number(row.stored_bits, 2), row.note, *[MISSING] * 9]
    full = row.kind == "full"
    quarters = MISSING if full else f"{number(row.kl_quarters[0], 4)} to {number(row.kl_quarters[-1], 4)}"
    equal = [
        str(int(statistics.median(each))) if each else MISSING for each in (row.diverged_greedy, row.diverged_sampled)
    ]
    return [
        row.name,
        number(row.stored_bits, 2),
        *([MISSING] * 2 if full else [number(row.kl_own, 4), number(row.kl_own_error, 4)]),
        quarters,
        number(row.kl_forced, 4),
        MISSING if full else number(row.sequence_kl, 4),
        number(row.log_p, 3),
        MISSING if row.log_p_change is None else f"{row.log_p_change:+.3f}",
        number(row.log_p_change_error, 3),
        *equal,
    ]


def tasks_table(result: TasksResult) -> pandas.DataFrame:
    """Task, tokens of its context, cache, right answers with their 95 % interval, and the comparison with full precision
    question by question: where one alone was right, and McNemar's p."""
    header = ["task", "tokens", "cache", "right", "share", "95 %", "only full precision", "only this", "p"]
    rows = []
    for task, length in result.tasks:
        full = result.correct(FULL, task, length)
        for name in result.names:
            own = result.correct(name, task, length)
            low, high = wilson(sum(own), len(own))
            lost = sum(theirs and not ours for theirs, ours in zip(full, own))
            won = sum(ours and not theirs for theirs, ours in zip(full, own))
            paired = [MISSING] * 3 if name == FULL else [str(lost), str(won), number(mcnemar(lost, won), 2)]
            share = [f"{sum(own)} of {len(own)}", number(sum(own) / len(own), 2), f"{low:.2f} to {high:.2f}"]
            rows.append([task, f"{length:,}", name, *share, *paired])
    return pandas.DataFrame(rows, columns=header)


def layer_table(result: BenchmarkResult) -> pandas.DataFrame:
    """Layer, and of its keys and values the bits chosen and what they cost."""
    rows = [
        [
            str(row["layer"]),
            str(row["k_bits"]),
            number(row["wide_channels"], 2) if row["wide_channels"] else "",
            number(row["kl_of_keys"], 5),
            str(row["v_bits"]),
            number(row["kl_of_values"], 5),
        ]
        for row in result.rows
    ]
    return pandas.DataFrame(rows, columns=["layer", "K bits", "wide", "K: KL (nats)", "V bits", "V: KL (nats)"])


def ablation_table(result: BenchmarkResult) -> pandas.DataFrame:
    """Side, variant, stored bits, and the error of attention, also beside that of the first variant of the side."""
    rows = [
        [
            row["side"],
            row["variant"],
            number(row["stored_bits"], 2),
            number(100 * row["error"], 3),
            number(row["of_base"], 2),
        ]
        for row in result.rows
    ]
    return pandas.DataFrame(rows, columns=["side", "variant", "stored bits", "error (%)", "of the first"])


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    found, asked = zip(*pairs)
    return sum(found), sum(asked)


def markdown(table: pandas.DataFrame, bold: str | None = None) -> str:
    """A Markdown table; the row whose first cell is `bold` stands out."""
    chosen = table.iloc[:, 0] == bold
    shown = table.where(~chosen, "**" + table.astype(str) + "**", axis=0)
    align = ["left"] + ["right"] * (len(table.columns) - 1)
    return shown.to_markdown(index=False, disable_numparse=True, colalign=align)


def print_table(table: pandas.DataFrame, title: str, console: Console) -> None:
    """Show a table on a terminal."""
    view = Table(title=title)
    for index, name in enumerate(table.columns):
        view.add_column(name, justify="right" if index else "left")
    for row in table.itertuples(index=False):
        view.add_row(*row)
    console.print(view)


def write_csv(result: BenchmarkResult, path: str | Path) -> None:
    """A benchmark's rows as CSV, what they were measured with in the same line."""
    here = result.environment
    about = {"date": here.date, "processor": here.processor, "threads": here.threads, "python": here.python}
    pandas.DataFrame(result.rows).assign(**about, **here.packages, **result.settings).to_csv(path, index=False)


def compared(result: QualityResult) -> list[QualityRow]:
    """The rows that have numbers, without full precision."""
    return [row for row in result.rows if row.kl is not None and row.name != FULL]
