"""The Triton backend: on the GPU where there is one, else in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TESTS = Path(__file__).parent
PARTS = 4  # that the workers of pytest-xdist can share
PARTS_OF = [("triton_cases.py", part, PARTS) for part in range(1, PARTS + 1)]
PARTS_OF += [("graph_cases.py", part, 2) for part in (1, 2)]

if torch.cuda.is_available():
    from graph_cases import *  # noqa: F403
    from triton_cases import *  # noqa: F403
else:

    @pytest.mark.parametrize("cases,part,parts", PARTS_OF)
    def test_kernels_in_the_interpreter(cases, part, parts):
        """All of a file of cases. Triton decides when it is imported whether to interpret, hence the process."""
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / cases)]
        command += ["--shard", f"{part}/{parts}"]
        run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
