"""The notebooks: in step with their text, clean to look at, and true when they are run again."""

import json
import pathlib
import re

import nbformat
import pytest
import run_notebooks
from conftest import real_model_path

MOST_BYTES = 1_500_000
TOLERANCE = 0.35  # of a fitted exponent
FOLDERS = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|opt|usr|var|mnt|work|private)/[\w.-]+|[A-Z]:\\\\?Users")
RESULTS = {
    "kv_cache_lesson": "json.dumps(exponents)",
    "quantized_cache_tour": "json.dumps([results, stored.to_dict('records'), nano_stored.to_dict('records')])",
}
NEARLY_EQUAL = (("by token, symmetric", 3), ("KIVI", 2))  # 3.25 and 3 bits with metadata
each = pytest.mark.parametrize("name", run_notebooks.NAMES)


def written(name: str) -> nbformat.NotebookNode:
    """The notebook as it is in the folder."""
    return nbformat.read(run_notebooks.FOLDER / f"{name}.ipynb", nbformat.NO_CONVERT)


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """Nothing went wrong, nothing was said on the side, and nobody's folders are in it."""
    outputs = outputs_of(notebook)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    texts = [
        json.dumps({**o, "data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}}) for o in outputs
    ]
    assert not [found for text in texts for found in FOLDERS.findall(text)]
    assert not [text for text in texts if str(pathlib.Path.home()) in text.replace("\\\\", "\\")]


@each
def test_in_step_with_its_text(name):
    """`python examples/run_notebooks.py` makes the notebook from the text."""
    text, notebook = run_notebooks.notebook_of(name), written(name)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in text.cells]
    assert len(text.cells) > 20


@each
def test_can_be_looked_at_without_running(name):
    notebook, file = written(name), run_notebooks.FOLDER / f"{name}.ipynb"
    check_outputs(notebook)
    assert file.stat().st_size < MOST_BYTES
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    pictures = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4


def test_folders_are_noticed():
    assert FOLDERS.search("warning in /home/me/x.py") and FOLDERS.search(r"C:\\Users\\me")
    assert not FOLDERS.search("tokens/s, 1/2, and/or, https://arxiv.org/abs/2402.02750")


def run(name: str):
    """Execute a notebook in a new kernel; what it has found."""
    real_model_path("llama")
    notebook = run_notebooks.notebook_of(name)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n\nprint({RESULTS[name]})"))
    run_notebooks.execute(notebook)
    check_outputs(notebook)
    return json.loads(notebook.cells[-1].outputs[0].text)


@pytest.mark.real_model
def test_the_lesson_fits_the_exponents_of_theory():
    exponents = run("kv_cache_lesson")
    assert sorted(theory for theory, _ in exponents.values()) == [0, 1, 1, 1, 2, 2, 2, 3]
    wrong = {name: pair for name, pair in exponents.items() if not abs(pair[0] - pair[1]) <= TOLERANCE}
    assert not wrong


@pytest.mark.real_model
def test_the_tour_finds_what_it_says():
    pretended, stored, nano_stored = run("quantized_cache_tour")
    found = {(row["model"], row["scheme"], row["bits"]): row for row in pretended}
    for model in ("Llama", "nanoGPT"):
        for scheme in ("by token, symmetric", "KIVI"):
            losses = [found[model, scheme, bits]["KL"] for bits in (8, 4, 2)]
            assert losses == sorted(losses)
    at_two = [found["Llama", scheme, 2] for scheme in ("by token, symmetric", "KIVI")]
    for what in ("keys", "attention", "KL"):
        assert at_two[0][what] > 2 * at_two[1][what]

    near = {model: [found[model, *which]["KL"] for which in NEARLY_EQUAL] for model in ("Llama", "nanoGPT")}
    assert near["Llama"][0] > near["Llama"][1]
    assert near["Llama"][0] / near["Llama"][1] > 2 * near["nanoGPT"][0] / near["nanoGPT"][1]  # it has no outliers

    by_setting = {(row["setting"], row["bits"]): row for row in stored}
    for bits in (4, 2):  # at 8 the float16 of scale and minimum is as large as the step of a code
        assert by_setting["bare", bits]["KL"] == pytest.approx(found["Llama", "KIVI", bits]["KL"], rel=0.1)
    kl = [by_setting[setting, 2]["KL"] for setting in ("bare", "paper", "defaults")]
    assert kl[0] > kl[1] > 2 * kl[2]
    for row in nano_stored:
        assert row["times smaller"] == pytest.approx(32 / (row["bits"] + 1))  # a scale and a minimum for 32 elements
        assert row["KL"] == pytest.approx(row["KL, pretending"], rel=0.1)
