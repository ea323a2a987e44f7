"""The Triton backend: on the GPU where there is one, else in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")
PARTS = 4  # that the workers of pytest-xdist can share

if torch.cuda.is_available():
    from triton_cases import *  # noqa: F403
else:

    @pytest.mark.parametrize("part", range(1, PARTS + 1))
    def test_kernels_in_the_interpreter(part):
        """All of `triton_cases.py`. Triton decides when it is imported whether to interpret, hence the process."""
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
        command += ["--shard", f"{part}/{PARTS}"]
        run = subprocess.run(command, cwd=CASES.parent.parent, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
