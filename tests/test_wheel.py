"""The wheel: built, installed into an empty environment, and used from another folder."""

import pathlib
import re
import shutil
import subprocess
import sys
import venv

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "results", ".*_cache")

USE = """
import importlib, pathlib, pkgutil, sys
import torch
import modeling_llama_kivi, modeling_qwen_kivi, modules

installed = pathlib.Path(sys.argv[1])
for module in (modeling_llama_kivi, modeling_qwen_kivi, modules):
    assert installed in pathlib.Path(module.__file__).parents, module.__file__
for entry in pkgutil.walk_packages(modules.__path__, "modules."):
    if not entry.name.endswith("__main__"):
        importlib.import_module(entry.name)

from modules.evaluation import pages, report
assert report.TEMPLATE.is_file(), report.TEMPLATE

torch.manual_seed(0)
sizes = dict(vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, pad_token_id=0, eos_token_id=None)
config = modeling_llama_kivi.LlamaKIVIConfig(**sizes, k_bits=2, v_bits=2, group_size=16, residual_length=32)
model = modeling_llama_kivi.LlamaForCausalLM_KIVI(config).eval()
cache = model.create_kivi_cache()
ids = torch.randint(3, 131, (1, 80))
out = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
info = cache.get_cache_info()
assert out.shape == (1, 100) and info["tokens"]["packed"] >= 48, info
print("generated", out.shape[1] - ids.shape[1], "with", info["backend"])
"""


def run(*command: object, where: pathlib.Path) -> str:
    """A command's output; what it printed is in the failure."""
    done = subprocess.run([str(part) for part in command], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, so that neither an earlier build gets into it nor this one into the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "-w", folder, folder / "source", where=folder)
    return next(folder.glob("*.whl"))


def test_a_wheel_works_without_this_folder(wheel, tmp_path):
    """The project comes from the wheel alone; what it depends on is lent from the environment of the tests."""
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    packages = pathlib.Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", where=tmp_path).strip()
    )
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    run(*pip, wheel, where=tmp_path)
    lent = [path for path in sys.path if pathlib.Path(path).name in ("site-packages", "dist-packages")]
    (packages / "lent.pth").write_text("\n".join(lent))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "use.py").write_text(USE)
    assert "generated 20" in run(python, "use.py", packages, where=elsewhere)
    assert "30 layers" in run(python.parent / "kivi", "memory", "smollm2-135m", where=elsewhere)


def test_the_wheel_says_what_it_needs(wheel, tmp_path):
    """Its metadata are those of pyproject.toml: what a user's pip installs beside it."""
    shutil.unpack_archive(wheel, tmp_path, "zip")
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {re.match(r"Requires-Dist: ([\w-]+)", line)[1] for line in needed} == {
        "torch", "transformers", "triton", "numba", "accelerate", "sentencepiece", "safetensors", "tyro", "rich",
        "PyYAML", "pydantic",
    }  # fmt: skip
    assert "Provides-Extra: flash" in metadata and "Requires-Python: <3.13,>=3.11" in metadata
