"""What a measurement depends on, and where its result goes."""

from __future__ import annotations

import datetime
import pathlib
import platform
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "numba", "triton")
sys.path.insert(0, str(ROOT))

from modules.evaluation.results import installed, processor_name  # noqa: E402


def environment() -> dict[str, str | int]:
    """Date, CPU, threads of torch, and versions; "not installed" for a package that is absent."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **dict.fromkeys(PACKAGES, "not installed"),
        **installed(PACKAGES),
    }
