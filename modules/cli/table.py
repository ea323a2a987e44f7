"""The table of the cache's options in docs/choosing-options.md: `python -m modules.cli.table` prints it."""

from __future__ import annotations

import dataclasses

from modules.options import KIVIOptions


def options_table() -> str:
    """Every option with its default, the values it may take where they are few, and what it is for, in Markdown."""
    lines = ["| option | default | allowed | |", "|---|---|---|---|"]
    for field in dataclasses.fields(KIVIOptions):
        allowed = ", ".join(_code(value) for value in field.metadata["choices"] or ())
        lines.append(f"| `{field.name}` | {_code(field.default)} | {allowed} | {field.metadata['help']} |")
    return "\n".join(lines)


def _code(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return f"`{text}`"


if __name__ == "__main__":
    print(options_table())
