"""The public face of the cache: `KIVICache` and `print_kivi_stats`."""

from modules.cache.cache import KIVICache, print_kivi_stats
from modules.cache.layer import KIVICacheLayer

__all__ = ["KIVICache", "KIVICacheLayer", "print_kivi_stats"]
