"""Other methods as candidates beside KIVI: references written here, and packages that bring a cache along."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from modules.evaluation.candidates import Candidate, peers
from modules.evaluation.kvarn import kvarn_cache
from modules.evaluation.rounded import scheme_bits
from modules.evaluation.turboquant import turboquant_cache
from modules.options import FULL_PRECISION_BITS


def other_methods() -> list[Candidate]:
    """All that are not ours: transformers' own quantized caches, references and packages."""
    return [*peers(), *references(), *packages()]


def references() -> list[Candidate]:
    """KVarN and TurboQuant at several bits, as `modules.evaluation.kvarn` and `modules.evaluation.turboquant` say."""
    return [
        *(_reference(f"KVarN, K {k} bits, V {v} bits", kvarn_cache, k_bits=k, v_bits=v) for k, v in ((2, 2), (4, 2))),
        *(_reference(f"TurboQuant, {bits} bits", turboquant_cache, bits=bits) for bits in (2, 3, 4)),
        _reference("TurboQuant, 3 bits, keys with signs", turboquant_cache, bits=3, signs=True),
    ]


def _reference(name: str, make: Any, **options: Any) -> Candidate:
    return Candidate(
        name,
        functools.partial(make, **options),
        kind="reference",
        options={"method": name.partition(",")[0], **options},
        count=scheme_bits,
    )


def packages() -> list[Candidate]:
    """Caches of the package tiny-turboquant at two of its presets; skipped where it is not installed.

    By its own words it stores KIVI's layout in groups of 128 tokens, not TurboQuant's. The package turboquant (0.2.0) is
    not among them: it calls `numpy.trapz`, which numpy no longer has.
    """
    return [_tiny_turboquant("balanced"), _tiny_turboquant("aggressive")]


def _tiny_turboquant(preset: str) -> Candidate:
    def make(config: PreTrainedConfig) -> Cache:
        from tiny_turboquant import TinyKVCache

        return TinyKVCache(compression=preset, num_hidden_layers=config.num_hidden_layers)

    options = {"method": "tiny-turboquant", "compression": preset}
    return Candidate(f"package tiny-turboquant, {preset}", make, kind="package", options=options, count=_counted)


def _counted(cache: Any) -> float:
    """Bits an element from what the package itself reports of its codes; the newest tokens do not count."""
    usage = cache.memory_usage_bytes()
    quantized = usage["fp16_equivalent_bytes"] - usage["residual_bytes"]
    return FULL_PRECISION_BITS * usage["compressed_bytes"] / quantized
