"""Where and with what a measurement ran."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import platform
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "numba", "triton", "optimum-quanto", "hqq", "tiny-turboquant")


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and with what a measurement ran.

    Attributes:
        date: UTC, ISO 8601, to the minute.
        processor: of the machine, or the GPU's name where it was measured on one.
        threads: torch's threads; 0 where nothing was timed.
        dtype: of the model's weights; empty where a measurement has several.
        python: its version.
        packages: version by package name, for those of `PACKAGES` that are installed.
    """

    date: str
    processor: str
    threads: int
    dtype: str
    python: str
    packages: dict[str, str]

    @classmethod
    def here(cls, model: torch.nn.Module | None = None, device: torch.device | str = "cpu") -> Environment:
        """The environment of a measurement on `model`, or of no model on `device`, now."""
        parameter = None if model is None else next(model.parameters())
        return cls(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
            processor=processor_name(device if parameter is None else parameter.device),
            threads=torch.get_num_threads(),
            dtype="" if parameter is None else str(parameter.dtype).removeprefix("torch."),
            python=platform.python_version(),
            packages=installed(),
        )

    @property
    def machine(self) -> str:
        """Processor, threads and dtype in words."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        return ", ".join(part for part in (self.processor, threads, self.dtype) if part)

    @property
    def versions(self) -> str:
        """Python and the packages in words."""
        python = [f"Python {self.python}"] if self.python else []
        return ", ".join([*python, *(f"{name} {version}" for name, version in self.packages.items())])


def installed() -> dict[str, str]:
    """Versions by package name, for those of `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def processor_name(device: torch.device | str = "cpu") -> str:
    """The GPU's name, or the CPU's as the system gives it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
