"""Attention by products of bytes (Numba) against torch's exact one, over the same codes."""

import os
import subprocess
import sys
from pathlib import Path

import products
import pytest
import torch
from common import offline_text
from conftest import real_model_path
from layers import attend_and_store, make_layer, random_states, relative_error

from modeling_llama_kivi import load_llama_kivi
from modules.kernels.registry import backend
from modules.options import KIVIOptions
from modules.store.step import Step

pytest.importorskip("numba", reason="Numba is not installed: `pip install numba` to test its kernels")

from modules.kernels.numba import attention, host  # noqa: E402

TORCH, NUMBA = backend("torch"), backend("numba")
# Rounding the weights of a tile of 128 tokens to 255 steps: √(128 / 12) / 255 = 0.013 of the largest at most, where values are
# as random as here; rounding queries to 127 steps adds less.
BOUND = 2e-2
HERE = Path(__file__).resolve().parent

# bits, kv_heads, gqa, head_dim, group, dtype, share of wide channels: each is a compilation of seconds
PLANS = [
    ((2, 2), 2, 4, 128, 32, torch.float32, 1 / 4),  # 8 bytes of low bits a token
    ((2, 4), 1, 8, 80, 16, torch.float16, 1 / 4),  # 5 bytes, vectors of 4 for values
    ((4, 4), 1, 1, 256, 128, torch.bfloat16, 0.0),
    ((4, 4), 2, 4, 128, 32, torch.float32, 1 / 4),  # wide ones of 6 bits
    ((8, 2), 1, 3, 64, 64, torch.float32, 0.0),  # codes of 8 bits meet exact queries
]
EXTREME = PLANS[0]

pytestmark = pytest.mark.skipif(not host.byte_products(), reason="this CPU multiplies no bytes")


def layer_of(plan, lengths, **more):
    """A layer of random tokens for one of the `PLANS`."""
    bits, kv_heads, _, head_dim, group, dtype, share = plan
    options = {"group_size": group, "residual_length": group, "wide_channels": share, **more}
    return make_layer(lengths, bits=bits, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, **options)


def new_states(layer, gqa, new=1, seed=0):
    """Query, key and value of new tokens."""
    batch, kv_heads, _, head_dim = layer.key.window.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, new, head_dim) for count in (kv_heads * gqa, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(layer.key.window.dtype) for shape in shapes]


