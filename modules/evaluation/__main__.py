"""The command line: `python -m modules.evaluation quality|passkey|layers|report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from modules.evaluation.candidates import CANDIDATE_SETS, Candidate, kivi, parse_options, peers, short_candidates
from modules.evaluation.layers import EXTRA_BITS, TOKENS, LayerCosts, choose_bits, measure_layers
from modules.evaluation.passkey import depths_of, measure_passkey
from modules.evaluation.plan import Step, models_folder, steps
from modules.evaluation.quality import SKIP, keep_peers, measure_quality
from modules.evaluation.report import write_report
from modules.evaluation.results import PasskeyResult, QualityResult, load_result, save_result
from modules.evaluation.streaming import CHUNK
from modules.evaluation.tables import layer_rows, passkey_rows, print_table, quality_rows
from modules.evaluation.texts import encode, load_text

RESULTS = "benchmarks/results"
REPORT = "docs/quality.md"
DTYPES = ("float32", "bfloat16", "float16")


def load_model(path: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of the Llama or Qwen family as a KIVI model, and its tokenizer.

    Raises:
        ValueError: for a checkpoint of another family, or a path that holds none.
    """
    from modeling_llama_kivi import load_llama_kivi
    from modeling_qwen_kivi import load_qwen_kivi

    try:
        family = AutoConfig.from_pretrained(path).model_type
    except OSError as error:
        raise ValueError(f"no model could be loaded from {path!r}: {error}") from error
    load = load_llama_kivi if family.startswith("llama") else load_qwen_kivi
    model, tokenizer = load(path, dtype=getattr(torch, dtype))
    return model.to(device).eval(), tokenizer


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


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
) -> QualityResult:
    """Measure with a progress bar."""
    ids = encode(tokenizer, load_text(text), tokens, text)
    total = -(-tokens // chunk) * (len(candidates) + 1)
    with _progress(console) as bar:
        task = bar.add_task("", total=total)
        return measure_quality(
            model,
            ids,
            candidates,
            chunk=chunk,
            skip=skip,
            model_name=model_name,
            text_name=text,
            progress=lambda name: bar.update(task, advance=1, description=name),
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
) -> PasskeyResult:
    """Measure with a progress bar."""
    with _progress(console) as bar:
        task = bar.add_task("", total=sum(lengths) * len(depths_of(depths)) * (len(candidates) + 1))
        return measure_passkey(
            model,
            tokenizer,
            load_text(filler),
            candidates,
            lengths=lengths,
            depths=depths,
            chunk=chunk,
            model_name=model_name,
            filler_name=filler,
            progress=lambda name, tokens: bar.update(task, advance=tokens, description=name),
        )


def run_layers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, console: Console, text: str, tokens: int = TOKENS
) -> LayerCosts:
    """Measure every layer alone, with a progress bar."""
    ids = encode(tokenizer, load_text(text), tokens, text)
    total = -(-tokens // CHUNK) * (2 * model.config.num_hidden_layers + 1)
    with _progress(console) as bar:
        task = bar.add_task("", total=total)
        return measure_layers(model, ids, progress=lambda name: bar.update(task, advance=1, description=name))


def _candidates(args: argparse.Namespace) -> list[Candidate]:
    chosen = [parse_options(text) for text in args.options] if args.options else CANDIDATE_SETS[args.set]()
    return chosen + (peers() if args.peers else [])


def _quality(args: argparse.Namespace, console: Console) -> None:
    candidates = _candidates(args)
    load_text(args.text)  # a mistake here should not wait for the model
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    name = Path(args.model).name
    result = run_quality(
        model,
        tokenizer,
        candidates,
        console=console,
        model_name=name,
        text=args.text,
        tokens=args.tokens,
        chunk=args.chunk,
        skip=args.skip,
    )
    _show(result, args.output)


def _passkey(args: argparse.Namespace, console: Console) -> None:
    candidates = _candidates(args)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    result = run_passkey(
        model,
        tokenizer,
        candidates,
        console=console,
        model_name=Path(args.model).name,
        filler=args.filler,
        lengths=args.lengths,
        depths=args.depths,
        chunk=args.chunk,
    )
    _show(result, args.output)


def _layers(args: argparse.Namespace, console: Console) -> None:
    load_text(args.text)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    costs = run_layers(model, tokenizer, console=console, text=args.text, tokens=args.tokens)
    chosen = choose_bits(costs, args.extra)
    print_table(layer_rows(costs, chosen), f"{Path(args.model).name}: KL with 2 bits in one layer alone", Console())
    print(",".join(f"{side}={'/'.join(map(str, bits))}" for side, bits in chosen.items()))


def _show(result: QualityResult | PasskeyResult, output: str | None) -> None:
    console = Console()
    if isinstance(result, QualityResult):
        print_table(quality_rows(result), f"{result.model}, {result.text}, {result.tokens} tokens", console)
    else:
        print_table(passkey_rows([result]), f"{result.model}: keys found", console)
        for name, note in result.notes.items():
            console.print(f"{name}: {note}")
    if output:
        save_result(result, output)
        console.print(f"written: {output}")


def _report(args: argparse.Namespace, console: Console) -> None:
    if args.measure:
        measure_steps(steps(args.measure), models_folder(args.models), Path(args.results), args, console)
    for path in write_report(args.results, args.output):
        Console().print(f"written: {path}")


def measure_steps(wanted: list[Step], models: Path, results: Path, args: argparse.Namespace, console: Console) -> None:
    """Measure steps of the plan and save each; peers' rows of an earlier run are kept where nothing has changed."""
    loaded: dict[str, Any] = {}
    for step in wanted:
        console.rule(step.name)
        if step.model not in loaded:
            loaded = {step.model: load_model(str(models / step.model), args.dtype, args.device)}  # one at a time
        path = results / step.file
        if step.lengths:
            model, tokenizer = loaded[step.model]
            result: Any = run_passkey(
                model,
                tokenizer,
                short_candidates()[:1],
                console=console,
                model_name=step.model,
                filler=step.text,
                lengths=list(step.lengths),
            )
        else:
            result = _measure_step(step, loaded[step.model], load_result(path) if path.exists() else None, console)
        _show(result, str(path))


def _measure_step(step: Step, loaded: Any, earlier: Any, console: Console) -> QualityResult:
    own = CANDIDATE_SETS[step.candidates]()
    if step.calibration:
        costs = run_layers(*loaded, console=console, text=step.calibration)
        own.append(kivi(f"4 bits in some layers, by {step.calibration}", choose_bits(costs)))

    def measure(candidates: list[Candidate]) -> QualityResult:
        model, tokenizer = loaded
        return run_quality(
            model, tokenizer, candidates, console=console, model_name=step.model, text=step.text, tokens=step.tokens
        )

    result = keep_peers(measure(own), earlier)
    missing = [peer for peer in peers() if step.peers and all(row.name != peer.name for row in result.rows)]
    return keep_peers(result, measure(missing)) if missing else result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modules.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    caches = argparse.ArgumentParser(add_help=False)
    caches.add_argument("--model", required=True, help="a folder or a name on the hub (Llama, Qwen2, Qwen3)")
    caches.add_argument(
        "--options", action="append", metavar="NAME=VALUE,…", help="a KIVI cache; may be repeated, 'name: …' names it"
    )
    caches.add_argument("--chunk", type=int, default=CHUNK, help="tokens that go through the cache at once")
    caches.add_argument("--output", metavar="FILE", help="write the result as JSON")

    quality = commands.add_parser(
        "quality", parents=[model, caches], help="perplexity, KL and top-1 of caches side by side"
    )
    quality.add_argument("--text", default="prose", help="prose, code, a file, or hub:dataset:config:split:column")
    quality.add_argument("--tokens", type=int, default=3072)
    quality.add_argument("--skip", type=int, default=SKIP, help="tokens before the first measured prediction")
    quality.add_argument(
        "--set", choices=sorted(CANDIDATE_SETS), default="main", help="caches, where no --options are given"
    )
    quality.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="transformers' own quantized caches too"
    )
    quality.set_defaults(run=_quality)

    passkey = commands.add_parser("passkey", parents=[model, caches], help="is a key in a long prompt found?")
    passkey.add_argument("--filler", default="prose", help="as --text")
    passkey.add_argument("--lengths", type=int, nargs="+", default=[2000], help="of the prompts, in tokens")
    passkey.add_argument("--depths", type=int, default=5, help="places of the key")
    passkey.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=False, help="transformers' own quantized caches too"
    )
    passkey.set_defaults(run=_passkey, set="short")

    layers = commands.add_parser(
        "layers", parents=[model], help="k_bits and v_bits, an entry a layer, by what each layer costs alone"
    )
    layers.add_argument("--model", required=True, help="a folder or a name on the hub (Llama, Qwen2, Qwen3)")
    layers.add_argument("--text", default="prose", help="prose, code, a file, or hub:dataset:config:split:column")
    layers.add_argument("--tokens", type=int, default=TOKENS)
    layers.add_argument(
        "--extra",
        type=float,
        default=EXTRA_BITS,
        help="stored bits an element may take beyond 2 bits everywhere, on average",
    )
    layers.set_defaults(run=_layers)

    report = commands.add_parser("report", parents=[model], help="docs/quality.md and its plot from the results")
    report.add_argument(
        "--measure", nargs="+", metavar="STEP", help="measure first: 'all', or some of the page's measurements"
    )
    report.add_argument(
        "--models", help="folder of the models of the page; default: $KIVI_MODELS or ~/.cache/kivi-models"
    )
    report.add_argument("--results", default=RESULTS, help="folder of quality*.json")
    report.add_argument("--output", default=REPORT)
    report.set_defaults(run=_report)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after a mistake that a message explains."""
    args = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        args.run(args, console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
