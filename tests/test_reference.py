"""The torch backend against dense attention over the dequantized cache, which is the definition of right."""

import itertools

import pytest
import torch
from conftest import relative_error
from layers import make_layer

from modules.kernels.reference import BACKEND, attention, rebuilt
from modules.kernels.reference import MANY_TOKENS as BACKEND_TOKENS
from modules.store.step import Step

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def filled_layer(lengths, heads, head_dim, bits, group, dtype, residual=None):
    """A layer that holds `lengths[b]` random tokens of sequence `b`, put in by a prefill and single tokens."""
    residual = group * 2 if residual is None else residual
    return make_layer(
        lengths, bits=bits, kv_heads=heads, head_dim=head_dim, dtype=dtype, group_size=group, residual_length=residual
    )


def dense_attention(query, key, value, layer, scaling, new_lengths):
    """Softmax over the dequantized past and the new tokens, one sequence at a time, in float64."""
    out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3], dtype=torch.float64)
    for row, count in enumerate(new_lengths):
        rows = slice(row, row + 1)
        keys, values = (
            torch.cat([layer.read(side, rows, torch.float64), new[rows, :, :count].double()], dim=2)
            for side, new in ((layer.key, key), (layer.value, value))
        )
        group = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        scores = query[rows, :, :count].double() @ keys.transpose(-1, -2) * scaling
        future = torch.ones(count, keys.shape[2], dtype=torch.bool).triu(keys.shape[2] - count + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out[row, :count] = (weights @ values)[0].transpose(0, 1)
    return out


def check(
    lengths, kv_heads, gqa, head_dim, bits, group, dtype, new, new_lengths=None, residual=None, attend=BACKEND.attend
):
    layer = filled_layer(lengths, kv_heads, head_dim, bits, group, dtype, residual)
    generator = torch.Generator().manual_seed(99)
    shape = (len(lengths), kv_heads, new, head_dim)
    query = torch.randn(len(lengths), kv_heads * gqa, new, head_dim, generator=generator).to(dtype)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
    counts = new_lengths or [new] * len(lengths)
    out = attend(query, key, value, layer, head_dim**-0.5, Step.of_lengths(counts, new))
    ref = dense_attention(query, key, value, layer, head_dim**-0.5, counts)
    assert out.dtype == dtype and out.shape == ref.shape
    assert relative_error(out, ref) < TOLERANCE[dtype]
    for row, count in enumerate(counts):
        assert not out[row, count:].any()


@pytest.mark.parametrize("k_bits,v_bits", list(itertools.product([2, 4, 8, 16], repeat=2)))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_pair_of_bits(k_bits, v_bits, dtype):
    check([300, 300], 2, 3, 64, (k_bits, v_bits), 32, dtype, 1)
    check([211], 1, 8, 128, (k_bits, v_bits), 64, dtype, 17)


@pytest.mark.parametrize("head_dim,group", [(64, 32), (64, 64), (96, 32), (128, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("gqa", [1, 3, 7, 8])
def test_shapes(head_dim, group, gqa):
    for new in (1, 2, 17, 200):
        check([group * 5 + 7], 2, gqa, head_dim, (2, 4), group, torch.float32, new)


BOUNDARIES = sorted(
    {0, 1, 3, 4, 5, 600} | {edge + d for edge in (32, 64, 96, 100, 128, 132, 164, 196, 292) for d in (-1, 0, 1)}
)


@pytest.mark.parametrize("length", BOUNDARIES)
@pytest.mark.parametrize("new", [1, 2, 200])
def test_lengths_around_every_boundary(length, new):
    check([length], 1, 3, 64, (2, 2), 32, torch.float32, new)


@pytest.mark.parametrize("residual", [0, 32, 128])
def test_windows(residual):
    for length in (1, 4, 36, 37, 170, 260):
        check([length], 1, 2, 64, (2, 2), 32, torch.float32, 3, residual=residual)


def test_ragged_batches_and_ragged_new_tokens():
    check([0, 5, 131, 400, 401], 2, 3, 64, (2, 2), 32, torch.float32, 1)
    check([0, 5, 131, 400, 401], 2, 3, 64, (4, 2), 32, torch.float32, 20, new_lengths=[20, 0, 3, 20, 1])


WAYS = {"over codes": attention.attend, "rebuilt": rebuilt.attend}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [(2, 2), (4, 16), (16, 8)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_ways_of_several_new_tokens(way, bits, dtype, monkeypatch):
    """Over short blocks, so that there are several of stored tokens, and of new ones."""
    monkeypatch.setattr(rebuilt, "_BLOCK_FLOATS", 2 * 64 * 70)
    monkeypatch.setattr(attention, "_NEW_SCORES", 2 * 3 * 50 * 20)
    check([300, 300], 2, 3, 64, bits, 32, dtype, 50, attend=WAYS[way])
    check([0, 5, 131, 400, 401], 2, 3, 64, bits, 32, dtype, 20, new_lengths=[20, 0, 3, 20, 1], attend=WAYS[way])


@pytest.mark.parametrize("new", [BACKEND_TOKENS - 1, BACKEND_TOKENS])
def test_many_new_tokens_have_the_past_rebuilt(new, monkeypatch):
    taken = []
    for name, way in (("codes", attention), ("rebuilt", rebuilt)):
        attend = way.attend
        monkeypatch.setattr(
            way, "attend", lambda *args, name=name, attend=attend: (taken.append(name), attend(*args))[1]
        )
    check([300], 2, 3, 64, (2, 2), 32, torch.float32, new)
    assert taken == ["codes" if new < BACKEND_TOKENS else "rebuilt"]


def test_a_long_cache_goes_through_several_blocks():
    check([9000], 2, 2, 128, (2, 2), 32, torch.float32, 1)


def test_large_offsets_of_keys():
    """Qwen2's keys sit far from zero; scores must not lose their differences to that."""
    layer = filled_layer([500], 1, 64, (4, 4), 32, torch.float32)
    layer.key.minimum += 300
    layer.key.window += 300
    layer.key.sinks += 300
    query, key, value = torch.randn(1, 4, 1, 64), torch.randn(1, 1, 1, 64) + 300, torch.randn(1, 1, 1, 64)
    out = BACKEND.attend(query, key, value, layer, 0.125, Step.of_lengths([1], 1))
    assert relative_error(out, dense_attention(query, key, value, layer, 0.125, [1])) < 1e-3
