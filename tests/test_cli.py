"""Command lines from dataclasses: every option of the cache is a flag, and a mistake is named before any work."""

import dataclasses
import pathlib
import subprocess
import sys
import venv

import demos
import pytest
import quickstart

from modules.cli import command
from modules.cli.benchmark.flags import Benchmark
from modules.cli.command import argument, group, parse, plain_help
from modules.cli.folder import DEFAULT, VARIABLE, models_folder
from modules.cli.generate.flags import Generate
from modules.cli.memory.flags import Memory
from modules.cli.table import options_table
from modules.evaluation import __main__ as evaluation
from modules.options import KIVIOptions

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = [
    quickstart.Quickstart,
    demos.Example,
    evaluation.Quality,
    evaluation.Passkey,
    evaluation.Layers,
    Memory,
    Generate,
    Benchmark,
]
GIVEN = {
    "k_bits": [4, 2, 16],
    "v_bits": 8,
    "group_size": 16,
    "residual_length": 64,
    "use_kivi": False,
    "sink_length": 0,
    "k_range": "minmax",
    "v_range": "clipped",
    "wide_channels": 0.5,
    "v_rotation": True,
    "v_group_size": 64,
    "metadata_bits": 8,
    "backend": "torch",
    "exact_products": True,
}


def flags(options: dict) -> list[str]:
    """As they are typed."""
    parts = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name in ("use_kivi", "exact_products"):
            parts.append(f"--{'' if value else 'no-'}{flag}")
        else:
            parts += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def required(which: type) -> list[str]:
    """What must be given, and something to do for a command that would look for it on stdin."""
    given = ["--prompt", "x"] if which is Generate else []
    for field in dataclasses.fields(which):
        if field.name == "model" and field.default is dataclasses.MISSING:
            given = ["m", *given] if field.metadata["positional"] else ["--model", "m", *given]
    return given


@pytest.mark.parametrize("which", COMMANDS)
def test_every_option_is_a_flag_of_every_command(which):
    assert set(GIVEN) == set(KIVIOptions.names())
    assert parse(which, [*required(which), *flags(GIVEN)], description="").cache == KIVIOptions(**GIVEN)
    assert parse(which, required(which), description="").cache == KIVIOptions()


@pytest.mark.parametrize("which", COMMANDS)
def test_help_has_what_the_options_say(which, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(which, ["--help"], description="What it does.")
    assert ended.value.code == 0
    for text in (capsys.readouterr().out, plain_help(which, "What it does.")):
        words = " ".join(text.replace("│", " ").split())
        assert "What it does." in words
        for field in dataclasses.fields(KIVIOptions):
            assert f"--{field.name.replace('_', '-')}" in words
            assert f"{field.metadata['help']} (default: {field.default})" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k-bits", "3"], "'3'"),
        (["--residual-length", "100"], "group_size must divide residual_length"),
        (["--sink-length", "-1"], "sink_length must be"),
        (["--wide-channels", "2"], "wide_channels must be a share"),
        (["--wide-channels", "0", "0.5", "-1"], "a list of them, or None; got -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more; got 0"),
        (["--threads", "-1"], "--threads must be 1 or more; got -1"),
        (["--kbits", "2"], "--kbits"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(quickstart.Quickstart, arguments, description="")
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_lists_choices_and_groups():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Command:
        shapes: tuple[str, ...] = argument(("a",), "which", ("a", "b"))
        lengths: tuple[int, ...] = argument((5,), "how long")
        cache: KIVIOptions = group(KIVIOptions)

    parsed = parse(Command, ["--shapes", "b", "a", "--lengths", "1", "2", "--k-bits", "4"], description="")
    assert (parsed.shapes, parsed.lengths, parsed.cache.k_bits) == (("b", "a"), (1, 2), 4)
    with pytest.raises(SystemExit):
        parse(Command, ["--shapes", "c"], description="")
    names = [flag for flag, _ in command.flags(Command)]
    assert names[:3] == ["--shapes", "--lengths", "--k-bits"] and "--use-kivi, --no-use-kivi" in names


def test_help_needs_nothing_installed(tmp_path):
    """In an environment without any package; a run there says what to install."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    for script in ("start.py", "examples/quickstart.py", "examples/example_llama_kivi.py"):
        arguments = ["demo", "--help"] if script == "start.py" else ["--help"]
        done = subprocess.run([python, ROOT / script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and "--k-bits" in done.stdout and "--prompt" in done.stdout, done.stderr
    done = subprocess.run([python, ROOT / "examples/quickstart.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install" in done.stderr and "Traceback" not in done.stderr


def test_the_page_has_the_table_of_the_options():
    assert options_table() in (ROOT / "docs" / "choosing-options.md").read_text(), (
        "python -m modules.cli.table prints the table"
    )


def test_where_models_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert models_folder() == tmp_path and models_folder("/other") == pathlib.Path("/other")
    monkeypatch.delenv(VARIABLE)
    assert models_folder() == pathlib.Path(DEFAULT).expanduser()
