"""The command line: `kivi calibrate` or `python -m modules.calibration`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from modules.calibration.calibrate import calibrate
from modules.calibration.ranges import draw_ranges, range_rows, range_table
from modules.calibration.spec import load_spec
from modules.cli.command import argument, check_least, parse
from modules.codecs.static import StaticParameters
from modules.evaluation.loading import DTYPES, MODEL_HELP, load_model
from modules.evaluation.tables import print_table
from modules.evaluation.texts import load_text, pieces

DESCRIPTION = """The fixed INT8 ranges of a model's keys and values, from a YAML spec and texts.

Examples:
  kivi calibrate path/to/model --spec spec.yaml --out int8.safetensors
  kivi calibrate path/to/model --spec spec.yaml --out int8.safetensors --texts mine.txt code --count 16
  kivi calibrate path/to/model --spec spec.yaml --out int8.safetensors --plot ranges.svg --json
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate:
    """What is calibrated, on what, and where it is written."""

    model: str = argument(help=MODEL_HELP, positional=True)
    spec: str = argument(help="the YAML file that says which layers, and how")
    out: str = argument(help="the file of the parameters, safetensors")
    texts: tuple[str, ...] = argument(
        ("prose", "code"), "where the texts are from, in turn: prose, code, a file, or hub:dataset:config:split:column"
    )
    count: int = argument(8, "texts")
    tokens: int = argument(512, "of each text")
    context: int | None = argument(
        None,
        "tokens that a cache is to hold, over which the texts are spread; None: as many as the model's config allows",
    )
    plot: str | None = argument(None, "draw the ranges of all channels here, .svg or .png")
    dtype: str = argument("float32", "of the weights", DTYPES)
    device: str | None = argument(None, "as torch names it; None: a GPU where there is one")
    json: bool = argument(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        check_least(self.count, 1, "--count")
        check_least(self.tokens, 1, "--tokens")
        if self.context is not None:
            check_least(self.context, 0, "--context")
        if not self.texts:
            raise ValueError("--texts must name at least one text.")

    def run(self, console: Console) -> None:
        """Calibrate, save, and show; mistakes that can be seen before the model is loaded are."""
        spec = load_spec(self.spec)
        for text in self.texts:
            load_text(text)
        for path in filter(None, (self.out, self.plot)):
            _check_folder(Path(path))
        model, tokenizer = load_model(self.model, self.dtype, self.device)
        batches = pieces(tokenizer, self.texts, self.count, self.tokens)
        parameters = calibrate(model, spec, batches, context=self.context, progress=console.is_terminal)
        parameters.save(self.out)
        name = Path(self.model).name
        if self.plot:
            draw_ranges({name: parameters}, Path(self.plot))
        self._show(parameters, name)

    def _show(self, parameters: StaticParameters, name: str) -> None:
        rows = range_rows(parameters)
        written = [path for path in (self.out, self.plot) if path]
        if self.json:
            about = {"model": dict(parameters.model), "spec": dict(parameters.spec), "tokens": parameters.tokens}
            print(json.dumps({**about, "ranges": rows, "written": written}, indent=1))
            return
        console = Console()
        title = f"{name}: ranges of {len(rows)} layers, {parameters.tokens:,} tokens"
        print_table(range_table(rows), title, console)
        for path in written:
            console.print(f"written: {path}", markup=False, highlight=False)


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder that can be written to.")


def main(arguments: list[str] | None = None, prog: str = "python -m modules.calibration") -> int:
    """Calibrate, called as `prog`; 0, or 1 after an error that a message explains."""
    command = parse(Calibrate, arguments, description=DESCRIPTION, prog=prog)
    console = Console(stderr=True)
    try:
        command.run(console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
