"""How a program ends: 0, 1 with a line on stderr for what the user can mend, 2 for its usage, 130 after Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OK, FAILED, USAGE, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
_ROOT = Path(__file__).resolve().parents[2]
_EXTRAS = {package: "eval" for package in ("matplotlib", "pandas", "jinja2", "lm_eval", "optimum", "hqq")}
_EXTRAS |= {package: "serve" for package in ("fastapi", "uvicorn")}  # and what is in neither is in "demo"


class UserError(Exception):
    """Something the user can mend; `run` prints its message without a traceback."""


class UsageError(UserError):
    """A mistake in how a command was called that its flags alone do not show."""


def run(main: Callable[[], Any]) -> int:
    """Run a program's `main` and return its exit status; errors the user can mend are one line on stderr."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except ModuleNotFoundError as error:
        print(f"error: {error}. Install what is needed: {_command_for(error.name or '')}", file=sys.stderr)
        return FAILED
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
    return OK


def _command_for(package: str) -> str:
    extra = _EXTRAS.get(package.split(".")[0], "demo")
    if (_ROOT / "pyproject.toml").exists():
        return f"pip install -e '{_ROOT}[{extra}]'"
    return f"pip install 'kivi-kv-cache[{extra}]'"
