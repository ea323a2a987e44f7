"""A measurement on the terminal: its progress while it runs, then its table, and its JSON file."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modules.cli.command import flag_of
from modules.evaluation.candidates import written
from modules.evaluation.results import (
    BenchmarkResult,
    FreeResult,
    PasskeyResult,
    QualityResult,
    TasksResult,
    save_result,
)
from modules.evaluation.tables import (
    free_table,
    layer_table,
    passkey_table,
    print_table,
    quality_table,
    tasks_table,
)

Shown = QualityResult | PasskeyResult | FreeResult | TasksResult


def progress_bar(console: Console, shown: bool = True) -> Progress:
    """A bar with what is measured, how much of it is done, and the time that is left."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not shown)


def show(result: Shown, output: str | None) -> None:
    """Print a result's table, and save it where an output is given."""
    console = Console()
    if isinstance(result, QualityResult):
        print_table(quality_table(result), f"{result.model}, {result.text}, {result.tokens} tokens", console)
    elif isinstance(result, FreeResult):
        print_table(free_table(result), f"{result.model}, {result.new_tokens} tokens of its own", console)
    else:
        tasks = isinstance(result, TasksResult)
        table = tasks_table(result) if isinstance(result, TasksResult) else passkey_table([result])
        print_table(table, f"{result.model}: {'right answers' if tasks else 'keys found'}", console)
        for name, note in result.notes.items():
            console.print(f"{name}: {note}")
    if output:
        save_result(result, output)
        console.print(f"written: {output}")


def show_layers(result: BenchmarkResult, output: str | None) -> None:
    """Print what was chosen for each layer, and the options as they are typed and passed; save it where an output is given."""
    console, settings = Console(), result.settings
    title = (
        f"{settings['model']}, {settings['text']}: {settings['bits']:.2f} bits, predicted KL {settings['kl']:.4f} nats"
    )
    print_table(layer_table(result), title, console)
    options = settings["options"]
    flags = [
        f"{flag_of(name)} {' '.join(map(str, value if isinstance(value, list) else [value]))}"
        for name, value in options.items()
    ]
    passed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    for what, line in (("flags", " ".join(flags)), ("in Python", passed), ("for --options", written(options))):
        print(f"{what}:\n{line}")  # unbroken, to be copied
    if output:
        save_result(result, output)
        console.print(f"written: {output}")
