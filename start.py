#!/usr/bin/env python3
"""Set up an environment and run the demo or the tests in it.

    python3 start.py demo [options]       a 135M-parameter model answers from a 2-bit cache; --help lists the options
    python3 start.py test [pytest args]   ruff, mypy, then the tests, those of real models included

Each makes .venv beside this file on its first run (the folder in $KIVI_VENV instead, if that is set) and installs
requirements.txt into it, for `test` requirements-dev.txt too; a second run installs nothing, and one beside it waits.
Models are kept under $KIVI_MODELS, else ~/.cache/kivi-models. Needs Python 3.11 or 3.12 and nothing else.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

if os.name == "nt":
    import msvcrt

    def take_lock(file, wait):
        """Whether the lock on a file was to be had; with `wait` that takes up to ten seconds."""
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def take_lock(file, wait):
        """Whether the lock on a file was to be had; with `wait` that takes as long as it takes."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


SUPPORTED = ((3, 11), (3, 12))
ROOT = Path(__file__).resolve().parent
QUICKSTART = ROOT / "examples" / "quickstart.py"
VERSIONS = "pyproject.toml"  # what the requirements files refer to


def check_version():
    """Exit with what to do where this Python is not supported. (This file parses from Python 3.6 on.)"""
    if sys.version_info[:2] in SUPPORTED:
        return
    found = [name for name in ("python3.12", "python3.11") if shutil.which(name)]
    hint = "Found here: {}. ".format(", ".join(found)) if found else ""
    sys.exit(
        "start.py needs Python 3.11 or 3.12; this is {}.{}. {}Run it as: {} start.py {}".format(
            sys.version_info[0], sys.version_info[1], hint, found[0] if found else "python3.12", " ".join(sys.argv[1:])
        )
    )


def run(*command, keep=()):
    """Run a command in the project's folder and return its exit status; Ctrl-C is the command's to handle.

    `keep` holds file descriptors that stay open in it: a lock lasts until whoever works under it has ended.
    """
    with subprocess.Popen([str(part) for part in command], cwd=str(ROOT), pass_fds=keep) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


@contextlib.contextmanager
def locked(path):
    """Hold the lock on a file, waiting for who holds it; the system frees it when its holder ends, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not take_lock(file, wait=False):
            print(f"Another start.py is installing into {path.parent}; waiting for it …", flush=True)
            while not take_lock(file, wait=True):
                pass
        yield file.fileno()


def environment(requirements):
    """The Python of the virtual environment, with requirements files installed in it.

    For each file a stamp in the environment holds the hash of what was installed; a file that has not changed since is
    not looked at again.
    """
    folder = Path(os.environ.get("KIVI_VENV") or ROOT / ".venv").expanduser().absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    versions = (ROOT / VERSIONS).read_bytes()
    stamps = {
        folder / f".installed-{name}": hashlib.sha256((ROOT / name).read_bytes() + versions).hexdigest()
        for name in requirements
    }

    def installed():
        return python.exists() and all(s.exists() and s.read_text() == wanted for s, wanted in stamps.items())

    if not installed():
        with locked(folder / ".lock") as lock:
            if not installed():  # by whom we waited for
                install(folder, python, requirements, lock)
                for stamp, wanted in stamps.items():
                    stamp.write_text(wanted)
    return python


def install(folder, python, requirements, lock):
    """Make the virtual environment and install requirements files into it, or exit with what to do."""
    print(f"Installing {' and '.join(requirements)} into {folder} …", flush=True)
    keep = () if os.name == "nt" else (lock,)
    if run(sys.executable, "-m", "venv", folder, keep=keep):
        sys.exit(
            f"Could not make a virtual environment in {folder}. On Debian and Ubuntu: apt install python3-venv. "
            "Another folder: set KIVI_VENV."
        )
    files = [part for name in requirements for part in ("-r", ROOT / name)]
    quiet = [] if sys.stdout.isatty() else ["-q"]
    if run(python, "-m", "pip", "install", "--disable-pip-version-check", *quiet, *files, keep=keep):
        sys.exit(
            f"pip could not install {' and '.join(requirements)}; its message is above. The same command tries again."
        )


def demo(arguments):
    """The quickstart; its --help needs nothing installed."""
    if {"-h", "--help"} & set(arguments):
        return run(sys.executable, QUICKSTART, *arguments)
    return run(environment(["requirements.txt"]), QUICKSTART, *arguments)


def test(arguments):
    """Lint, types and tests; the tests come last, so that the last line is pytest's."""
    python = environment(["requirements.txt", "requirements-dev.txt"])
    failed = []
    for name, command in (
        ("ruff", ("-m", "ruff", "check", "--output-format", "concise", ".")),
        ("mypy", ("-m", "mypy")),
        ("fetching the models", (ROOT / "examples" / "common.py", "smollm2", "qwen2.5-coder", "gemma3")),
        ("pytest", ("-m", "pytest", "-n", "2", "--dist", "worksteal", "-rs", *arguments)),
    ):
        if name == "pytest" and failed:
            print(f"Failed so far: {', '.join(failed)} (see above). The tests follow.", flush=True)
        if run(python, *command):
            failed.append(name)
    return 1 if failed else 0


JOBS = {"demo": demo, "test": test}


def main():
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    if arguments[0] not in JOBS:
        print(
            f"start.py knows {' and '.join(JOBS)}, not {arguments[0]!r}. See: python3 start.py --help", file=sys.stderr
        )
        return 2
    check_version()
    return JOBS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
