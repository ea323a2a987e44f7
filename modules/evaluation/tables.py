"""Results as rows of text, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from modules.evaluation.candidates import FULL
from modules.evaluation.layers import LayerCosts
from modules.evaluation.results import PasskeyResult, QualityResult, QualityRow

Rows = list[list[str]]
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


def quality_rows(result: QualityResult) -> Rows:
    """Header and rows: cache, stored bits, perplexity and its change, KL with its standard error, top-1."""
    full = result.row(FULL).perplexity
    return [["cache", "stored bits", "perplexity", "change", "KL (nats)", "±", "top-1"]] + [
        [
            row.name + (" *" if result.day_of(row) else ""),
            number(row.stored_bits, 2),
            row.note or number(row.perplexity, 3),
            MISSING if row.name == FULL else percent(row.perplexity, full),
            MISSING if row.name == FULL else number(row.kl, 4),
            MISSING if row.name == FULL else number(row.kl_error, 4),
            number(row.top1, 3),
        ]
        for row in result.rows
    ]


def passkey_rows(results: Sequence[PasskeyResult]) -> Rows:
    """Header and rows: cache, and keys found of those hidden at each length."""
    lengths = sorted({length for result in results for length in result.lengths})
    names = list(dict.fromkeys(name for result in results for name in result.names))
    rows = [["cache", *(f"{length:,} tokens" for length in lengths)]]
    for name in names:
        counts = [_sum(result.found(name, length) for result in results) for length in lengths]
        rows.append([name, *(f"{found} of {asked}" if asked else MISSING for found, asked in counts)])
    return rows


def layer_rows(costs: LayerCosts, chosen: Mapping[str, Sequence[int]]) -> Rows:
    """Header and rows: layer, and of its keys and values what 2 bits cost and the bits chosen."""
    rows = [["layer", "K: KL (nats)", "bits", "V: KL (nats)", "bits"]]
    for layer, (key, value) in enumerate(zip(costs.k_bits, costs.v_bits)):
        bits = [str(chosen[side][layer]) for side in ("k_bits", "v_bits")]
        rows.append([str(layer), number(key, 5), bits[0], number(value, 5), bits[1]])
    return rows


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    found, asked = zip(*pairs)
    return sum(found), sum(asked)


def markdown(rows: Rows, bold: str | None = None) -> str:
    """A Markdown table; the row whose first cell is `bold` stands out."""
    header, *body = rows
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
    lines += [_line([f"**{cell}**" for cell in row] if row[0] == bold else row) for row in body]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def print_table(rows: Rows, title: str, console: Console) -> None:
    """Show rows on a terminal."""
    table = Table(title=title)
    header, *body = rows
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in body:
        table.add_row(*row)
    console.print(table)


def compared(result: QualityResult) -> list[QualityRow]:
    """The rows that have numbers, without full precision."""
    return [row for row in result.rows if row.kl is not None and row.name != FULL]
