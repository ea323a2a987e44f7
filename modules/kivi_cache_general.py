"""The public face of the cache: `KIVICache`, `StaticInt8Cache` and `print_kivi_stats`."""

from modules.cache.cache import KIVICache, StaticInt8Cache, print_kivi_stats
from modules.cache.layer import KIVICacheLayer
from modules.codecs.static import StaticParameters

__all__ = ["KIVICache", "KIVICacheLayer", "StaticInt8Cache", "StaticParameters", "print_kivi_stats"]
