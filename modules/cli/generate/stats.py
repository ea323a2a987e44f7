"""What answers took: time, tokens and the bytes of the cache."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from modules.cli.generate.streaming import Answer
from modules.kivi_cache_general import KIVICache

FLOAT16_BYTES = 2


def cache_figures(cache: KIVICache, element_bytes: int) -> dict[str, Any]:
    """Tokens, bits and bytes of a cache, beside float16; `element_bytes` is the size of an element of the model's dtype."""
    info = cache.get_cache_info()
    size = info["bytes"]["total"]
    options = info["options"]
    float16 = info["bytes"]["dense"] * FLOAT16_BYTES // element_bytes
    return {
        "k_bits": options["k_bits"],
        "v_bits": options["v_bits"],
        "backend": info["backend"],
        "tokens": {name: info["tokens"][name] for name in ("sinks", "packed", "window")},
        "packs_at": options["sink_length"] + options["residual_length"] + options["group_size"],
        "stored_bits": info["bits"]["stored"],
        "bytes": size,
        "float16_bytes": float16,
        "ratio": float16 / size if size else 0.0,
    }


def answer_figures(result: Answer) -> dict[str, Any]:
    """Tokens and time of an answer."""
    return {
        "new_tokens": len(result.tokens),
        "first_seconds": result.first_seconds,
        "tokens_per_second": result.tokens_per_second,
        "interrupted": result.interrupted,
    }


def stats_table(answers: list[Answer], cache: dict[str, Any]) -> Table:
    """The figures of a whole conversation."""
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    new = sum(len(result.tokens) for result in answers)
    whole = Answer(step_seconds=[seconds for result in answers for seconds in result.step_seconds])
    tokens = cache["tokens"]
    table.add_row("new tokens", str(new))
    table.add_row("seconds to the first one", ", ".join(f"{r.first_seconds:.2f}" for r in answers))
    speed = whole.tokens_per_second
    table.add_row("tokens a second after it (median)", f"{speed:.1f}" if speed else "not measured")
    table.add_row("tokens in the cache", f"{sum(tokens.values())}")
    table.add_row("  sinks, packed, window", ", ".join(str(count) for count in tokens.values()))
    if not tokens["packed"]:
        table.add_row("  nothing is packed before", str(cache["packs_at"]))
    table.add_row("cache", decimal(cache["bytes"]))
    table.add_row("  in float16", f"{decimal(cache['float16_bytes'])} ({cache['ratio']:.2f}x)")
    table.add_row("  attention", str(cache["backend"]))
    return table
