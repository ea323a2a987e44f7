"""The public face of the cache: `KIVICache`, `StaticInt8Cache`, `print_kivi_stats`, and `PRESETS` of options."""

from modules.cache.cache import KIVICache, StaticInt8Cache, print_kivi_stats
from modules.cache.layer import KIVICacheLayer
from modules.codecs.static import StaticParameters
from modules.options import PRESETS

__all__ = ["PRESETS", "KIVICache", "KIVICacheLayer", "StaticInt8Cache", "StaticParameters", "print_kivi_stats"]
