"""Pages of Markdown from templates and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from modules.evaluation.tables import markdown


def render(template: Path, **values: Any) -> str:
    """A page; the filter `table` writes a table as Markdown, `table("name")` with the row of that name in bold."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = markdown
    return environment.get_template(template.name).render(**values)
