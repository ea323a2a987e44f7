"""Tuned pipelines: their table, the search that makes it, and the script that runs it; with stand-ins for the GPU."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import warnings

import pytest
import torch

pytest.importorskip("triton")

import compile_report
import gpu_bench
import tune_gpu
from conftest import relative_error
from tune_gpu import Trial, Workload

from modules.evaluation.environment import Environment
from modules.evaluation.results import BenchmarkResult, save_result
from modules.kernels.triton import launch, tuning
from modules.kernels.triton.launch import Pipeline
from modules.kernels.triton.tuning import Table, Tuned

ROOT = pathlib.Path(__file__).resolve().parents[1]
GPU = "Some GPU (80 GB)"
SHAPE = launch.Shape(128, 32, 2, 2, 8, 4, 4, 160, 64, 64, k_small_metadata=True, v_small_metadata=True)
LAYOUT = tuning.layout(SHAPE, False, 2)
TUNED = Tuned(stages=4, tokens=32, warps=8, programs=3, microseconds=10.0, default_microseconds=12.5)
CUDA = torch.device("cuda")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The folders of a user and of the package, both empty, on a machine with a GPU of that name."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "OF_THE_PACKAGE", tmp_path / "package")
    monkeypatch.setattr(tuning, "device_name", lambda _: GPU)
    monkeypatch.setattr(launch, "shared_memory", lambda _: launch.SHARED_H100)
    tuning.forget()
    yield tmp_path
    tuning.forget()


def table(**changes) -> Table:
    return Table(device=GPU, kernels=tuning.kernels(), layouts={LAYOUT: TUNED}).model_copy(update=changes)


def save(tables: pathlib.Path, place: str, **changes) -> pathlib.Path:
    path = tables / place / tuning.file_name(GPU)
    tuning.save(table(**changes), path)
    return path


def test_a_table_of_the_user_goes_before_that_of_the_package(tables):
    default = launch.default_pipeline(SHAPE, False)
    assert tuning.pipeline(CUDA, SHAPE, False, 2) == default != TUNED.pipeline
    save(tables, "package", layouts={LAYOUT: TUNED.model_copy(update={"stages": 5})})
    assert tuning.pipeline(CUDA, SHAPE, False, 2) == TUNED.pipeline._replace(stages=5)
    save(tables, "user")
    assert tuning.pipeline(CUDA, SHAPE, False, 2) == TUNED.pipeline
    assert tuning.pipeline(CUDA, SHAPE, False, 4) == launch.default_pipeline(SHAPE, False, 4)  # another layout
    assert (tables / "user" / "some-gpu-80-gb.json").exists()


def test_without_a_gpu_there_is_no_table():
    assert tuning.device_name(torch.device("cpu")) is None
    tile = launch.attention_tile(SHAPE, False, tuning.pipeline(torch.device("cpu"), SHAPE, False, 2))
    assert launch.default_pipeline(SHAPE, False)[:3] == (tile.STAGES, tile.U * tile.T, tile.WARPS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "Another GPU"}, "tuned on 'Another GPU', and this is 'Some GPU"),
        ({"kernels": "0123456789ab"}, "for other kernels or another Triton \\(0123456789ab"),
    ],
)
def test_a_foreign_table_is_left_aside_with_a_warning(tables, changes, words):
    save(tables, "user", **changes)
    with pytest.warns(UserWarning, match=words):
        found = tuning.pipeline(CUDA, SHAPE, False, 2)
    assert found == launch.default_pipeline(SHAPE, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no table of tuned pipelines: Invalid JSON"),
        ("[]", "no table of tuned pipelines"),
        ('{"format": 2}', "format: Input should be 1"),
        ("stages=9", "layouts\\..*stages: Input should be less"),
        ("tokens=48", "layouts\\..*tokens: Input should be 16, 32, 64 or 128"),
        ("warps=3", "layouts\\..*warps: Input should be 1, 2, 4 or 8"),
        ("microseconds=0", "layouts\\..*microseconds"),
        ("unknown=1", "layouts\\..*unknown: Extra inputs"),
    ],
)
def test_a_damaged_table_is_left_aside_with_a_warning(tables, text, words):
    path = save(tables, "user")
    if "=" in text:
        name, _, value = text.partition("=")
        data = json.loads(path.read_text())
        data["layouts"][LAYOUT][name] = json.loads(value)
        text = json.dumps(data)
    path.write_text(text)
    tuning.forget()
    with pytest.warns(UserWarning, match=words):
        found = tuning.pipeline(CUDA, SHAPE, False, 2)
    assert found == launch.default_pipeline(SHAPE, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.pipeline(CUDA, SHAPE, False, 2)  # warned of once


def test_a_layout_names_all_that_the_default_depends_on():
    """Two shapes of one layout have one default pipeline; any other shape is of another layout."""
    others = [
        SHAPE._replace(**change)
        for change in (
            {"head_dim": 64}, {"group_size": 64}, {"k_bits": 4}, {"v_bits": 8}, {"value_group_size": 32}, {"wide": 0},
            {"static": True}, {"at_once": True}, {"k_small_metadata": False}, {"v_small_metadata": False},
        )
    ]  # fmt: skip
    layouts = [tuning.layout(shape, False, 2) for shape in (SHAPE, *others)]
    layouts += [tuning.layout(SHAPE, True, 2), tuning.layout(SHAPE, False, 4)]
    assert len(set(layouts)) == len(layouts)
    same = SHAPE._replace(kv_heads=2, group=7, sink_length=0, ring=64)
    assert tuning.layout(same, False, 2) == LAYOUT
    assert launch.default_pipeline(same, False) == launch.default_pipeline(SHAPE, False)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tables, monkeypatch):
    path = save(tables, "user")
    before = path.read_bytes()

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", no_room)
    with pytest.raises(OSError, match="No space"):
        tuning.save(table(layouts={}), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_splits_fill_the_device_as_often_as_the_pipeline_says(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda _: 132)
    tile = launch.attention_tile(SHAPE, False, launch.default_pipeline(SHAPE, False))
    splits = [launch.number_of_splits(CUDA, 8, 1 << 20, tile, side_by_side) for side_by_side in (1, 2, 4)]
    assert splits == [132 // 8, 264 // 8, 528 // 8]


# the search


def trials(pipelines: list[Pipeline]) -> list[Trial]:
    return [Trial.of("a layout", pipeline) for pipeline in pipelines]


FIRST, SECOND, THIRD = Pipeline(3, 64, 4, 2), Pipeline(2, 32, 4, 2), Pipeline(4, 32, 8, 1)
LATER = float("inf")


def test_the_default_is_tried_first_and_no_candidate_twice():
    found = tune_gpu.candidates(FIRST)
    assert found[0] == FIRST and len(set(found)) == len(found) > 10
    assert all(pipeline.warps * pipeline.programs == 8 for pipeline in found)
    assert all(Tuned(**p._asdict(), microseconds=1.0, default_microseconds=1.0).pipeline == p for p in found)


def test_the_fastest_is_chosen_and_a_tie_changes_nothing():
    assert tune_gpu.choose({FIRST: (10.0, 40.0), SECOND: (11.0, 30.0)}) == SECOND
    assert tune_gpu.choose({FIRST: (10.0, 40.0), SECOND: (9.95, 40.0)}) == FIRST  # within a hundredth
    assert tune_gpu.choose({FIRST: (10.0,), SECOND: (8.0,), THIRD: (8.01,)}) == SECOND
    assert tune_gpu.choose({FIRST: (10.0,), THIRD: (8.01,), SECOND: (8.0,)}) == THIRD


def test_the_search_leaves_out_what_fails_and_is_the_same_each_time():
    def measure(pipeline: Pipeline) -> tuple[float, ...]:
        if pipeline == SECOND:
            raise RuntimeError("out of resource: shared memory\nmore lines")
        return ((10.0 if pipeline == FIRST else 8.0) / pipeline.programs**0.5,) * 2

    results = []
    for _ in range(2):
        tried = trials([FIRST, SECOND, THIRD, THIRD._replace(stages=1)])
        tried[3].left_out = "spills 16 bytes"
        results.append((tune_gpu.search("a layout", tried, measure, LATER), tried))
    (found, tried), again = results
    assert (found, tried) == again
    assert found.pipeline == FIRST._replace(programs=8)  # it won with 2, and each further split made it faster
    assert found.default_microseconds == measure(FIRST)[0] > found.microseconds == measure(found.pipeline)[0]
    assert tried[1].left_out == "RuntimeError: out of resource: shared memory" and tried[1].microseconds is None
    assert tried[3].left_out == "spills 16 bytes" and tried[3].microseconds is None
    assert [trial.pipeline for trial in tried[4:]] == [FIRST._replace(programs=count) for count in tune_gpu.SPLITS]


def test_without_time_the_default_stays():
    tried = trials([FIRST, SECOND, THIRD])
    found = tune_gpu.search("a layout", tried, lambda pipeline: (float(pipeline.tokens),), until=0.0)
    assert [trial.left_out for trial in tried[:3]] == ["", "", "no time left"]
    assert found.pipeline == SECOND  # both were measured, and it was the faster
    assert all(trial.left_out == "no time left" for trial in tried[3:])


def test_a_default_that_does_not_run_is_not_replaced_in_silence():
    def measure(pipeline: Pipeline) -> tuple[float, ...]:
        if pipeline == FIRST:
            raise RuntimeError("an illegal memory access")
        return (1.0,)

    tried = trials([FIRST, SECOND])
    assert tune_gpu.search("a layout", tried, measure, LATER) is None
    assert "illegal memory access" in tried[0].left_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("large_metadata", [False, True])
def test_wrong_attention_is_no_candidate(monkeypatch, large_metadata):
    """Plain torch stands in for the kernels, right and then wrong."""
    workload = Workload(tune_gpu.Case(8, 2, 64, 2, large_metadata=large_metadata), 2, 300)
    assert (workload.layers[0].key.scale.dtype == torch.float16) == large_metadata
    monkeypatch.setattr(Workload, "attend", lambda self, layer, pipeline: self.expected.bfloat16())
    assert workload.measure(FIRST, timer=len) == len(workload.layers) >= 2
    for wrong in (1.05, float("nan"), 0.0):
        monkeypatch.setattr(Workload, "attend", lambda self, layer, pipeline, by=wrong: self.expected * by)
        with pytest.raises(ValueError, match="attention is wrong: relative error"):
            workload.measure(FIRST, timer=len)
    assert relative_error(workload.expected, workload.expected) == 0 and workload.expected.norm() > 0


def test_what_the_compiler_spills_is_left_out_but_never_the_default():
    """For a GPU that is not here: by the machine code."""
    shape = launch.Shape(256, 32, 8, 8, 8, 4, 4, 160, 32)
    spilling, fitting = Pipeline(2, 64, 4, 2), launch.default_pipeline(shape, False)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiled = [
            pool.submit(compile_report.attending, shape, 4, tune_gpu.DTYPE, 90, each) for each in (spilling, fitting)
        ]
        broken = pool.submit(compile_report.attending, shape, 4, "float8", 90)
    tried = trials([spilling, spilling, fitting, fitting])
    tune_gpu.leave_out(tried, [compiled[0], *compiled, broken], launch.SHARED_H100)
    assert tried[0].left_out == tried[2].left_out == ""
    assert tried[1].left_out.startswith("spills ") and tried[3].left_out == "KeyError: 'float8'"
    tried = trials([spilling, fitting])
    tune_gpu.leave_out(tried, compiled, shared=1024)
    assert "bytes of shared memory" in tried[1].left_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_table_and_the_record_are_written_after_every_layout(tables, tmp_path, monkeypatch):
    """From the candidates of real layouts to the file that is read; what was tuned before stays, and a layout whose default
    does not run costs only itself."""
    save(tables, "user", layouts={"an earlier layout": TUNED})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    class Made:
        """Stands in for the pool of compilers and for what they give."""

        spilled = shared = 0
        submit = result = lambda self, *_: self

    monkeypatch.setattr(tune_gpu, "compilers", lambda: contextlib.nullcontext(Made()))
    monkeypatch.setattr(tune_gpu, "WORKLOADS", ((1, 256),))

    def measure(self: Workload, pipeline: Pipeline) -> float:
        if self.layers[0].key.bits == 4:
            raise RuntimeError("no kernel image")
        return 10.0 - pipeline.stages - pipeline.programs / 10

    monkeypatch.setattr(Workload, "measure", measure)
    flags = tune_gpu.Flags(out=tmp_path / "out", layouts=("4 bits", "2 bits"))
    assert tune_gpu.tune_all(flags, GPU) == 0
    for folder in ("user", "out"):
        layouts = tuning.load(tmp_path / folder / tuning.file_name(GPU)).layouts
        assert list(layouts) == ["an earlier layout", LAYOUT]
    assert tuning.pipeline(CUDA, SHAPE, False, 2) == Pipeline(4, 32, 2, 8)  # by `measure`, whatever its layout
    rows = json.loads((tmp_path / "out" / "tune.json").read_text())["rows"]
    assert {row["left_out"] for row in rows if row["layout"] != LAYOUT} == {"RuntimeError: no kernel image"}
    flags = tune_gpu.Flags(out=tmp_path / "out", layouts=("4 bits",))
    assert tune_gpu.tune_all(flags, GPU) == 1  # nothing was measured


# the script and what it keeps


PYTHON = """#!/bin/sh
case "$1" in -c) exit 0 ;; esac  # whether there is a GPU
echo "$@" >>"$CALLS"
case "$*" in *"$FAILS"*) exit 3 ;; esac
echo done
"""


def run_gpu(
    folder: pathlib.Path, *arguments: str, fails: str = "nothing"
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script with a stand-in for Python: what came of it, and the calls of Python."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls.write_text("")
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "FAILS": fails, "PARTS": "2"}
    command = ["bash", str(ROOT / "benchmarks" / "run_gpu.sh"), *arguments, str(folder / "results")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


def test_a_part_that_fails_stops_no_other(tmp_path):
    done, calls = run_gpu(tmp_path, fails="tune_gpu.py")
    assert done.returncode == 1 and "tests: exit 0; tune: exit 3; attention: exit 0; end-to-end: exit 0" in done.stdout
    assert sum("-m pytest -q -m gpu --shard" in call for call in calls) == 2
    assert [call.split()[0] for call in calls if "gpu.py" in call or "bench.py" in call] == [
        "benchmarks/tune_gpu.py",
        "benchmarks/gpu_bench.py",
        "benchmarks/gpu_bench.py",
    ]
    assert (tmp_path / "results" / "attention.txt").read_text() == "done\n"


@pytest.mark.parametrize("part", ["tests", "tune", "attention", "end-to-end"])
def test_each_part_runs_alone(tmp_path, part):
    done, calls = run_gpu(tmp_path, "--only", part)
    assert done.returncode == 0 and f"{part}: exit 0; results in" in done.stdout
    assert calls and all(("-m pytest" in call) == (part == "tests") for call in calls)
    assert all(("tune_gpu.py" in call) == (part == "tune") for call in calls)


def test_the_script_names_mistakes_and_shows_what_it_would_do(tmp_path):
    for arguments, words in ((["--only", "x"], "got 'x'"), (["--minutes", "0"], "got '0'"), (["--fast"], "no --fast")):
        done, calls = run_gpu(tmp_path, *arguments)
        assert done.returncode == 2 and words in done.stderr and not calls
    done, calls = run_gpu(tmp_path, "--dry-run", "--minutes", "18")
    assert done.returncode == 0 and not calls and not (tmp_path / "results").exists()
    seconds = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("timeout")]
    assert len(seconds) == 5 and sum(seconds[1:]) <= 18 * 60  # two halves of the tests side by side


def test_rows_of_other_parts_are_kept_where_they_are_of_the_same_machine(tmp_path):
    rows = [dataclasses.asdict(gpu_bench.Row(part, "a shape", "a method", 1, 8)) for part in gpu_bench.PARTS]
    here = Environment.here(device=gpu_bench.DEVICE)
    assert gpu_bench.earlier_rows(tmp_path, ("attention",)) == []
    save_result(BenchmarkResult("gpu", rows, here), tmp_path / "gpu_bench.json")
    assert [row["part"] for row in gpu_bench.earlier_rows(tmp_path, ("attention",))] == ["packing", "end-to-end"]
    other = dataclasses.replace(here, processor="another")
    save_result(BenchmarkResult("gpu", rows, other), tmp_path / "gpu_bench.json")
    assert gpu_bench.earlier_rows(tmp_path, ("attention",)) == []
