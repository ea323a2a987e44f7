"""The kernels for GPUs, compiled where there is none: the variants people run most, for three generations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spills(arch, tmp_path):
    """`--check` refuses spilled registers, copies of codes below 16 bytes and, on sm_90, a main loop that is too long."""
    out = tmp_path / "compiled.json"
    command = [sys.executable, "benchmarks/compile_report.py", "--quick", "--check", "--jobs", "1", "--arch", str(arch)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([*command, "--json", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = json.loads(out.read_text())["rows"]
    assert {kernel["kernel"] for kernel in kernels} == {"attend_splits", "combine_splits", "pack_states", "append_step"}
    assert all(kernel["registers"] > 0 and not kernel["spilled"] for kernel in kernels)
