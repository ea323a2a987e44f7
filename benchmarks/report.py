"""Write docs/performance.md and its plot from the results of the other benchmarks.

python benchmarks/report.py        # reads benchmarks/results/*.json; what was not measured is said to be missing
"""

from __future__ import annotations

import argparse
import json
import pathlib

from machine import RESULTS, ROOT  # which puts the project's folder on the path

from modules.evaluation.plots import panels, save
from modules.evaluation.tables import markdown

BASELINE = {"attention": "DynamicCache+SDPA", "decode": "DynamicCache"}
INTRODUCTION = """# Speed

<!-- Written by `python benchmarks/report.py` from benchmarks/results; change benchmarks/report.py, not this page. -->

Every contender of a row ran in the same loop, in turns; times are medians in milliseconds, in parentheses how many times
faster than full precision in that loop. Other machines give other times: the commands are beside the tables.
"""
NO_GPU = """The kernels for GPUs have been tested in Triton's interpreter and compiled (above), **not run on a GPU**: there
are no times. `bash benchmarks/run_gpu.sh benchmarks/results` tests and measures them in one go, in under nine minutes.
"""


def about(environment: dict) -> str:
    """One line on what was measured with."""
    return "Measured with " + ", ".join(f"{name} {value}" for name, value in environment.items()) + "."


def against(rows: list[dict], contender: str, baseline: str) -> list[list[str]]:
    """A line for every group of rows that ran together, a column for every contender, the baseline first."""
    names = list(dict.fromkeys(row[contender] for row in rows))
    names = [baseline, *(name for name in names if name != baseline)]
    together: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        together.setdefault((row.get("shape", ""), row["dtype"], row["tokens"]), {})[row[contender]] = row
    lines = []
    for key, found in together.items():
        cells = [str(part) for part in key if part != ""]
        for name in names:
            row = found.get(name)
            speedup = "" if name == baseline or row is None else f" ({found[baseline]['p50_ms'] / row['p50_ms']:.1f}×)"
            cells.append("–" if row is None else f"{row['p50_ms']:.2f}{speedup}")
        lines.append(cells)
    first = ["shape", "dtype", "tokens"] if rows[0].get("shape") else ["dtype", "tokens"]
    return [[*first, *names], *lines]


def load(folder: pathlib.Path, name: str) -> dict | None:
    """A result, None where it is missing."""
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def attention_section(folder: pathlib.Path, plot: pathlib.Path) -> str:
    """Attention of one layer on the CPU; its plot goes to `plot`."""
    parts = ["## Attention of one layer, one new token, on a CPU", "`python benchmarks/attention_cpu.py`"]
    result = load(folder, "attention_cpu.json")
    if result is None:
        return "\n\n".join([*parts, "Not measured yet."])
    parts += [
        "Appending the token is in the times, on both sides; packing a group of 32 is not.",
        about(result["environment"]),
        markdown(against(result["rows"], "contender", BASELINE["attention"])),
        f"![times faster than full precision]({draw(result, plot).name})",
    ]
    return "\n\n".join(parts)


def decode_section(folder: pathlib.Path) -> str:
    """A whole decode step on the CPU."""
    parts = ["## A decode step of a whole model on a CPU", "`python benchmarks/decode_cpu.py`"]
    result = load(folder, "decode_cpu.json")
    if result is None:
        return "\n\n".join([*parts, "Not measured yet."])
    lines = against(result["rows"], "cache", BASELINE["decode"])
    return "\n\n".join([*parts, about(result["environment"]), markdown(lines)])


def compile_section(folder: pathlib.Path) -> str:
    """What the compiler made of the kernels for GPUs."""
    parts = [
        "## Kernels for GPUs, compiled",
        "`python benchmarks/compile_report.py --json benchmarks/results/compile.json`; with `--quick` what people run most",
    ]
    result = load(folder, "compile.json")
    if result is None:
        return "\n\n".join([*parts, "Not compiled yet."])
    names = ["kernel", "variant", "arch", "registers", "spilled", "shared", "wide_copies", "loop", "per_code"]
    header = [
        "kernel",
        "variant",
        "sm_",
        "registers",
        "spilled bytes",
        "shared bytes",
        "16-byte copies",
        "loop",
        "per code",
    ]
    lines = [
        ["" if (v := kernel[name]) is None else f"{v:.2f}" if isinstance(v, float) else str(v) for name in names]
        for kernel in result["kernels"]
    ]
    text = (
        "Registers a thread, bytes spilled, shared memory; for attention the share of the codes that copies of 16 bytes a thread "
        "bring, the instructions of the main loop, and those per code of keys and values. Another version of Triton makes other "
        "machine code."
    )
    beyond = "\n".join(f"- {line}" for line in result["beyond_limits"]) or "- none"
    parts += [about(result["environment"]), text, "Beyond the limits of `--check`:", beyond]
    return "\n\n".join([*parts, markdown([header, *lines])])


def gpu_section(folder: pathlib.Path) -> str:
    """What ran on a GPU."""
    result = load(folder, "gpu_bench.json")
    if result is None:
        return f"## On a GPU\n\n{NO_GPU}"
    rows = result.pop("rows")
    header = list(rows[0])
    lines = [
        ["" if row[n] is None else f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in header]
        for row in rows
    ]
    return "\n\n".join(
        ["## On a GPU", "`bash benchmarks/run_gpu.sh benchmarks/results`", about(result), markdown([header, *lines])]
    )


def draw(result: dict, path: pathlib.Path) -> pathlib.Path:
    """Times faster than full precision against tokens, one panel a shape and dtype."""
    rows = result["rows"]
    pairs = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    figure, axes = panels(-(-len(pairs) // 2), 2, (4.5, 2.6))
    for axis, (shape, dtype) in zip(axes.flat, pairs):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [
                (r["tokens"], r["speedup_p50"])
                for r in rows
                if (r["shape"], r["dtype"], r["contender"]) == (shape, dtype, name)
            ]
            axis.plot(*zip(*points), marker=".", label=name)
        axis.set(title=f"{shape}, {dtype}", xscale="log", xlabel="tokens", ylabel="times faster")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    save(figure, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    others = (decode_section, compile_section, gpu_section)
    sections = [attention_section(args.results, args.output.with_suffix(".svg"))]
    sections += [section(args.results) for section in others]
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text("\n".join([INTRODUCTION, "\n\n".join(sections), ""]))
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
