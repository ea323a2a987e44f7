"""The caches of the last conversations, by their tokens."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch

from modules.cache.rows import can_gather
from modules.kivi_cache_general import KIVICache


class PrefixCache:
    """Caches of one sequence each, within a number of bytes; the one that was used least lately is forgotten first.

    A cache that is found is copied, so that any number of requests go on from it at once.

    Args:
        limit: bytes of all caches together; 0 keeps none.

    Attributes:
        size: their bytes, counted from the tensors.
        worth: a prefix shorter than that (tokens) is not looked for: it is not packed in a cache of its own, so that feeding
            it anew is what gives it exactly, and is quick.
    """

    def __init__(self, limit: int, worth: int) -> None:
        self.limit, self.worth, self.size = limit, worth, 0
        self._kept: OrderedDict[tuple[int, ...], tuple[torch.Tensor, KIVICache, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, tokens: Sequence[int]) -> KIVICache | None:
        """A copy of the cache from which most of `tokens` can be taken, cropped to those that they share; None where that is
        too little.

        At least the last of `tokens` is left to be fed, and so are shared ones that would be packed in the copy, cut off as it
        is, and are in full precision where nothing was cut off (`Ledger.clean_cut`).
        """
        wanted = torch.tensor(tokens[:-1], dtype=torch.long)
        best, most = None, self.worth - 1
        for key, (held, cache, _) in self._kept.items():
            shared = _common(held, wanted)
            if shared < len(held):
                shared = cache.ledger.clean_cut(0, shared) if can_gather(cache) else 0
            if shared > most:
                best, most = key, shared
        if best is None:
            return None
        self._kept.move_to_end(best)
        found = copy.deepcopy(self._kept[best][1])
        found.crop(most - len(best))
        return found

    def keep(self, tokens: Sequence[int], cache: KIVICache) -> None:
        """Keep a cache that holds `tokens`, in place of those that hold a beginning of them."""
        held = torch.tensor(tokens, dtype=torch.long)
        size = cache.get_cache_info()["bytes"]["total"]
        if len(held) < self.worth or size > self.limit:
            return
        for key, (other, _, _) in list(self._kept.items()):
            common = _common(held, other)
            if common == len(held) and len(other) > len(held):
                self._kept.move_to_end(key)
                return  # it is there, and more
            if common == len(other):
                self._forget(key)
        while self.size + size > self.limit:
            self._forget(next(iter(self._kept)))
        self._kept[tuple(tokens)] = held, cache, size
        self.size += size

    def _forget(self, key: tuple[int, ...]) -> None:
        self.size -= self._kept.pop(key)[2]


def _common(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens two sequences share from the first on."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.to(torch.uint8).argmax()) if bool(differ.any()) else length
