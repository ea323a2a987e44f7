"""The caches that are compared: KIVI's options by name, the paper's setting, and what transformers brings along."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from modules.calibration.deployment import FakeQuantizedCache
from modules.codecs.static import StaticParameters
from modules.evaluation.results import BenchmarkResult, Result, load_result
from modules.kivi_cache_general import KIVICache
from modules.options import FULL_PRECISION_BITS, PRESETS, KIVIOptions

FULL = "full precision"
DEFAULTS = "defaults"
PAPER = "paper (KIVI, arXiv 2402.02750)"
PAPER_OPTIONS = {"k_bits": 2, "v_bits": 2, "sink_length": 0, "k_range": "minmax"}
FOUR_BITS = "K 4 bits, V 4 bits"
SMALL = "preset small"

CacheFactory = Callable[[PreTrainedConfig], Cache]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A cache to measure.

    Attributes:
        name: in tables.
        make: an empty cache for a model's config.
        kind: "full", "kivi", "paper", "static", "transformers", "reference" or "package".
        options: for the record.
        stored_bits: bits a quantized element takes with its metadata in a 16-bit model; None: counted.
        count: how they are counted from a filled cache that is not KIVI's.
    """

    name: str
    make: CacheFactory
    kind: str = "kivi"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stored_bits: float | None = None
    count: Callable[[Cache], float] | None = None

    def try_make(self, config: PreTrainedConfig) -> tuple[Cache | None, str]:
        """An empty cache, or None and a note that says which package is missing."""
        try:
            return self.make(config), ""
        except ImportError as error:
            return None, f"skipped: {' '.join(str(error).split())}"


def full_precision() -> Candidate:
    """transformers' own cache, unquantized: the reference."""
    return Candidate(FULL, lambda config: DynamicCache(config=config), kind="full", stored_bits=FULL_PRECISION_BITS)


def kivi(name: str, options: Mapping[str, Any], kind: str = "kivi") -> Candidate:
    """A KIVI cache with single options by name; the others have their defaults, whatever the model's config says.

    Raises:
        ValueError: for an option that is unknown or not allowed.
    """
    chosen = KIVIOptions.from_config(None, options)
    return Candidate(name, lambda config: KIVICache(config, chosen), kind=kind, options=dict(options))


def by_layer(result: Result) -> Candidate:
    """The cache whose options `choose_by_layer` found.

    Raises:
        ValueError: for a result of something else.
    """
    if not isinstance(result, BenchmarkResult) or not {"options", "at_most", "text"} <= set(result.settings):
        raise ValueError(
            "bits by layer are made from a result of `python -m modules.evaluation layers`; got another one."
        )
    settings = result.settings
    return kivi(f"bits by layer, {settings['at_most']:g}, by {settings['text']}", settings["options"])


def static(name: str, parameters: StaticParameters) -> Candidate:
    """A cache of static INT8 codes by calibrated parameters."""
    return Candidate(name, lambda config: KIVICache(config, static=parameters), kind="static")


def fake_static(name: str, parameters: StaticParameters) -> Candidate:
    """A full-precision cache of the states that those codes would give back; it takes as much memory as ever."""
    return Candidate(
        name,
        lambda config: FakeQuantizedCache(config, parameters),
        kind="static",
        stored_bits=FULL_PRECISION_BITS,
    )


def eight_bit_peers() -> list[Candidate]:
    """What stands beside static INT8: KIVI at 8 bits, transformers' fp8, and quanto at 4 bits, the most it has there."""
    return [
        _pair(8, 8),
        *(peer for peer in peers() if peer.name in ("transformers fp8, 8 bits", "transformers quanto, 4 bits")),
    ]


def _quantized(backend: str, stored_bits: float, **options: Any) -> Candidate:
    bits = options.get("nbits", 8)
    return Candidate(
        f"transformers {backend}, {bits} bits",
        lambda config: QuantizedCache(backend, config, **options),
        kind="transformers",
        options={"backend": backend, **options},
        stored_bits=stored_bits,
    )


def peers() -> list[Candidate]:
    """transformers' `QuantizedCache` with each of its backends, with its defaults (groups of 64).

    The axes are those its documentation recommends: 0 for quanto, 1 for HQQ; both group along a token's channels.
    """
    metadata = 2 * FULL_PRECISION_BITS / 64  # a scale and a zero in the model's dtype, here taken as 16 bits
    return [
        _quantized("quanto", 2 + metadata, nbits=2, axis_key=0, axis_value=0),
        _quantized("quanto", 4 + metadata, nbits=4, axis_key=0, axis_value=0),
        _quantized("hqq", 2 + metadata, nbits=2, axis_key=1, axis_value=1),
        _quantized("hqq", 4 + metadata, nbits=4, axis_key=1, axis_value=1),
        _quantized("fp8", 8.0),
    ]


def _pair(k_bits: int, v_bits: int) -> Candidate:
    sides = [
        f"{name} {bits} bits" if bits != FULL_PRECISION_BITS else f"{name} full"
        for name, bits in (("K", k_bits), ("V", v_bits))
    ]
    return kivi(", ".join(sides), {"k_bits": k_bits, "v_bits": v_bits})


def short_candidates() -> list[Candidate]:
    """The least that says how good the defaults are: they, fewer bits, the paper's setting, more bits."""
    return [
        kivi(DEFAULTS, {}),
        kivi(SMALL, PRESETS["small"]),
        kivi(PAPER, PAPER_OPTIONS, kind="paper"),
        _pair(4, 2),
        _pair(4, 4),
    ]


