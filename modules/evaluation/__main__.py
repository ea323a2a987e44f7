"""The command line: `kivi evaluate` or `python -m modules.evaluation`, with quality, free, tasks, passkey, layers, ablations
or report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.cli.command import argument, check_least, group, parse_one_of
from modules.cli.status import run
from modules.evaluation.ablations import ablations
from modules.evaluation.budget import BITS, BUDGETS
from modules.evaluation.by_layer import CHOSEN, choose_by_layer
from modules.evaluation.candidates import (
    CANDIDATE_SETS,
    Candidate,
    by_layer,
    changes,
    parse_options,
    peers,
    short_candidates,
)
from modules.evaluation.flags import CacheFlags, ModelFlags
from modules.evaluation.free_command import Free, run_free
from modules.evaluation.int8 import measure_int8, write_int8_report
from modules.evaluation.layers import TOKENS
from modules.evaluation.loading import MODEL_HELP, load_model
from modules.evaluation.passkey import depths_of, measure_passkey
from modules.evaluation.plan import INT8_PLAN, PLAN, Int8Step, Step, existing_models, int8_steps, steps
from modules.evaluation.processes import Processes
from modules.evaluation.quality import SKIP, keep_peers, measure_quality
from modules.evaluation.references import other_methods, references
from modules.evaluation.report import write_report
from modules.evaluation.results import (
    BenchmarkResult,
    FreeResult,
    PasskeyResult,
    QualityResult,
    TasksResult,
    load_result,
    save_result,
)
from modules.evaluation.showing import progress_bar, show, show_layers
from modules.evaluation.streaming import CHUNK
from modules.evaluation.tables import ablation_table, print_table
from modules.evaluation.tasks_command import Tasks, run_tasks
from modules.evaluation.texts import TEXT_HELP, encode, load_text
from modules.options import KIVIOptions

ALONE = Processes()
RESULTS = "benchmarks/results"
REPORT = "docs/quality.md"


def run_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: list[Candidate],
    *,
    console: Console,
    model_name: str,
    text: str,
    tokens: int,
    chunk: int = CHUNK,
    skip: int = SKIP,
    reference: Candidate | None = None,
    processes: Processes = ALONE,
) -> QualityResult:
    """Measure with a progress bar."""
    ids = encode(tokenizer, load_text(text), tokens, text)
    total = -(-tokens // chunk) * (len(processes.share(candidates)) + 1)
    with progress_bar(console, processes.leads) as bar:
        task = bar.add_task("", total=total)
        return measure_quality(
            model,
            ids,
            candidates,
            chunk=chunk,
            skip=skip,
            processes=processes,
            model_name=model_name,
            text_name=text,
            progress=lambda name: bar.update(task, advance=1, description=name),
            reference=reference,
        )


def run_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: list[Candidate],
    *,
    console: Console,
    model_name: str,
    filler: str,
    lengths: list[int],
    depths: int = 5,
    chunk: int = CHUNK,
    processes: Processes = ALONE,
) -> PasskeyResult:
    """Measure with a progress bar."""
    asked = [length for length in lengths for _ in depths_of(depths)]
    with progress_bar(console, processes.leads) as bar:
        task = bar.add_task("", total=sum(processes.share(asked)) * (len(candidates) + 1))
        return measure_passkey(
            model,
            tokenizer,
            load_text(filler),
            candidates,
            lengths=lengths,
            depths=depths,
            chunk=chunk,
            processes=processes,
            model_name=model_name,
            filler_name=filler,
            progress=lambda name, tokens: bar.update(task, advance=tokens, description=name),
        )


def run_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    console: Console,
    model_name: str,
    text: str,
    tokens: int = TOKENS,
    bits: Sequence[float] = (BITS,),
    options: dict[str, Any] | None = None,
) -> list[BenchmarkResult]:
    """Measure every layer and choose, with a progress bar."""
    ids = encode(tokenizer, load_text(text), tokens, text)
    with progress_bar(console) as bar:
        task = bar.add_task("one forward and its derivative", total=None)

        def progress(name: str, total: int) -> None:
            bar.update(task, advance=1, description=name, total=total)

        return choose_by_layer(
            model, ids, bits=bits, options=options, model_name=model_name, text_name=text, progress=progress
        )


def _run_int8(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    step: Int8Step,
    *,
    console: Console,
    page: Path,
) -> dict[str, Any]:
    """Calibrate and measure with a progress bar."""
    with progress_bar(console) as bar:
        task = bar.add_task("", total=None)
        return measure_int8(model, tokenizer, step, page, lambda name: bar.update(task, advance=1, description=name))


def measure_steps(wanted: list[Step], models: Path, flags: Report, console: Console) -> None:
    """Measure steps of the plan and save each; peers' rows of an earlier run are kept where nothing has changed."""
    loaded: dict[str, Any] = {}
    for step in wanted:
        console.rule(step.name)
        if step.model not in loaded:
            loaded = {step.model: load_model(str(models / step.model), flags.dtype, flags.device)}  # one at a time
        path = Path(flags.results) / step.file
        if step.kind != "quality":
            result: Any = _MEASURES[step.kind](step, *loaded[step.model], console)
        else:
            earlier = load_result(path) if path.exists() else None
            result = _measure_step(step, loaded[step.model], earlier, flags, console)
        show(result, str(path))


