"""Run the notebooks from their text and write them with their outputs:

    python examples/run_notebooks.py                      both
    python examples/run_notebooks.py kv_cache_lesson      one

A notebook is edited as text, `examples/NAME.py`; `examples/NAME.ipynb` is made from it. Needs `pip install '.[notebooks]'`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
NAMES = ("kv_cache_lesson", "quantized_cache_tour")
SECONDS = 900  # a cell may take, on a slow machine


def notebook_of(name: str) -> NotebookNode:
    """The notebook as its text has it, without outputs; cells are numbered, so that it is the same each time."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run all cells in a new kernel, in the folder of the examples.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell fails.
    """
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # else it warns that it talks over TCP
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _move_warnings(cell)
    notebook.metadata.pop("language_info", None)  # the version of the Python that ran it is printed by the notebook
    return notebook


def _move_warnings(cell: NotebookNode) -> None:
    """What libraries say on stderr goes to ours: it is of this machine's packages, and no part of the lesson."""
    for output in [output for output in cell.outputs if output.get("name") == "stderr"]:
        print(output.text, file=sys.stderr, end="")
        cell.outputs.remove(output)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; none: all")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no notebook {unknown[0]!r}; choose from {', '.join(NAMES)}.")
    for name in arguments.names or NAMES:
        started = time.perf_counter()
        nbformat.write(execute(notebook_of(name)), FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb written after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
