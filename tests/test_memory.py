"""Bytes that are real: planned ones by the bits of an element, and what a decode step allocates."""

import pytest
import torch
from layers import attend_and_store, empty_layer, put
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from modules.cache.plan import planned_cache
from modules.cache.report import nominal_bits
from modules.kernels.registry import pick_backend
from modules.kivi_cache_general import KIVICache
from modules.options import KIVIOptions


def config_of(layers, heads, head_dim):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    return LlamaConfig(hidden_size=heads * head_dim, **sizes)


def filled(batch, tokens, dtype=torch.float16, **options):
    cache = KIVICache(config_of(2, 3, 64), **options)
    states = [torch.randn(batch, 3, tokens, 64).to(dtype) for _ in "kv"]
    for layer in range(2):
        cache.update(*states, layer)
    return cache


@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 8), (2, 4), (16, 2)])
def test_a_planned_cache_takes_what_the_bits_say(bits):
    """Stored bits of packed elements, and the sinks and the whole ring in the model's dtype; a few percent of room beyond."""
    options = KIVIOptions(k_bits=bits[0], v_bits=bits[1])
    size = planned_cache(config_of(2, 3, 64), 4096, batch_size=8, options=options).get_cache_info()["bytes"]
    elements, packed = 8 * 2 * 3 * 64, 4096 - 4 - 128 - 28
    expected = elements * (packed * sum(options.stored_bits(*bits, 64)) / 8 + 2 * 2 * (4 + 160))
    assert packed % 32 == 0 and expected <= size["total"] <= 1.06 * expected
    assert size["dense"] == 2 * 2 * elements * 4096


def test_an_8b_model_at_32k_tokens_is_five_times_smaller():
    figures = planned_cache(config_of(32, 8, 128), 32768, reserve=True).get_cache_info()["bytes"]
    assert figures["ratio"] > 5.1
    assert figures["dense"] == 2 * 32 * 8 * 128 * 32768 * 2


def test_two_bits_store_three():
    assert sum(KIVIOptions().stored_bits(2, 2, 128)) / 2 == 3.0
    assert sum(KIVIOptions().stored_bits(2, 2, 64)) / 2 == 3.0
    assert KIVIOptions().stored_bits(4, 4, 128) == (5.25, 4.5)
    assert KIVIOptions(metadata_bits=16).stored_bits(4, 4, 128) == (5.5, 5.0)
    assert KIVIOptions(k_range="minmax", sink_length=0).stored_bits(2, 2, 128) == (3.0, 3.0)
    bits = filled(1, 4096).get_cache_info()["bits"]
    assert bits["packed"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    "tokens,bits",
    [(256, 9.00), (512, 5.50), (1024, 3.75), (2048, 2.875), (4096, 2.4375), (8192, 2.21875), (32768, 2.0546875)],
)
def test_nominal_bits_follow_the_table(tokens, bits):
    assert nominal_bits(tokens, 2, 128) == bits


class LargestOutput(TorchDispatchMode):
    """Bytes of the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 8), (2, 16), (16, 2)])
@pytest.mark.parametrize("shape", [(1, 3, 3, 64), (1, 8, 4, 128), (4, 2, 7, 64)])
def test_a_decode_step_makes_no_large_temporaries(dtype, bits, shape):
    batch, heads, gqa, head_dim = shape
    tokens = 4096
    key, value = (torch.randn(batch, heads, tokens, head_dim).to(dtype) for _ in "kv")
    layer = empty_layer(batch, bits=bits, kv_heads=heads, head_dim=head_dim, dtype=dtype)
    backend = pick_backend("torch", layer)
    put(layer, backend, key, value, [tokens] * batch)
    query = torch.randn(batch, heads * gqa, 1, head_dim).to(dtype)
    dense = key.nbytes + value.nbytes
    with LargestOutput() as seen:
        attend_and_store(backend, query, key[:, :, :1], value[:, :, :1], layer, 0.1)
    assert 0 < seen.largest <= dense / 8
