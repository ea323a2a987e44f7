"""A packed, quantized KV cache for Hugging Face transformers and the attention over it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.kivi_cache_general import KIVICache, print_kivi_stats
    from modules.models.attach import attach_kivi, detach_kivi

_HOMES = {
    "KIVICache": "modules.kivi_cache_general",
    "print_kivi_stats": "modules.kivi_cache_general",
    "attach_kivi": "modules.models.attach",
    "detach_kivi": "modules.models.attach",
}


def __getattr__(name: str) -> Any:
    """What is named here is imported when it is asked for: `modules.options` alone needs neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = ["KIVICache", "attach_kivi", "detach_kivi", "print_kivi_stats"]