def _measure_passkey(
    step: Step, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> PasskeyResult:
    defaults, lengths = short_candidates()[:1], list(step.lengths)
    return run_passkey(
        model, tokenizer, defaults, console=console, model_name=step.model, filler=step.text, lengths=lengths
    )


def _measure_free(
    step: Step, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> FreeResult:
    return run_free(
        model,
        tokenizer,
        [*short_candidates(), *(references() if step.peers else [])],
        console=console,
        model_name=step.model,
        text=step.text,
        prompt_tokens=step.tokens,
        new_tokens=step.new_tokens,
    )


def _measure_tasks(
    step: Step, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> TasksResult:
    candidates = [*short_candidates(), *(references() if step.peers else [])]
    return run_tasks(
        model, tokenizer, candidates, console=console, model_name=step.model, filler=step.text, lengths=step.lengths
    )


_MEASURES: dict[str, Callable[..., Any]] = {"passkey": _measure_passkey, "free": _measure_free, "tasks": _measure_tasks}


def _chosen_by_layer(step: Step, loaded: Any, results: Path, console: Console) -> list[Candidate]:
    """Caches with bits by layer, chosen by the step's other text: as an earlier run saved them, or chosen and saved now."""
    if not step.calibration:
        return []
    paths = {bits: results / f"layers-{step.model}-{step.calibration}-{bits:g}.json" for bits in BUDGETS}
    missing = [bits for bits, path in paths.items() if not path.exists()]
    if missing:
        chosen = run_layers(*loaded, console=console, model_name=step.model, text=step.calibration, bits=missing)
        for bits, result in zip(missing, chosen):
            save_result(result, paths[bits])
    return [by_layer(load_result(path)) for path in paths.values()]


def _measure_step(step: Step, loaded: Any, earlier: Any, flags: Report, console: Console) -> QualityResult:
    own = []
    if not flags.missing:
        own = CANDIDATE_SETS[step.candidates]() + _chosen_by_layer(step, loaded, Path(flags.results), console)

    def measure(candidates: list[Candidate]) -> QualityResult:
        model, tokenizer = loaded
        return run_quality(
            model, tokenizer, candidates, console=console, model_name=step.model, text=step.text, tokens=step.tokens
        )

    result = earlier if flags.missing and earlier else keep_peers(measure(own), earlier)
    others = other_methods() if step.peers else []
    missing = [peer for peer in others if all(row.name != peer.name for row in result.rows)]
    return keep_peers(result, measure(missing)) if missing else result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality(CacheFlags):
    """Perplexity, KL and top-1 of caches side by side."""

    text: str = argument("prose", TEXT_HELP)
    tokens: int = argument(3072, "of the text")
    skip: int = argument(SKIP, "tokens before the first measured prediction")
    set: str = argument("main", "caches, where no options are given", tuple(sorted(CANDIDATE_SETS)))
    peers: bool = argument(True, "other methods too: transformers' own quantized caches, KVarN, TurboQuant")
    reference: str | None = argument(
        None, "the KIVI cache that the others are compared with, as NAME=VALUE,…; None: full precision"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self.skip, 0, "--skip")
        check_least(self.tokens, self.skip + 2, "--tokens (with --skip)")

    def run(self, console: Console) -> None:
        """Measure, show and save."""
        candidates = self.own_candidates() or CANDIDATE_SETS[self.set]()
        candidates += other_methods() if self.peers else []
        reference = None if self.reference is None else parse_options(self.reference)
        load_text(self.text)  # a mistake here should not wait for the model
        processes = Processes.join(self.device)
        model, tokenizer = load_model(self.model, self.dtype, self.device)
        result = run_quality(
            model,
            tokenizer,
            candidates,
            console=console,
            model_name=Path(self.model).name,
            text=self.text,
            tokens=self.tokens,
            chunk=self.chunk,
            skip=self.skip,
            reference=reference,
            processes=processes,
        )
        if processes.leads:
            show(result, self.output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(CacheFlags):
    """Is a key in a long prompt found?"""

    filler: str = argument("prose", TEXT_HELP)
    lengths: tuple[int, ...] = argument((2000,), "of the prompts, in tokens")
    depths: int = argument(5, "places of the key")
    peers: bool = argument(False, "transformers' own quantized caches too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths:
            raise ValueError("--lengths must name at least one length.")
        for length in self.lengths:
            check_least(length, 1, "--lengths")
        check_least(self.depths, 1, "--depths")

    def run(self, console: Console) -> None:
        """Measure, show and save."""
        candidates = (self.own_candidates() or short_candidates()) + (peers() if self.peers else [])
        load_text(self.filler)
        processes = Processes.join(self.device)
        model, tokenizer = load_model(self.model, self.dtype, self.device)
        result = run_passkey(
            model,
            tokenizer,
            candidates,
            console=console,
            model_name=Path(self.model).name,
            filler=self.filler,
            lengths=list(self.lengths),
            depths=self.depths,
            chunk=self.chunk,
            processes=processes,
        )
        if processes.leads:
            show(result, self.output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers(ModelFlags):
    """Bits and wide channels of each layer that cost least, within so many stored bits."""

    model: str = argument(help=MODEL_HELP)
    cache: KIVIOptions = group(KIVIOptions)
    bits: tuple[float, ...] = argument(
        (BITS,),
        "stored bits an element may take on average, with its share of scale and minimum; or several such limits",
    )
    scale_bits: int = argument(8, "metadata_bits of the cache", (8, 16))
    text: str = argument("prose", TEXT_HELP)
    tokens: int = argument(TOKENS, "of the text")
    output: str | None = argument(
        None, "write what was chosen, and what it costs, as JSON here; {bits} in the name stands for the limit"
    )

    def __post_init__(self) -> None:
        check_least(self.tokens, 3, "--tokens")
        for bits in self.bits:
            check_least(bits, 2, "--bits")
        if not self.bits:
            raise ValueError("--bits must name at least one limit.")
        if self.output and len({self.path(bits) for bits in self.bits}) < len(self.bits):
            raise ValueError(f"--output must be a name with {{bits}} in it for several --bits; got {self.output!r}.")

    def path(self, bits: float) -> str | None:
        """Where what was chosen within `bits` is written."""
        return None if self.output is None else self.output.replace("{bits}", f"{bits:g}")

    def run(self, console: Console) -> None:
        """Measure, show and save."""
        options = changes(self.cache)
        chosen = [name for name in options if name in CHOSEN]
        if chosen:
            raise ValueError(f"this command chooses {', '.join(CHOSEN)}; leave {' and '.join(chosen)} out.")
        Processes.join(self.device).refuse("kivi evaluate layers")
        load_text(self.text)
        model, tokenizer = load_model(self.model, self.dtype, self.device)
        results = run_layers(
            model,
            tokenizer,
            console=console,
            model_name=Path(self.model).name,
            text=self.text,
            tokens=self.tokens,
            bits=self.bits,
            options={**options, "metadata_bits": self.scale_bits},
        )
        for bits, result in zip(self.bits, results):
            show_layers(result, self.path(bits))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablations:
    """Ways to store keys and values, ranked on the recorded states of a model."""

    model: str = argument(help=MODEL_HELP)
    text: str = argument("prose", TEXT_HELP)
    tokens: int = argument(1024, "of the text")
    layers: int = argument(8, "equally far apart")
    output: str | None = argument(None, "write the result as JSON here")

    def run(self, console: Console) -> None:
        """Measure, show and save."""
        with progress_bar(console) as bar:
            task = bar.add_task("", total=None)
            result = ablations(
                self.model,
                self.text,
                self.tokens,
                self.layers,
                progress=lambda name: bar.update(task, advance=1, description=name),
            )
        print_table(ablation_table(result), f"{Path(self.model).name}, {self.text}", Console())
        if self.output:
            save_result(result, self.output)
            console.print(f"written: {self.output}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(ModelFlags):
    """docs/quality.md and its plot from the results."""

    measure: tuple[str, ...] = argument((), f"measure first: all, or some of {', '.join(step.name for step in PLAN)}")
    missing: bool = argument(False, "of what is measured, only the rows of other methods that a result does not have")
    models: str | None = argument(None, "folder of the models of the page; None: $KIVI_MODELS or ~/.cache/kivi-models")
    results: str = argument(RESULTS, "folder of quality*.json")
    output: str = argument(REPORT, "the page")

    def run(self, console: Console) -> None:
        """Measure what is asked for, and write the page."""
        Processes.join(self.device).refuse("kivi evaluate report")
        if self.measure:
            measure_steps(steps(list(self.measure)), existing_models(self.models), self, console)
        for path in write_report(self.results, self.output):
            Console().print(f"written: {path}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(ModelFlags):
    """docs/int8.md: static INT8 caches beside others, and the ranges that were calibrated."""

    measure: tuple[str, ...] = argument(
        (), f"measure first: all, or some of {', '.join(step.name for step in INT8_PLAN)}"
    )
    models: str | None = argument(None, "folder of the models of the page; None: $KIVI_MODELS or ~/.cache/kivi-models")
    results: str = argument(RESULTS, "folder of int8*.json")
    output: str = argument("docs/int8.md", "the page")

    def run(self, console: Console) -> None:
        """Measure what is asked for, and write the page."""
        Processes.join(self.device).refuse("kivi evaluate int8")
        if self.measure:
            self._measure(int8_steps(list(self.measure)), console)
        for path in write_int8_report(self.results, self.output):
            Console().print(f"written: {path}")

    def _measure(self, wanted: list[Int8Step], console: Console) -> None:
        models = existing_models(self.models)
        for step in wanted:
            console.rule(step.name)
            model, tokenizer = load_model(str(models / step.model), self.dtype, self.device)
            measured = _run_int8(model, tokenizer, step, console=console, page=Path(self.output))
            for file, result in measured.items():
                if isinstance(result, QualityResult):
                    show(result, None)
                save_result(result, Path(self.results) / file)


DESCRIPTION = """What a quantized cache costs, measured on a model of yours.

Examples:
  kivi evaluate quality --model path/to/model --text prose
  kivi evaluate quality --model path/to/model --options k_bits=4,v_bits=4 --options 'paper: k_range=minmax,sink_length=0'
  kivi evaluate free --model path/to/model --new-tokens 500
  kivi evaluate tasks --model path/to/model --lengths 4000 8000
  kivi evaluate passkey --model path/to/model --lengths 2000 4000
  kivi evaluate layers --model path/to/model
  accelerate launch --num_processes 2 -m modules.evaluation quality --model path/to/model    # shared by two GPUs
"""
COMMANDS = {
    "quality": Quality,
    "free": Free,
    "tasks": Tasks,
    "passkey": Passkey,
    "layers": Layers,
    "ablations": Ablations,
    "report": Report,
    "int8": Int8,
}


def main(arguments: list[str] | None = None, prog: str = "python -m modules.evaluation") -> int:
    """Run a command, called as `prog`; its exit status."""
    command = parse_one_of(COMMANDS, arguments, prog=prog, description=DESCRIPTION)
    return run(lambda: command.run(Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