def main_candidates() -> list[Candidate]:
    """What a user would choose between, the way from the paper's setting to the defaults, a change at a time, and what
    was tried beside them."""
    return [
        *short_candidates(),
        kivi("paper + sinks", {"k_range": "minmax"}),
        kivi("paper + sinks, fitted keys", {"wide_channels": 0.0, "v_rotation": False}),
        kivi("paper + sinks, fitted and wide keys", {"v_rotation": False}),
        kivi("defaults, values by their range", {"v_range": "minmax"}),
        kivi("defaults, fitted values", {"v_range": "lsq"}),
        kivi("defaults, keys by their range", {"k_range": "minmax", "wide_channels": 0.25, "v_rotation": True}),
        kivi("defaults, no wide keys", {"wide_channels": 0.0}),
        kivi("defaults, a quarter wide, metadata of 16 bits", {"wide_channels": 0.25, "metadata_bits": 16}),
        _pair(2, 4),
        *(kivi(f"defaults, groups of {size}", {"group_size": size}) for size in (16, 64)),
    ]


def grid_candidates() -> list[Candidate]:
    """`main_candidates` and every other pair of 2, 4, 8 and 16 bits, and group sizes at 4 bits."""
    shown = [(2, 2), (4, 2), (2, 4), (4, 4), (16, 16)]
    pairs = [pair for pair in itertools.product((2, 4, 8, 16), repeat=2) if pair not in shown]
    four = {"k_bits": 4, "v_bits": 4}
    return [
        *main_candidates(),
        *(_pair(*pair) for pair in pairs),
        *(kivi(f"{FOUR_BITS}, groups of {size}", {**four, "group_size": size}) for size in (16, 64)),
        kivi(f"{FOUR_BITS}, no wide keys", {**four, "wide_channels": 0.0}),
    ]


CANDIDATE_SETS: dict[str, Callable[[], list[Candidate]]] = {
    "short": short_candidates,
    "main": main_candidates,
    "grid": grid_candidates,
}


def changes(options: KIVIOptions) -> dict[str, Any]:
    """The options that are not at their defaults."""
    defaults = vars(KIVIOptions())
    return {name: value for name, value in vars(options).items() if value != defaults[name]}


def written(options: Mapping[str, Any]) -> str:
    """Options as `parse_options` reads them."""
    values = {
        name: "/".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in options.items()
    }
    return ",".join(f"{name}={value}" for name, value in values.items())


def as_candidates(caches: Mapping[str, Mapping[str, Any] | CacheFactory] | Iterable[Candidate]) -> list[Candidate]:
    """Candidates from a dict of names, each with KIVI options or a function from a model's config to an empty cache.

    Raises:
        ValueError: for two of one name, or an entry that is neither.
    """
    if not isinstance(caches, Mapping):
        candidates = list(caches)
    else:
        candidates = [_as_candidate(name, cache) for name, cache in caches.items()]
    names = [candidate.name for candidate in candidates]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two candidates are named {name!r}; names must differ.")
    return [candidate for candidate in candidates if candidate.kind != "full"]


def _as_candidate(name: str, cache: Mapping[str, Any] | CacheFactory) -> Candidate:
    if isinstance(cache, Mapping):
        return kivi(name, cache)
    if callable(cache):
        return Candidate(name, cache, kind="transformers")
    raise ValueError(f"{name!r} must be a dict of KIVI options or a function of a config; got {type(cache).__name__}.")


def parse_options(text: str) -> Candidate:
    """A candidate from a command line: "k_bits=2,v_bits=4", or with a name before a colon: "mine: k_bits=2". Entries
    of single layers are written "k_bits=2/4/2". "layers.json" is the file that `python -m modules.evaluation layers` wrote.

    Raises:
        ValueError: for anything else, and for options that are unknown or not allowed.
    """
    if text.endswith(".json"):
        if not Path(text).is_file():
            raise ValueError(f"there is no file {text!r} with options.")
        return by_layer(load_result(text))
    before, colon, after = text.partition(":")
    name, given = (before, after) if colon and "=" not in before else ("", text)
    options = {}
    for item in filter(None, (part.strip() for part in given.split(","))):
        option, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"options are written 'name=value,name=value'; got {item!r} in {text!r}.")
        options[option.strip()] = _value(value.strip())
    return kivi((name or given).strip() or DEFAULTS, options)


def _value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"[\d.]+(/[\d.]+)+", text):
        return [_value(part) for part in text.split("/")]
    return float(text) if re.fullmatch(r"-?\d*\.\d+", text) else text


def stored_bits(cache: Cache, candidate: Candidate) -> float | None:
    """Bits a quantized element takes with its share of scale and minimum, counted from a filled KIVI cache."""
    if candidate.count is not None:
        return candidate.count(cache)
    if candidate.stored_bits is not None or not isinstance(cache, KIVICache):
        return candidate.stored_bits
    count = len(cache.layers)
    sides = [bits for layer in range(count) for bits in cache.options.bits_of_layer(layer, count)]
    full = sides.count(FULL_PRECISION_BITS) / len(sides)
    return full * FULL_PRECISION_BITS + (1 - full) * cache.get_cache_info()["bits"]["packed"]
