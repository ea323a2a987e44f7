"""Sequences of several caches in a new one are what they were, bit for bit."""

import copy

import pytest
import torch
from conftest import make_pair, relative_error, tokens
from transformers import Qwen3NextConfig

from modules.cache.rows import can_gather, gather
from modules.calibration import calibrate
from modules.kivi_cache_general import KIVICache
from modules.store.live import live_tensors

LENGTHS = (7, 150, 61, 300)  # sinks and window alone, packed groups, none yet


def filled(model):
    caches = [model.create_kivi_cache() for _ in LENGTHS]
    for seed, (cache, length) in enumerate(zip(caches, LENGTHS)):
        model(tokens(1, length, seed), past_key_values=cache)
    return caches


def same(one: KIVICache, other: KIVICache) -> bool:
    held = [[live_tensors(layer.store) for layer in cache.kivi_layers] for cache in (one, other)]
    return one.ledger.lengths == other.ledger.lengths and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(*held)
    )


@pytest.mark.parametrize("bits", [(2, 2), (16, 4)])
@torch.no_grad()
def test_gathered_sequences_go_on_as_alone(bits):
    """Through several flushes, then back alone: the codes that a batch packed are those of each alone up to rounding."""
    model = make_pair("llama", backend="torch", k_bits=bits[0], v_bits=bits[1])[1]
    caches = filled(model)
    batch = gather([(cache, [0]) for cache in caches])
    assert all(same(gather([(batch, [row])]), cache) for row, cache in enumerate(caches))
    for seed in range(70):
        new = tokens(len(caches), 1, 100 + seed)
        together = model(new, past_key_values=batch).logits
        alone = torch.cat([model(new[row : row + 1], past_key_values=cache).logits for row, cache in enumerate(caches)])
        assert relative_error(together, alone) < 1e-4
    fewer = gather([(batch, [3, 1]), (caches[0], [0])])
    assert fewer.ledger.lengths == [370, 220, 77] and fewer.ledger.packed == [
        cache.ledger.packed[0] for cache in (caches[3], caches[1], caches[0])
    ]
    new = tokens(3, 1, 9)
    logits = model(new, past_key_values=fewer).logits
    alone = [model(new[place : place + 1], past_key_values=caches[row]).logits for place, row in enumerate((3, 1, 0))]
    assert relative_error(logits, torch.cat(alone)) < 1e-4


@torch.no_grad()
def test_a_crop_is_the_same_after_it():
    """The window holds packed tokens too, as long as nothing took their slots; they are gathered along."""
    model = make_pair("llama", backend="torch")[1]
    cache = filled(model)[3]
    copy = gather([(cache, [0])])
    for each in (cache, copy):
        each.crop(-40)
    assert same(cache, copy)


@torch.no_grad()
def test_static_caches_are_gathered_by_equal_scales(tmp_path):
    """Each may have read the file itself; scales of another calibration are refused."""
    stock, model = make_pair("llama", backend="torch")
    spec = [{"type": "dynamic_cache", "qconfig": {}}]
    for name, seed in (("one", 1), ("other", 2)):
        calibrate(stock, spec, [tokens(4, 51, seed=seed)], progress=False).save(tmp_path / name)
    caches = [model.create_kivi_cache(static=tmp_path / "one") for _ in range(2)]
    assert caches[0].static is not caches[1].static
    for seed, (cache, length) in enumerate(zip(caches, (9, 30))):
        model(tokens(1, length, seed), past_key_values=cache)
    caches.append(copy.deepcopy(caches[1]))
    assert caches[2].static is caches[1].static
    batch = gather([(cache, [0]) for cache in caches])
    assert all(same(gather([(batch, [row])]), cache) for row, cache in enumerate(caches))
    new = tokens(3, 1, 9)
    together = model(new, past_key_values=batch).logits
    alone = [model(new[row : row + 1], past_key_values=cache).logits for row, cache in enumerate(caches)]
    assert relative_error(together, torch.cat(alone)) < 1e-4
    for static in (tmp_path / "other", False):
        other = model.create_kivi_cache(static=static)
        model(tokens(1, 5), past_key_values=other)
        with pytest.raises(ValueError, match="caches of the same|have the same group_size"):
            gather([(caches[0], [0]), (other, [0])])


@torch.no_grad()
def test_what_cannot_be_gathered_is_refused():
    model = make_pair("llama", backend="torch")[1]
    cache, *_ = filled(model)
    with pytest.raises(ValueError, match="of the same options"):
        other = model.create_kivi_cache(v_bits=4)
        model(tokens(1, 5), past_key_values=other)
        gather([(cache, [0]), (other, [0])])
    with pytest.raises(ValueError, match="hold tokens"):
        gather([(cache, [0]), (model.create_kivi_cache(), [0])])
    hybrid = KIVICache(Qwen3NextConfig(num_hidden_layers=4, head_dim=64), group_size=16, residual_length=32)
    assert can_gather(cache) and not can_gather(hybrid)
    with pytest.raises(ValueError, match="every layer is packed"):
        gather([(hybrid, [0])])
