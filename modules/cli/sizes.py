"""Numbers of tokens and of bytes as people write them."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_TOKENS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_BYTES = {"b": 1} | {
    f"{prefix}{infix}b": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgt", 1)
}


def parse_tokens(text: str, flag: str) -> int:
    """A number of tokens: 4096, 4_096, or 4k of 1,024 each, as context lengths are written.

    Raises:
        ValueError: naming `flag`, for anything else.
    """
    count = _parse(text, _TOKENS)
    if count is None or count < 1 or count != int(count):
        raise ValueError(f"{flag} must be a number of tokens such as 4096 or 32k (k: 1024); got {text!r}.")
    return int(count)


def parse_bytes(text: str, flag: str) -> int:
    """A number of bytes with its unit: 24GB (10⁹ bytes each) or 24GiB (2³⁰ bytes each).

    Raises:
        ValueError: naming `flag`, for anything else.
    """
    size = _parse(text, _BYTES)
    if size is None:
        raise ValueError(f"{flag} must be a size with its unit, such as 24GB or 24GiB; got {text!r}.")
    return int(size)


def _parse(text: str, units: dict[str, int]) -> float | None:
    found = _NUMBER.fullmatch(text)
    if found is None or found[2].lower() not in units:
        return None
    return float(found[1].replace("_", "")) * units[found[2].lower()]
