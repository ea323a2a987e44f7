"""The shape of the code: imports point down, a decode step climbs nowhere back up, and the pages on it are true.

The pages are docs/architecture.md and docs/extending.md; a block of Python in the latter whose first line is a comment with a
path is run as that file.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import itertools
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pages
import pytest
import torch
from conftest import make_pair, relative_error, tokens
from decoders import decoder
from pages import DOCS, ROOT
from transformers import DynamicCache

from modules import options
from modules.codecs.codec import Codec
from modules.codecs.grouped import pack_codes, pack_low_codes
from modules.codecs.kivi import codecs_of
from modules.kernels import registry
from modules.kernels.backend import Backend
from modules.kernels.registry import Entry
from modules.kivi_cache_general import KIVICache
from modules.models import families
from modules.models.families import Family
from modules.options import KIVIOptions
from modules.store.layer import PackedLayer
from modules.store.ledger import Geometry, Ledger
from modules.store.step import Step

PAGE, ADDING = DOCS / "architecture.md", DOCS / "extending.md"

LAYERS = (  # from the ground up; what stands in one line may import its like
    ("options", "files"),
    ("codecs",),
    ("store",),
    ("kernels",),
    ("cache",),
    ("kivi_cache_general",),
    ("models",),
    ("modeling_llama_kivi", "modeling_qwen_kivi"),
    ("calibration", "evaluation", "cli"),
    ("serving",),
)
RANKS = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
RANKS[""] = len(LAYERS)  # `modules` itself, which names what most people need and imports it when it is asked for
BELOW_TRANSFORMERS = RANKS["kernels"]  # this rank and those below import no transformers
# of the evaluation, the benchmark, the plots and the command lines; another method's package; what Windows does not have
OPTIONAL = ("datasets", "matplotlib", "torchao", "tyro", "tiny_turboquant", "resource")
HOMES = {"triton": "modules.kernels.triton", "numba": "modules.kernels.numba"}


# imports


class Import(NamedTuple):
    """An import: of what, in which line, and whether within a function."""

    target: str
    line: int
    in_function: bool


@functools.cache
def sources() -> dict[str, Path]:
    """The files of the library, by the names of their modules."""
    files = [*ROOT.glob("modules/**/*.py"), *ROOT.glob("modeling_*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports_of(name: str) -> list[Import]:
    """Every import of a module, those under `TYPE_CHECKING` too; `from package import module` is one of the module."""
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}, line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(Import(inner if inner in sources() else node.module, node.lineno, in_function))
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(sources()[name].read_text()), False)
    return found


def all_imports() -> Iterator[tuple[str, Import]]:
    return ((name, found) for name in sources() for found in imports_of(name))


def package_of(name: str) -> str:
    """The package of ours that a module is in: a key of `RANKS`."""
    return name.removeprefix("modules").removeprefix(".").split(".")[0]


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def lines_of(wrong: list[tuple[str, Import]]) -> list[str]:
    return [f"{name}, line {found.line}: {found.target}" for name, found in wrong]


def test_every_package_has_its_layer():
    assert {package_of(name) for name in sources()} <= set(RANKS)


def test_imports_point_down():
    ours = [(name, found) for name, found in all_imports() if found.target in sources()]
    assert len(ours) > len(sources())  # there are some to look at
    upward = [(n, f) for n, f in ours if RANKS[package_of(f.target)] > RANKS[package_of(n)]]
    assert not lines_of(upward)


def test_imports_run_in_no_circle():
    graph = {name: {found.target for found in imports_of(name)} & set(sources()) for name in sources()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names it


def test_no_import_hides_in_a_function():
    """But for packages that a user of the cache need not have."""
    hidden = [(name, found) for name, found in all_imports() if found.in_function]
    assert not lines_of([(name, found) for name, found in hidden if found.target.split(".")[0] not in OPTIONAL])


def test_few_import_by_name():
    """Backends, as their packages are optional, the commands of `kivi`, whose help needs no torch, and what `modules` names."""
    importers = ("import_module", "__import__")
    found = set()
    for name, file in sources().items():
        for node in ast.walk(ast.parse(file.read_text())):
            called = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
            if called in importers:
                found.add(name)
    assert found == {"modules", "modules.kernels.registry", "modules.cli.__main__"}


@pytest.mark.parametrize("package,home", HOMES.items())
def test_only_its_backend_imports_a_compiler(package, home):
    importers = [(name, found) for name, found in all_imports() if is_within(found.target, package)]
    assert importers
    assert not lines_of([(name, found) for name, found in importers if not is_within(name, home)])


def test_kernels_and_what_is_below_do_not_know_transformers():
    importers = [(name, found) for name, found in all_imports() if is_within(found.target, "transformers")]
    assert importers
    low = [(name, found) for name, found in importers if RANKS[package_of(name)] <= BELOW_TRANSFORMERS]
    assert not lines_of(low)


# a decode step


class Call(NamedTuple):
    """A call of a function of ours: `file · function`, its package, and the package of the nearest caller of ours."""

    function: str
    package: str
    caller: str | None


def our_package(frame: types.FrameType) -> str | None:
    path = frame.f_code.co_filename
    if not path.startswith(f"{ROOT}{os.sep}m"):
        return None
    return Path(path).relative_to(ROOT).with_suffix("").parts[path.startswith(f"{ROOT / 'modules'}{os.sep}")]


def calls_of(function) -> list[Call]:
    """The calls of functions of ours in a call of `function`, in order."""
    calls: list[Call] = []

    def note(frame: types.FrameType, event: str, _: object) -> None:
        package = our_package(frame) if event == "call" else None
        if package is None:
            return
        above = frame.f_back
        while above is not None and our_package(above) is None:
            above = above.f_back
        name = frame.f_code.co_qualname.replace(".<locals>", "")
        path = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
        calls.append(Call(f"`{path}` · `{name}`", package, None if above is None else our_package(above)))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture(scope="module")
def packing_step() -> list[Call]:
    """The calls of a decode step that packs a group, with the backend "torch"."""
    _, model = make_pair("llama", backend="torch")
    cache, ids = model.create_kivi_cache(wide_channels=0), tokens(1, 200)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        for token in ids[:, 100:].split(1, dim=1):
            if cache.ledger.packs(0, 1):
                return calls_of(functools.partial(model, token, past_key_values=cache))
            model(token, past_key_values=cache)
    raise AssertionError("no step packed a group")


@pytest.mark.parametrize("attends", ["over codes", "over rebuilt states"])
def test_a_decode_step_climbs_nowhere_back_up(packing_step, attends):
    calls = packing_step
    if attends == "over rebuilt states":
        stock, _ = make_pair("llama")
        cache, ids = KIVICache(stock.config, group_size=16, residual_length=32, backend="torch"), tokens(1, 101)
        with torch.no_grad():
            stock(ids[:, :100], past_key_values=cache)
            calls = calls_of(functools.partial(stock, ids[:, 100:], past_key_values=cache))
    assert {call.package for call in calls} >= {"cache", "kernels", "store", "codecs"}
    climbs = [call for call in calls if call.caller is not None and RANKS[call.package] > RANKS[call.caller]]
    assert not climbs


def test_the_page_follows_a_decode_step(packing_step):
    """Each function that the page lists is called, in that order."""
    section = PAGE.read_text().split("\n## A decode step\n")[1].split("\n## ")[0]
    listed = re.findall(r"^ *- (`[^`]+` · `[^`]+`)", section, flags=re.MULTILINE)
    assert len(listed) > 15
    rest = iter(call.function for call in packing_step)
    missing = next((function for function in listed if function not in rest), None)
    assert missing is None, f"{missing} is not called there"


# what the page says otherwise


@functools.cache
def blocks() -> dict[str, str]:
    """The blocks of Python of the page on adding to it, by their first line without its hash."""
    split = (block.code.split("\n", 1) for block in pages.blocks(ADDING, "python"))
    return {first.removeprefix("# "): rest for first, rest in split}


def test_every_path_on_the_pages_is_there():
    added = {first.split(",")[0] for first in blocks()}
    text = PAGE.read_text() + ADDING.read_text()
    named = set(re.findall(r"`((?:modules|tests|docs)/[\w/.]*)`", text))
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists() and path not in added] == []


def test_the_numbers_of_the_drawing():
    geometry = Geometry(group_size=32, residual_length=128, sink_length=4)
    assert geometry.packed_after(200, 0) == 64
    assert geometry.ring == 160
    slots = itertools.chain(*(range(slot.start, slot.stop) for slot in geometry.window_slots(200, 64)))
    assert list(slots) == [token % 160 for token in range(64, 196)]


def test_the_bytes_of_the_drawings():
    """A channel lies in the byte and plane that the page gives it; low bits of wide ones lie four neighbours a byte."""
    for channel in (0, 1, 33, 64, 97, 127):
        packed = pack_codes(torch.eye(128, dtype=torch.uint8)[channel], 2)
        assert packed.nonzero().item() == channel % 32
        assert packed.max() == 1 << 2 * (channel // 32)
    for place in (0, 1, 6, 31):
        extra = pack_low_codes(torch.eye(32, dtype=torch.uint8)[place])
        assert extra.nonzero().item() == place // 4
        assert extra.max() == 1 << 2 * (place % 4)


def run_block(path: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A file of the page as a module that can be imported."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(blocks()[path], f"{ADDING.name}: {path}", "exec"), vars(module))
    return module


def filled(codecs: tuple[Codec, Codec], lengths: list[int], rotates: bool = False) -> tuple[PackedLayer, list]:
    """A layer that holds `lengths[b]` random tokens of sequence `b` and the states it was given, values rotated."""
    torch.manual_seed(0)
    states = [torch.randn(len(lengths), 2, max(lengths), 64) for _ in "kv"]
    layer = PackedLayer.empty(states[0], codecs, Ledger(Geometry(16, 32, 4)), rotates)
    layer.ledger.clear([0] * len(lengths))
    step = Step.of_lengths(lengths, max(lengths))
    layer.make_room(step)
    registry.backend("torch").append(layer, *states, step)
    layer.ledger.commit(step)
    return layer, states


def attend(backend: Backend, layer: PackedLayer, new: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a backend gives for `new` random tokens, and their queries, keys and values."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(layer.batch_size, heads, new, 64) for heads in (6, 2, 2))
    return backend.attend(query, key, value, layer, 0.125, Step.of(None, layer.batch_size, new)), [query, key, value]


@pytest.fixture
def rebuilt(monkeypatch) -> Iterator[Backend]:
    """The backend of the page, registered."""
    run_block("modules/kernels/rebuilt/__init__.py", monkeypatch)
    line = eval("{" + blocks()["modules/kernels/registry.py, in REGISTRY"] + "}", {"Entry": Entry})
    monkeypatch.setitem(registry.REGISTRY, *next(iter(line.items())))
    for module in (options, registry):
        monkeypatch.setattr(module, "ALLOWED_BACKENDS", (*options.ALLOWED_BACKENDS, "rebuilt"))
    registry.backend.cache_clear()
    yield registry.backend("rebuilt")
    registry.backend.cache_clear()


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("bits", [(2, 2), (4, 8), (16, 16)])
def test_a_new_backend_attends(rebuilt, bits, new):
    chosen = KIVIOptions(group_size=16, residual_length=32)
    layer, _ = filled(codecs_of(chosen, bits, 64), [100, 57, 100], chosen.rotates_values(bits[1]))
    out, _ = attend(rebuilt, layer, new)
    expected, _ = attend(registry.backend("torch"), layer, new)
    assert relative_error(out, expected) < 1e-5


def test_a_new_backend_is_an_option_of_a_model(rebuilt, pair):
    _, model = pair
    pieces = tokens(2, 160).split([100, *[1] * 50, 10], dim=1)
    outputs = []
    for name in ("rebuilt", "torch"):
        cache = model.create_kivi_cache(backend=name)
        with torch.no_grad():
            outputs.append(torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1))
        assert cache.get_cache_info()["backend"] == name
    assert relative_error(*outputs) < 1e-5


def test_a_new_family_runs_over_its_cache(monkeypatch, tmp_path):
    """Exact at 16 bits, and over the codes as over the states rebuilt from them, in decode steps past two flushes."""
    row = eval("(" + blocks()["modules/models/families.py, in FAMILIES"] + ")", {"Family": Family})[0]
    monkeypatch.setitem(families.FAMILIES, row.model_type, row)
    granite = run_block("modeling_granite_kivi.py", monkeypatch)
    stock = decoder("granite")
    stock.save_pretrained(tmp_path)
    small = {"group_size": 16, "residual_length": 32, "wide_channels": 0}  # a stock model has no queries to choose by
    model = granite.GraniteForCausalLM_KIVI.from_pretrained(tmp_path, backend="torch", **small).eval()
    pieces = tokens(2, 150).split([100, *[1] * 40, 10], dim=1)

    def run(model, cache):
        with torch.no_grad():
            return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)

    exact = run(stock, DynamicCache(config=stock.config))
    assert relative_error(run(model, model.create_kivi_cache(k_bits=16, v_bits=16)), exact) < 1e-5
    over_codes = run(model, model.create_kivi_cache())
    assert relative_error(over_codes, run(stock, KIVICache(stock.config, **small))) < 1e-5
    assert relative_error(over_codes, exact) > 1e-3  # it did quantize


def test_a_new_codec_is_stored_and_attended(monkeypatch, rebuilt):
    fixed = run_block("modules/codecs/fixed8.py", monkeypatch).Fixed8Codec(0.05, group_size=16)
    layer, states = filled((fixed, fixed), [100, 84])
    assert layer.packed == [64, 48] and layer.key.codes.dtype == torch.int8
    for name in ("torch", "numba"):  # whose kernels would read these bytes as others
        with pytest.raises(ValueError, match="layout fixed8"):
            registry.pick_backend(name, layer)
    for row, length in enumerate(layer.lengths):
        for side, given in zip(layer.sides, states):
            read = layer.read(side, slice(row, row + 1), torch.float32)
            difference = (read - given[row : row + 1, :, :length]).abs()
            assert difference[:, :, 4 : 4 + layer.packed[row]].max() <= 0.05 / 2 * 1.001
            assert difference.max() > 0 and not difference[:, :, 4 + layer.packed[row] :].any()

    out, (query, *new) = attend(rebuilt, layer, 1)
    for row, length in enumerate(layer.lengths):
        keys, values = (
            torch.cat([past[row, :, :length], now[row]], dim=1).double().repeat_interleave(3, dim=0)
            for past, now in zip(states, new)
        )
        weights = (query[row].double() @ keys.transpose(1, 2) * 0.125).softmax(-1)
        assert relative_error(out[row].transpose(0, 1), weights @ values) < 0.02
    with pytest.raises(ValueError, match="keys reach 7"):
        layer.check_states(torch.full((2, 2, 1, 64), 7.0), new[1])
