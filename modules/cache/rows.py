"""Sequences of several caches in a new one, as they are stored: nothing is quantized anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modules.cache.cache import KIVICache
from modules.cache.modes import as_data
from modules.codecs.static import StaticParameters
from modules.store.ledger import Ledger, Saved
from modules.store.live import fill, joined, live_of_rows


@as_data
def gather(parts: Sequence[tuple[KIVICache, Sequence[int]]]) -> KIVICache:
    """A new cache with sequences of some caches of one model; those are left as they are.

    What is alive is copied and no more. Padding is laid anew: shorter sequences begin in later columns.

    Args:
        parts: caches and, of each, the numbers of the sequences to take, in the order in which they are to lie.

    Raises:
        ValueError: for caches of other options than the first, without tokens, offloaded, recording drafts, or with layers
            that are not packed (sliding windows, linear attention), whose sequences share their columns.
    """
    first = parts[0][0]
    for cache, _ in parts:
        _check(cache, first)
    kept = {"options": first.options} if first.static is None else {"backend": first.options.backend}
    new = KIVICache(first.config, static=first.static or False, **kept)
    _fill_ledger(new.ledger, [(cache.ledger, rows) for cache, rows in parts], first.kivi_layers[0].device)
    for index, layer in enumerate(new.kivi_layers):
        stores = [cache.kivi_layers[index].stored[0] for cache, _ in parts]
        _, heads, _, head_dim = stores[0].key.window.shape
        like = stores[0].key.window.new_empty(new.ledger.batch_size, heads, 0, head_dim)
        layer.lazy_initialization(like, like)
        tensors = joined([live_of_rows(store, rows) for store, (_, rows) in zip(stores, parts)])
        fill(layer.stored[0], set(tensors), tensors.__getitem__)
    return new


def can_gather(cache: KIVICache) -> bool:
    """Whether every layer is packed."""
    return len(cache.kivi_layers) == len(cache.layers)


def _check(cache: KIVICache, first: KIVICache) -> None:
    if not can_gather(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers if layer not in cache.kivi_layers})
        raise ValueError(f"sequences can be gathered where every layer is packed; the cache has {', '.join(kinds)}.")
    if not cache.get_seq_length() or cache.offloading or cache.ledger.geometry != first.ledger.geometry:
        raise ValueError(
            "sequences can be gathered from caches that hold tokens, are not offloaded, and have the same group_size, "
            "residual_length and sink_length, without room for drafts."
        )
    if cache.options != first.options or cache.ledger.geometry.draft_room:
        raise ValueError(
            f"sequences can be gathered from caches of the same options; got {first.options} and {cache.options}."
        )
    if not _same_static(cache.static, first.static):
        raise ValueError(
            "sequences can be gathered from caches of the same static parameters; got caches of different scales. Make them "
            "by one file."
        )


def _same_static(one: StaticParameters | None, other: StaticParameters | None) -> bool:
    return one is other if one is None or other is None else one.same_codes(other)


def _fill_ledger(ledger: Ledger, parts: Sequence[tuple[Ledger, Sequence[int]]], device: torch.device) -> None:
    lengths, packed, reach = (
        [values(source)[row] for source, rows in parts for row in rows]
        for values in (lambda of: of.lengths, lambda of: of.packed, lambda of: of.save().reach)
    )
    longest = max(lengths)
    real = None
    if min(lengths) < longest:
        columns = torch.arange(longest, device=device)
        real = columns >= longest - torch.tensor(lengths, device=device).unsqueeze(1)
    ledger.restore(
        Saved(
            seq_length=longest,
            lengths=lengths,
            packed=packed,
            is_real=real,
            most=longest,
            fewest_packed=min(packed),
            reach=reach,
            tokens=None,
            counts={},
        )
    )
