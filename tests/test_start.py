"""start.py: two runs side by side, runs that were killed, and what is installed anew."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import start

# start.py with an environment and a pip that only write down what they do.
DRIVER = """
import os, pathlib, sys, time
import start

folder = pathlib.Path(os.environ["KIVI_VENV"])

def run(*command, keep=()):
    what = "pip" if "pip" in command else "venv"
    with open(folder.parent / "log", "a") as log:
        print("begin", what, file=log, flush=True)
        time.sleep(float(sys.argv[1]))
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / "python").touch()
        print("end", what, file=log, flush=True)
    return 0

start.run = run
print(start.environment(["requirements.txt"]))
"""
posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX environment is written down")


def begin(folder: Path, code: str, *arguments: object) -> subprocess.Popen:
    """Start Python on `code` beside start.py, with its environment in `folder`."""
    environment = {**os.environ, "KIVI_VENV": str(folder / "venv"), "PYTHONPATH": str(start.ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@posix
def test_two_runs_side_by_side_install_once(tmp_path):
    outputs = [process.communicate(timeout=60)[0] for process in [begin(tmp_path, DRIVER, 0.5) for _ in range(2)]]
    assert (tmp_path / "log").read_text().splitlines() == ["begin venv", "end venv", "begin pip", "end pip"]
    assert [text.splitlines()[-1] for text in outputs] == [str(tmp_path / "venv/bin/python")] * 2
    assert any("waiting" in text for text in outputs)


@posix
def test_the_lock_of_a_killed_run_is_no_obstacle(tmp_path):
    killed = begin(tmp_path, DRIVER, 600)
    wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text())
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (tmp_path / "venv" / ".lock").exists()
    output, _ = begin(tmp_path, DRIVER, 0).communicate(timeout=60)
    assert output.splitlines()[-1] == str(tmp_path / "venv/bin/python") and "waiting" not in output
    assert (tmp_path / "log").read_text().splitlines()[-1] == "end pip"


@posix
def test_what_a_killed_run_left_running_keeps_the_lock(tmp_path):
    """pip may go on after start.py was killed; nothing else may be installed meanwhile."""
    holder = """
import pathlib, sys, start
with start.locked(pathlib.Path(sys.argv[1])) as lock:
    start.run(sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)", keep=(lock,))
"""
    lock = tmp_path / "lock"
    killed = begin(tmp_path, holder, lock)
    child = int(killed.stdout.readline())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    try:
        with lock.open("a") as file:
            assert not start.take_lock(file, wait=False)
    finally:
        os.kill(child, signal.SIGKILL)
    killed.stdout.close()

    def free() -> bool:
        with lock.open("a") as file:
            return start.take_lock(file, wait=False)

    wait_for(free)


@posix
def test_another_version_is_installed_anew(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("-e .")
    (tmp_path / "pyproject.toml").write_text("one")
    calls = []
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setenv("KIVI_VENV", str(tmp_path / "venv"))

    def run(*command, keep=()):
        calls.append(command)
        (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "venv" / "bin" / "python").touch()
        return 0

    monkeypatch.setattr(start, "run", run)
    for versions, expected in (("one", 2), ("one", 2), ("two", 4)):
        (tmp_path / "pyproject.toml").write_text(versions)
        start.environment(["requirements.txt"])
        assert len(calls) == expected


def test_versions_stand_only_in_pyproject():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (start.ROOT / name).read_text().splitlines()
        assert [line.split("[")[0] for line in lines if not line.startswith("#")] == ["-e ."]
