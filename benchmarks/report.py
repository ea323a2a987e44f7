"""Write docs/performance.md and its plot from the results of the other benchmarks.

python benchmarks/report.py        # reads benchmarks/results/*.json; what was not measured is said to be missing
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas
from paths import RESULTS, ROOT  # which puts the project's folder on the path

from modules.cli.command import argument, parse
from modules.evaluation.pages import render
from modules.evaluation.plots import panels, save
from modules.evaluation.results import BenchmarkResult, load_result
from modules.evaluation.tables import MISSING, plain

TEMPLATE = Path(__file__).with_name("performance.md.jinja")
COMPILED = {  # columns of the page, by the names in the results
    "kernel": "kernel",
    "variant": "variant",
    "arch": "sm_",
    "registers": "registers",
    "spilled": "spilled bytes",
    "shared": "shared bytes",
    "wide_copies": "16-byte copies",
    "loop": "loop",
    "per_code": "per code",
}


def measured_with(result: BenchmarkResult) -> str:
    """One line on what was measured with."""
    here = result.environment
    settings = [f"{name} {value}" for name, value in result.settings.items() if not isinstance(value, list)]
    return f"Measured with {', '.join(filter(None, [*settings, here.machine, here.versions, here.date]))}."


def against(rows: list[dict[str, Any]], contender: str, baseline: str) -> pandas.DataFrame:
    """A line for every group of rows that ran together, a column for every contender, the baseline first."""
    frame = pandas.DataFrame(rows)
    together = [name for name in ("shape", "dtype", "tokens", "piece") if name in frame]
    names = [baseline, *(name for name in frame[contender].unique() if name != baseline)]
    times = frame.set_index([*together, contender])["p50_ms"].unstack(contender)[names]
    times = times.loc[frame[together].drop_duplicates().itertuples(index=False, name=None)]  # in the order measured
    cells = times.apply(
        lambda times: [_cell(time, times[baseline], name == baseline) for name, time in times.items()], axis=1
    )
    shown = pandas.DataFrame(cells.tolist(), columns=names)
    return pandas.concat([times.index.to_frame(index=False).astype(str), shown], axis=1)


def _cell(time: float, baseline: float, is_baseline: bool) -> str:
    if pandas.isna(time):
        return MISSING
    return f"{time:.2f}" if is_baseline else f"{time:.2f} ({baseline / time:.1f}×)"


def peers_table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """A line a cache: milliseconds of a step by tokens, and attention's part, what the most tokens take beyond the fewest."""
    frame = pandas.DataFrame(rows)
    times = frame.pivot(index="cache", columns="tokens", values="p50_ms").loc[frame["cache"].drop_duplicates()]
    fewest, most = times.columns[0], times.columns[-1]
    times["attention"] = times[most] - times[fewest]
    shown = times.map(lambda time: MISSING if pandas.isna(time) else f"{time:.1f}")
    shown.columns = [name if name == "attention" else f"{name:,} tokens" for name in shown.columns]
    return shown.reset_index()


def run_with(rows: list[dict[str, Any]]) -> list[str]:
    """What each engine was: its rows' names without their caches, and the package."""
    return list(dict.fromkeys(row["with"] for row in rows))


