"""The Numba backend in forked processes, in several threads, and where compiled code cannot be kept: each in a process of
its own, which a crash would end."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="Numba is not installed: `pip install numba` to test its kernels")

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = ["omp", "workqueue"]

PRELUDE = """
import os, sys, threading
import torch
from layers import attend_and_store, backend_named, empty_layer, make_layer, random_states, relative_error
from modules.kernels.numba import threads
from modules.store.step import Step
from numba.np.ufunc import parallel

NUMBA, TORCH = backend_named("numba"), backend_named("torch")
ONE = Step.of(None, 1, 1)

def past(tokens=3000):
    # as little as needs several threads
    layer = make_layer([tokens], head_dim=128, kv_heads=2, exact_products=True)
    query, _ = random_states((1, 8, 1, 128))
    return layer, (query, *random_states((1, 2, 1, 128), seed=1))

def attended(layer, states):
    return NUMBA.attend(*states, layer, 0.1, ONE)

def in_child(work):
    # what `work` says there; a signal that ended it raises here
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = str(work())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child ended with status {status}"
    return os.read(reader, 10000).decode()
"""


def run(code, root=ROOT, **variables):
    """The process that runs `code` after `PRELUDE`, with NUMBA_NUM_THREADS=2 unless `variables` say else."""
    path = os.pathsep.join([str(root), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_NUM_THREADS": "2", **variables}
    command = [sys.executable, "-c", PRELUDE + code]  # which looks for modules in its folder first
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_one_thread_never_starts_the_pool_and_survives_a_fork():
    run("""
torch.set_num_threads(1)
layer, states = past()
ref = TORCH.attend(*states, layer, 0.1, ONE)
assert relative_error(attended(layer, states), ref) < 1e-5
NUMBA.decode(*states, layer, 0.1)
NUMBA.pack(layer.key, slice(0, 1), 0, random_states((1, 2, 1024, 128))[0])
assert not parallel._is_initialized
""")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_fork_after_threads_ran(layer):
    """With one thread the child runs; with more it is told what to do, and is not killed."""
    run(
        """
torch.set_num_threads(2)
layer, states = past()
ref = attended(layer, states)
assert parallel._is_initialized

def serial():
    torch.set_num_threads(1)
    return relative_error(attended(layer, states), ref) < 1e-5

before = layer.key.window.clone()

def step():
    try:
        NUMBA.decode(*states, layer, 0.1)
    except RuntimeError as error:
        torch.set_num_threads(1)
        return f"{torch.equal(before, layer.key.window)} {error}"

assert in_child(serial) == "True"
assert "RuntimeError: this process was forked" in in_child(lambda: attended(layer, states))
assert "torch.set_num_threads(1)" in in_child(lambda: in_child(lambda: attended(layer, states)))
assert in_child(step).startswith("True this process was forked")
assert relative_error(attended(layer, states), ref) < 1e-6  # the parent goes on
""",
        NUMBA_THREADING_LAYER=layer,
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_two_python_threads_attend_at_once(layer):
    run(
        """
torch.set_num_threads(2)
layer, states = past()
ref, errors = attended(layer, states), []

def work():
    torch.set_num_threads(2)
    errors.extend(relative_error(attended(layer, states), ref) for _ in range(300))

workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert parallel._is_initialized and len(errors) == 600 and max(errors) < 1e-5
""",
        NUMBA_THREADING_LAYER=layer,
    )


def test_torch_keeps_its_number_of_threads():
    """Numba's pool tells OpenMP, which torch shares, to use all of its own."""
    run(
        """
torch.set_num_threads(2)
layer, states = past()
attended(layer, states)
assert parallel._is_initialized and torch.get_num_threads() == 2
assert threads.allowed_threads() == 2
""",
        NUMBA_NUM_THREADS="4",
        NUMBA_THREADING_LAYER="omp",
    )


PACK = """
torch.set_num_threads(1)

def packed(name):
    layer = empty_layer(1, v_range="clipped", residual_length=0)
    layer.value.grow(32)
    backend_named(name).pack(layer.value, slice(0, 1), 0, random_states((1, 2, 32, 64))[1])
    return layer.value.read(slice(0, 1), 0, 32, torch.float32)

assert relative_error(packed("numba"), packed("torch")) < 1e-3
"""


def test_compiling_is_said_once_and_kept_on_disk(tmp_path):
    first, second = (run(PACK, NUMBA_CACHE_DIR=str(tmp_path)).stderr for _ in range(2))
    assert first.count("KIVI compiles packing") == first.count("KIVI compiled it in") == 1
    assert "KIVI compile" not in second


@pytest.mark.parametrize(
    "spoil",
    [
        "caching.CacheImpl._locator_classes = []",
        "caching.IndexDataCacheFile.save = lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device'))",
    ],
)
def test_where_nothing_can_be_kept_on_disk_it_warns_once_and_goes_on(spoil, tmp_path):
    done = run(
        f"""
import warnings
from numba.core import caching
{spoil}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {PACK.strip().replace(chr(10), chr(10) + "    ")}
    layer = make_layer([200], backend="numba")
assert len([w for w in caught if "NUMBA_CACHE_DIR" in str(w.message)]) == 1, [str(w.message) for w in caught]
""",
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert "KIVI compiles packing" in done.stderr


def test_constants_of_other_files_are_part_of_what_is_kept(tmp_path):
    """A kernel on disk must not outlive a change of `CLIPPED`."""
    shutil.copytree(ROOT / "modules", tmp_path / "modules", ignore=shutil.ignore_patterns("__pycache__"))
    run(PACK, root=tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    source = tmp_path / "modules/codecs/grouped.py"
    text = source.read_text()
    assert "CLIPPED = 0.85" in text
    source.write_text(text.replace("CLIPPED = 0.85", "CLIPPED = 0.5"))
    run(PACK, root=tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
