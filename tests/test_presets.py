"""Presets: a name for some options, wherever options are taken."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_pair, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from modules.cache import saved
from modules.cli.benchmark.flags import Benchmark
from modules.cli.command import parse
from modules.kivi_cache_general import PRESETS, KIVICache
from modules.models.attach import attach_kivi
from modules.models.families import classes_of
from modules.options import FULL_PRECISION_BITS, KIVIOptions, with_preset

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 512,
}


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(**SIZES)


def average(options: KIVIOptions, head_dim: int) -> float:
    return sum(options.stored_bits(*options.bits_of_layer(0, 1), head_dim)) / 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_stores_what_is_said(head_dim):
    bits = [
        average(KIVIOptions.from_config(None, {"preset": name}), head_dim) for name in ("small", "balanced", "quality")
    ]
    assert bits[0] < 2.5 < bits[1] == 3.0 < bits[2] < 5 < FULL_PRECISION_BITS
    assert KIVIOptions.from_config(None, {"preset": "balanced"}) == KIVIOptions()


def test_what_is_given_beside_it_counts_more():
    assert with_preset({"preset": "quality", "k_bits": 2}) == {"k_bits": 2, "v_bits": 4}
    assert with_preset({"preset": None, "k_bits": 8}) == {"k_bits": 8}
    with pytest.raises(ValueError, match="preset must be one of small, balanced, quality, or None; got 'best'"):
        with_preset({"preset": "best"})


def test_models_and_caches_take_it(config, tmp_path):
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    classes = classes_of("llama")
    model = classes.causal_lm.from_pretrained(tmp_path, preset="quality", v_bits=2)
    assert (model.config.k_bits, model.config.v_bits) == (4, 2)
    assert model.create_kivi_cache(preset="small").options.group_size == 128
    assert KIVICache(config, preset="small").options.group_size == 128
    attached = attach_kivi(LlamaForCausalLM(config), preset="quality")
    assert attached.config.k_bits == attached.config.v_bits == 4
    with pytest.raises(ValueError, match=r"preset='small' is for from_pretrained\(\)"):
        classes.config(preset="small", **SIZES)
    with pytest.raises(ValueError, match="preset must be one of"):
        classes.causal_lm.from_pretrained(tmp_path, preset="tiny")


def test_a_flag_stands_for_those_of_a_preset(capsys):
    assert parse(Benchmark, ["folder", "--preset", "quality", "--k-bits", "8"], description="").cache == KIVIOptions(
        k_bits=8, v_bits=4
    )
    assert parse(Benchmark, ["folder", "--preset=small"], description="").cache == KIVIOptions(**PRESETS["small"])
    with pytest.raises(SystemExit) as ended:
        parse(Benchmark, ["folder", "--preset", "best"], description="")
    assert ended.value.code == 2 and "preset must be one of" in capsys.readouterr().err


def test_a_small_cache_goes_on_like_any_other(config):
    torch.manual_seed(0)
    model = attach_kivi(LlamaForCausalLM(config).eval(), preset="small", backend="torch")
    cache, ids = model.create_kivi_cache(), tokens(1, 400)
    with torch.no_grad():
        out = torch.cat(
            [model(part, past_key_values=cache).logits for part in ids.split([390, *[1] * 10], dim=1)], dim=1
        )
        full = model(ids, use_cache=False).logits
    assert cache.get_seq_length() == 400 and cache.kivi_layers[0].store.packed == [256]
    assert 0 < (out - full).norm() / full.norm() < 0.1


def test_files_from_before_keep_what_none_meant():
    """Version 1: a quarter of the channels wide, metadata of 16 bits."""
    model = make_pair("llama", backend="torch")[1]
    cache = model.create_kivi_cache(wide_channels=0.25, metadata_bits=16)
    before = {**{name: getattr(cache.options, name) for name in KIVIOptions.names()}, "wide_channels": None}
    del before["metadata_bits"]
    meant = saved._as_meant(json.loads(json.dumps(before)))
    assert KIVIOptions(**meant) == cache.options
    assert saved._as_meant({"k_range": "minmax"}) == {"k_range": "minmax", "metadata_bits": None, "wide_channels": None}