def compile_table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """What the compiler made of the kernels."""
    frame = pandas.DataFrame(rows, dtype=object)[list(COMPILED)].rename(columns=COMPILED)
    return frame.map(lambda value: "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))


def gpu_table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """What ran on a GPU."""
    return pandas.DataFrame(rows, dtype=object).map(plain)


def prefill_table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Memory and time of long prompts."""
    shown = [
        {
            "tokens": str(row["tokens"]),
            "cache": row["cache"],
            "seconds": f"{row['seconds']:.1f}",
            **{f"{of} MB": f"{row[f'{of}_bytes'] / 1e6:.0f}" for of in ("peak", "cache", "beyond")},
            "of the unquantized cache": f"{100 * row['beyond_share']:.0f} %",
        }
        for row in rows
    ]
    return pandas.DataFrame(shown)


def drafts_table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Decoding with drafts and without."""
    shown = [
        {
            "tokens": str(row["tokens"]),
            "cache": row["cache"],
            "drafts": row["drafts"],
            "tokens/s": f"{row['tokens_a_second']:.1f} ({row['speedup']:.1f}×)",
            "forwards": str(row["steps"]),
            "accepted": str(row["accepted"]),
            "same tokens": "yes" if row["as_without"] else "no",
            "as stock": str(row["as_stock"]),
            **_along(row),
        }
        for row in rows
    ]
    return pandas.DataFrame(shown)


def _along(row: dict[str, Any]) -> dict[str, str]:
    """What going along the stock model's text gave, where that was done."""
    if "along_drafted" not in row:
        return {"along it: tokens/s": MISSING, "along it: accepted": MISSING}
    accepted = f"{row['along_accepted']} of {row['along_drafted']}"
    return {"along it: tokens/s": f"{row['along_tokens_a_second']:.1f}", "along it: accepted": accepted}


def ragged_table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """A line a batch: steps of aligned sequences, those of ragged ones, and how the means compare."""
    frame = pandas.DataFrame(rows).set_index(["shape", "batch", "tokens", "sequences"]).unstack("sequences")
    kinds = {"mean_ms": "mean", "p50_ms": "median", "max_ms": "longest"}
    shown = pandas.DataFrame(
        {
            f"{name}, {word}": frame[kind, name].map("{:.2f}".format)
            for name in ("aligned", "ragged")
            for kind, word in kinds.items()
        }
    )
    shown["ragged / aligned"] = (frame["mean_ms", "ragged"] / frame["mean_ms", "aligned"]).map("{:.2f}".format)
    return shown.reset_index().astype(str)


def load(path: Path) -> BenchmarkResult | None:
    """A result, None where it is missing."""
    if not path.exists():
        return None
    result = load_result(path)
    if not isinstance(result, BenchmarkResult):
        raise ValueError(f"{path} holds no benchmark.")
    return result


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Times faster than full precision against tokens, one panel a shape and dtype."""
    panes = list(pandas.DataFrame(rows).groupby(["shape", "dtype"], sort=False))
    figure, axes = panels(-(-len(panes) // 2), 2, (4.5, 2.6))
    for axis, ((shape, dtype), own) in zip(axes.flat, panes):
        for name, line in own.groupby("contender", sort=False):
            axis.plot(line["tokens"].tolist(), line["speedup_p50"].tolist(), marker=".", label=name)
        axis.set(title=f"{shape}, {dtype}", xscale="log", xlabel="tokens", ylabel="times faster")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    save(figure, path)


def write_page(results: Path, output: Path) -> None:
    """The page from the results in a folder, and its plot beside it."""
    names = {
        "attention": "attention_cpu",
        "decode": "decode_cpu",
        "pieces": "pieces_cpu",
        "prefill": "prefill_cpu",
        "long_prefill": "prefill_32k_cpu",
        "drafts": "drafts_cpu",
        "ragged": "ragged_cpu",
        "peers": "peers_cpu",
        "compiled": "compile",
        "gpu": "gpu_bench",
    }
    found = {name: load(results / f"{file}.json") for name, file in names.items()}
    plot = output.with_suffix(".svg")
    output.parent.mkdir(parents=True, exist_ok=True)
    if found["attention"] is not None:
        draw(found["attention"].rows, plot)
    functions = {
        "measured_with": measured_with,
        "against": against,
        "peers_table": peers_table,
        "run_with": run_with,
        "compile_table": compile_table,
        "gpu_table": gpu_table,
        "prefill_table": prefill_table,
        "drafts_table": drafts_table,
        "ragged_table": ragged_table,
    }
    output.write_text(render(TEMPLATE, plot=plot.name, **found, **functions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    results: Path = argument(RESULTS, "folder of the results")
    output: Path = argument(ROOT / "docs" / "performance.md", "the page")


def main() -> None:
    flags = parse(Flags, description=__doc__)
    write_page(flags.results, flags.output)
    print(f"written: {flags.output}")


if __name__ == "__main__":
    main()
