"""`docs/int8.md`: what static INT8 costs beside other caches of 8 bits, and the ranges that were calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.calibration.calibrate import calibrate
from modules.calibration.ranges import draw_ranges, range_rows, range_table
from modules.codecs.static import StaticParameters
from modules.evaluation.candidates import Candidate, eight_bit_peers, fake_static, static
from modules.evaluation.environment import Environment
from modules.evaluation.pages import render
from modules.evaluation.plan import Int8Step
from modules.evaluation.quality import measure_quality
from modules.evaluation.report import measured_on
from modules.evaluation.results import BenchmarkResult, QualityResult, load_result
from modules.evaluation.tables import MISSING, number, percent
from modules.evaluation.texts import encode, load_text, pieces
from modules.options import FULL_PRECISION_BITS

TEMPLATE = Path(__file__).with_name("int8.md.jinja")
ALL_LAYERS = "static INT8, all layers"
FAKE = "the same, fake quantization"
EXAMPLE = "static INT8, layer 0 left out"
ASYMMETRIC = "static INT8, asymmetric"
AT_ZERO = "static INT8, texts calibrated from position 0"
PROCESS = {"type": "dynamic_cache", "qconfig": {}}  # the document's defaults: all layers, symmetric
SPECS = {
    ALL_LAYERS: PROCESS,
    EXAMPLE: {**PROCESS, "exclude": ["model.layers.0.self_attn"]},
    ASYMMETRIC: {**PROCESS, "qconfig": {"symmetric": False}},
}


def measure_int8(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    step: Int8Step,
    page: Path,
    progress: Callable[[str], None],
) -> dict[str, QualityResult | BenchmarkResult]:
    """Calibrate a model and measure its caches on other texts; the results by the names of their files.

    The plot of the ranges is drawn beside the page.
    """
    texts = pieces(tokenizer, step.calibration, step.count, step.length)
    parameters = {}
    for name, spec in SPECS.items():
        progress(f"calibrating: {name}")
        parameters[name] = calibrate(model, spec, texts, progress=False)
    near = calibrate(model, PROCESS, texts, context=0, progress=False)
    draw_ranges({step.model: parameters[ALL_LAYERS]}, plot_of(page, step.model))
    results: dict[str, QualityResult | BenchmarkResult] = {
        f"int8-{step.name}-ranges.json": BenchmarkResult(
            "int8 ranges",
            range_rows(parameters[ALL_LAYERS]),
            Environment.here(model),
            {"model": step.model, "texts": step.count, "tokens": step.length, "sources": list(step.calibration)},
        )
    }
    for text in step.texts:
        ids = encode(tokenizer, load_text(text), step.tokens, text)
        results[f"int8-{step.name}-{text}.json"] = measure_quality(
            model, ids, _candidates(parameters, near), model_name=step.model, text_name=text, progress=progress
        )
    return results


def _candidates(parameters: dict[str, StaticParameters], near: StaticParameters) -> list[Candidate]:
    own = [static(name, each) for name, each in parameters.items()]
    own.insert(1, fake_static(FAKE, parameters[ALL_LAYERS]))
    return [*own, static(AT_ZERO, near), *eight_bit_peers()]


def plot_of(page: Path, model: str) -> Path:
    """Where the plot of a model's ranges lies, beside the page."""
    return page.with_name(f"{page.stem}-{model}.svg")


def int8_table(result: QualityResult) -> pandas.DataFrame:
    """Cache, stored bits and their share of float16's, KL with its standard error, top-1 and the change of perplexity."""
    full = result.rows[0].perplexity
    rows = [
        [
            row.name,
            number(row.stored_bits, 2),
            number(None if row.stored_bits is None else row.stored_bits / FULL_PRECISION_BITS, 3),
            row.note or number(row.kl, 5),
            number(row.kl_error, 5),
            number(row.top1, 3),
            percent(row.perplexity, full),
        ]
        for row in result.rows[1:]
    ]
    header = ["cache", "stored bits", "of float16", "KL (nats)", "±", "top-1", "perplexity"]
    return pandas.DataFrame(rows, columns=header)


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model's part of the page."""

    ranges: BenchmarkResult
    quality: list[QualityResult]
    plot: str

    @property
    def name(self) -> str:
        return self.ranges.settings["model"]


def write_int8_report(folder: str | Path, output: str | Path) -> list[Path]:
    """Write the page from the results in a folder; the paths written.

    Raises:
        ValueError: where there are none.
    """
    loaded = [load_result(path) for path in sorted(Path(folder).glob("int8-*.json"))]
    quality = [result for result in loaded if isinstance(result, QualityResult)]
    output = Path(output)
    models = [
        _Model(
            ranges,
            sorted(
                (result for result in quality if result.model == ranges.settings["model"]),
                key=lambda r: r.text != "prose",
            ),
            plot_of(output, ranges.settings["model"]).name,
        )
        for ranges in loaded
        if isinstance(ranges, BenchmarkResult)
    ]
    if not models or not quality:
        raise ValueError(
            f"{folder} has no int8-*.json; measure first: `python -m modules.evaluation int8 --measure all`."
        )
    models.sort(key=lambda model: "smollm" not in model.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        render(
            TEMPLATE,
            models=models,
            summary=_summary([result for model in models for result in model.quality]),
            int8_table=int8_table,
            range_table=range_table,
            environment=measured_on([result.environment for result in loaded]),
            all_layers=ALL_LAYERS,
            at_zero=AT_ZERO,
        )
    )
    return [output]


def _summary(quality: Sequence[QualityResult]) -> pandas.DataFrame:
    """One line a text: KL of what is to be compared first."""
    names = [ALL_LAYERS, EXAMPLE, AT_ZERO, *(peer.name for peer in eight_bit_peers())]
    rows = []
    for result in quality:
        known = {row.name: row for row in result.rows}
        cells = [number(known[name].kl, 4) if name in known else MISSING for name in names]
        rows.append([f"{result.model}, {result.text}", *cells])
    return pandas.DataFrame(rows, columns=["KL (nats)", *names])