def both(layer, states, scaling=None):
    """What the kernels and torch give."""
    step = Step.of(None, layer.batch_size, states[0].shape[2])
    scaling = layer.key.window.shape[-1] ** -0.5 if scaling is None else scaling
    return [one.attend(*states, layer, scaling, step) for one in (NUMBA, TORCH)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_attention_is_that_of_torch_but_for_rounding(plan):
    group = plan[4]
    used = attention._plan(layer_of(plan, [1]), rows=plan[2])
    assert (used.k_in_bytes, used.v_in_bytes) == tuple(bits < 8 for bits in plan[0])
    for lengths in ([1], [2 * group + 3], [3 * group + 4, 5 * group + 9, 2], [1403]):
        layer = layer_of(plan, lengths)
        out, ref = both(layer, new_states(layer, plan[2], seed=lengths[0]))
        assert relative_error(out, ref) < BOUND, lengths


def test_exact_products_are_exact():
    errors = []
    for exact in (False, True):
        layer = layer_of(EXTREME, [1403], exact_products=exact)
        errors.append(relative_error(*both(layer, new_states(layer, EXTREME[2]))))
    assert errors[1] < 1e-5 < errors[0] < BOUND


def test_several_new_tokens_and_decode_steps():
    layer = layer_of(PLANS[-1], [400, 77])
    out, ref = both(layer, new_states(layer, PLANS[-1][2], new=9))
    assert relative_error(out, ref) < BOUND
    for seed in range(3):
        states = new_states(layer, PLANS[-1][2], seed=seed)
        ref = TORCH.attend(states[0], *layer.enter(*states[1:]), layer, 0.1, Step.of(None, 2, 1))
        assert relative_error(NUMBA.decode(*states, layer, 0.1), layer.leave(ref)) < BOUND
        layer.ledger.commit(Step.of(None, 2, 1))


def test_one_token_that_dominates():
    """Its weight is 255 steps; what the others weigh together is less than half of one."""
    layer = layer_of(EXTREME, [600])
    states = new_states(layer, EXTREME[2])
    keys = layer.read(layer.key, slice(None), torch.float32)
    states[0] = 4 * keys[:, :, 200:201].repeat_interleave(EXTREME[2], 1)  # stored in bytes
    weights = torch.softmax(states[0] @ keys.repeat_interleave(EXTREME[2], 1).mT * 0.1, -1)
    assert weights[..., 200].min() > 0.99
    assert relative_error(*both(layer, states, 0.1)) < BOUND


def test_outliers_among_key_channels():
    """Channels 30 times as large as the others, some of them wide and some not."""
    layer = layer_of(EXTREME, [1])
    keys, values = random_states((1, 2, 700, 128), seed=3)
    keys[..., [3, 40, 77, 101]] *= 30
    for token in (slice(0, 400), slice(400, 700)):
        states = [keys[:, :, token], values[:, :, token]]
        query = torch.randn(1, 8, states[0].shape[2], 128, generator=torch.Generator().manual_seed(4))
        attend_and_store(NUMBA, query, *states, layer, 0.01)
    assert relative_error(*both(layer, new_states(layer, EXTREME[2]), 0.01)) < BOUND


def test_equal_weights_lose_no_mass():
    """30,000 tokens of one score: a weight is less than a step of what the whole sums up to."""
    layer = layer_of(EXTREME, [30_000], k_range="minmax", v_range="minmax", v_rotation=True)
    states = new_states(layer, EXTREME[2])
    states[0].zero_()
    out, ref = both(layer, states)
    assert relative_error(out, ref) < BOUND


def test_a_tile_of_small_weights_counts():
    """One token of the window has half of the weight, and thousands of packed ones the other half."""
    layer = layer_of(EXTREME, [4000])
    states = new_states(layer, EXTREME[2])
    states[1] = states[0][:, :: EXTREME[2]] * 8 / states[0][:, :: EXTREME[2]].square().sum(-1, keepdim=True)
    states[0] *= 0.01
    states[1] *= 100
    out, ref = both(layer, states, 1.0)
    assert relative_error(out[:, :, :: EXTREME[2]], ref[:, :, :: EXTREME[2]]) < BOUND


def test_nan_stays_nan_and_with_its_row():
    layer = layer_of(EXTREME, [300])
    states = new_states(layer, EXTREME[2])
    states[0][0, 3, 0, 5] = torch.nan
    out, _ = both(layer, states)
    assert out[0, 0, 3].isnan().all() and not out[0, 0, [0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.real_model
def test_logits_are_those_of_exact_products():
    """Over the same codes."""
    path = real_model_path("llama")
    model, tokenizer = load_llama_kivi(path, dtype=torch.float32)
    ids = tokenizer(offline_text("compound"), return_tensors="pt").input_ids[:, :1024]
    kl, equal = products.measure(model, ids, KIVIOptions(), skip=896)
    assert 0 < kl < 1e-4 and equal > 0.95


ELSEWHERE = """
import sys, torch
sys.path[:0] = {path!r}
import test_byte_products as cases
from modules.kernels.numba import host
print(host.host(), host.byte_products())
for plan in cases.PLANS[::3]:
    layer = cases.layer_of(plan, [533])
    print(cases.relative_error(*cases.both(layer, cases.new_states(layer, plan[2]))))
"""


@pytest.mark.skipif(not host.host_has("avx2"), reason="needs AVX2")
def test_a_cpu_with_avx2_alone():
    """As on CPUs without VNNI: sums of two products in 16 bits must not overflow."""
    cpu = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+ssse3,+sse4.2"}
    code = ELSEWHERE.format(
        path=[str(path) for path in (HERE, *(HERE.parent / name for name in (".", "examples", "benchmarks")))]
    )
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, **cpu}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kind, *errors = run.stdout.splitlines()
    assert kind == "(8, 8) pairs"
    assert len(errors) == 2 and all(1e-5 < float(error) < BOUND for error in errors)
