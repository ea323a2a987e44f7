"""Progress bars on stderr; none where nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress(description: str, total: int | None = None, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar of `total` units, or one that only shows that time passes, while stderr is a terminal.

    Yields:
        A function that takes how much is done so far.
    """
    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), *([amount] if total else []), TimeElapsedColumn()]
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=min(done, total or done))
        if total is None:
            bar.update(task, total=1, completed=1)
