"""One decode step of a whole model on the CPU: transformers' caches against KIVI caches, in turns within one run.

The caches are filled with random keys and values of the model's shapes (the time of a step does not depend on them); each
round then takes one step with every cache, so that what else the machine does hits them alike. A `StaticCache` is just large
enough for all rounds; "compiled" is the stock model's forward under `torch.compile` with one, and for KIVI the model with
`compile_decode`. With int8 weights all of them have the same.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from modules.codecs.static import ChannelScales, StaticParameters, model_facts
from modules.evaluation.timing import WARM_UP, percentiles, take_turns
from modules.kivi_cache_general import KIVICache
from modules.options import head_dim_of
from modules.store.step import Step

STATIC = "static INT8, numba"
_TOKEN = torch.tensor([[100]])
_RANGE = 4.0  # of random states, for their scales
COMPILED = "StaticCache, compiled"
CONTENDERS: dict[str, dict[str, Any]] = {
    "KIVI 2 bits, torch": {"backend": "torch"},
    "KIVI 2 bits, numba": {"backend": "numba"},
    "KIVI 4 bits, numba": {"k_bits": 4, "v_bits": 4, "backend": "numba"},
    "KIVI 8 bits, numba": {"k_bits": 8, "v_bits": 8, "backend": "numba"},
    STATIC: {"static": True, "backend": "numba"},
}
COMPILED_STEPS = ("KIVI 2 bits, numba", STATIC)  # those that are also compiled


def scales_of_random_states(config: PreTrainedConfig) -> StaticParameters:
    """Static INT8 for states that nobody calibrated on, the same scale for all channels: what they are takes no time."""
    facts = model_facts(config)
    high = torch.full((facts["num_key_value_heads"], facts["head_dim"]), _RANGE)
    scales, layers = ChannelScales.from_range(-high, high, symmetric=True), range(facts["num_hidden_layers"])
    ranges = (-high, high, -high, high)
    return StaticParameters(dict.fromkeys(layers, (scales, scales)), facts, {}, dict.fromkeys(layers, ranges), 0)


def fill(caches: dict[str, Cache], config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> None:
    """Put the same random tokens into every layer of every cache."""
    shape = (1, config.num_key_value_heads, tokens, head_dim_of(config))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
    step = Step.of(None, 1, tokens)
    for cache in caches.values():
        if isinstance(cache, KIVICache):
            for layer in cache.kivi_layers:
                layer.append(key, value, step)
            cache.ledger.commit(step)
        else:
            for index in range(config.num_hidden_layers):
                cache.update(key.clone(), value.clone(), index)


def _step(model: PreTrainedModel, cache: Cache, compiles: bool) -> torch.Tensor:
    model.config.compile_decode = compiles  # the model's own setter would check all options anew
    return model(_TOKEN, past_key_values=cache).logits


def measure_steps(
    model: PreTrainedModel,
    tokens: int,
    contenders: Mapping[str, dict[str, Any]],
    rounds: int,
    stock: PreTrainedModel | None = None,
    compiled: Collection[str] = (),
    suffix: str = "",
) -> list[dict[str, Any]]:
    """p20, p50 and p80 of a step in milliseconds at `tokens` tokens of context, of transformers' caches and KIVI caches.

    Args:
        contenders: options of the KIVI caches, by name; `static` stands for static INT8.
        rounds: steps of each.
        stock: the stock model, which is compiled; None leaves that out.
        compiled: contenders that are measured a second time, with `compile_decode`.
        suffix: to the dtype in the rows, for other weights.

    Raises:
        ValueError: where `compiled` steps could not be compiled.
    """
    room = tokens + rounds + 2 * WARM_UP
    caches: dict[str, Cache] = {
        "StaticCache": StaticCache(model.config, max_cache_len=room),
        "DynamicCache": DynamicCache(),
    }
    steps = {name: functools.partial(_step, model, cache, False) for name, cache in caches.items()}
    for name, options in contenders.items():
        static = {"static": scales_of_random_states(model.config)} if "static" in options else {}
        for compiles in (False, True) if name in compiled else (False,):
            own = f"{name}, compiled" if compiles else name
            caches[own] = model.create_kivi_cache(**{**options, **static})
            steps[own] = functools.partial(_step, model, caches[own], compiles)
    if stock is not None:
        caches[COMPILED] = StaticCache(model.config, max_cache_len=room)
        # each length is a program of its own, as for a user who has one length
        program = torch.compile(stock.forward, dynamic=False)
        steps[COMPILED] = functools.partial(program, _TOKEN, past_key_values=caches[COMPILED])
    with torch.inference_mode():
        fill(caches, model.config, tokens, model.dtype)
        times = take_turns(steps, rounds)
    refused = model._decode_program.refused
    if compiled and refused:
        raise ValueError(f"steps of this model cannot be compiled: {refused}.")
    about = {"tokens": tokens, "dtype": str(model.dtype).removeprefix("torch.") + suffix}
    rows: list[dict[str, Any]] = [{"cache": name, **about, **percentiles(samples)} for name, samples in times.items()]
    return [row | {"speedup": rows[0]["p50_ms"] / row["p50_ms"]} for row in rows]
