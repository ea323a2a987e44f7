"""The flags that the commands of the evaluation share."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from modules.cli.command import argument, check_least, group
from modules.evaluation.candidates import Candidate, changes, kivi, parse_options, written
from modules.evaluation.loading import DTYPES, MODEL_HELP
from modules.evaluation.streaming import CHUNK
from modules.options import KIVIOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The flags of whatever runs a model."""

    dtype: str = argument("float32", "of the weights", DTYPES)
    device: str | None = argument(None, "as torch names it; None: a GPU where there is one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheFlags(ModelFlags):
    """The flags of whatever compares caches."""

    model: str = argument(help=MODEL_HELP)
    cache: KIVIOptions = group(KIVIOptions)
    options: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = argument(
        (), "another KIVI cache, as NAME=VALUE,…, or a file that `layers` wrote; may be repeated, 'name: …' names it"
    )
    chunk: int = argument(CHUNK, "tokens that go through the cache at once")
    output: str | None = argument(None, "write the result as JSON here")

    def __post_init__(self) -> None:
        check_least(self.chunk, 1, "--chunk")

    def own_candidates(self) -> list[Candidate]:
        """The caches asked for by flags: the one of the options that are not at their defaults, and `--options`."""
        given = changes(self.cache)
        asked = [kivi(written(given), given)] if given else []
        return asked + [parse_options(text) for text in self.options]
