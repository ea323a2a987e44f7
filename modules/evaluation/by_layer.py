"""Bits and wide channels of each layer, chosen for a model by a text, as a result that caches are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from modules.evaluation.budget import BITS, Choice, choose
from modules.evaluation.curvature import record_layers
from modules.evaluation.environment import Environment
from modules.evaluation.layers import measure_layers
from modules.evaluation.results import BenchmarkResult
from modules.evaluation.texts import digest
from modules.options import KIVIOptions, head_dim_of, rotary_share

NAME = "layers"
GROUPS = (32, 64, 128)  # tokens of a group of keys; values have groups of 64 channels where they divide a head
CHOSEN = ("k_bits", "v_bits", "wide_channels", "metadata_bits", "group_size", "v_group_size")


def choose_by_layer(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    bits: Sequence[float] = (BITS,),
    options: Mapping[str, Any] | None = None,
    model_name: str = "",
    text_name: str = "",
    progress: Callable[[str, int], None] | None = None,
) -> list[BenchmarkResult]:
    """Choose the options by which the first tokens of a text predict that a cache costs least.

    Args:
        model: a Llama or Qwen, stock or with KIVI caches.
        input_ids: int64 `[1, T]`; predictions count from its first quarter on.
        bits: a stored element may take on average; what costs is measured once for all of them.
        options: KIVI options other than those that are chosen; `metadata_bits` is 8 where it is not among them.
        model_name, text_name: for the record.
        progress: called with what was measured and the number of such steps, after each.

    Returns:
        A result for each of `bits`, with a row a layer; `settings["options"]` are the options, `settings["kl"]` is the predicted
        divergence (nats).

    Raises:
        ValueError: for fewer bits than any options take, options that are not allowed, and a text that is too short.
    """
    head_dim, rotary = head_dim_of(model.config), int(rotary_share(model.config) * head_dim_of(model.config))
    frames = [frame for group in GROUPS if (frame := _frame(group, head_dim, options or {})) is not None]
    if not frames:
        raise ValueError(
            f"groups of {', '.join(map(str, GROUPS))} do not fit: none divides residual_length, and heads of {head_dim} channels "
            "where 64 does not; give another residual_length."
        )
    states = record_layers(model, input_ids, rotary, skip=input_ids.shape[-1] // 4)
    total = len(frames) * len(states)

    def tick() -> None:
        if progress is not None:
            progress("ways to store each layer", total)

    costs = [measure_layers(states, frame, tick) for frame in frames]
    about = {
        "model": model_name,
        "text": text_name,
        "tokens": input_ids.shape[1],
        "digest": digest(input_ids),
    }
    return [_result(choose(costs, most), most, Environment.here(model), about) for most in bits]


def _result(choice: Choice, most: float, environment: Environment, about: dict[str, Any]) -> BenchmarkResult:
    found = {"options": choice.options, "at_most": most, "bits": choice.bits, "kl": choice.kl}
    return BenchmarkResult(NAME, _rows(choice), environment, {**about, **found})


def _frame(group: int, head_dim: int, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options that all layers have with keys in groups of `group`; None where these do not fit."""
    residual = options.get("residual_length", KIVIOptions().residual_length)
    of_values = 64 if head_dim % 64 == 0 else group
    if head_dim % of_values or residual % group:
        return None
    return {"metadata_bits": 8, **options, "group_size": group, "v_group_size": of_values}


def _rows(choice: Choice) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            **{name: value[layer] for name, value in choice.options.items() if isinstance(value, list)},
            "kl_of_keys": choice.keys[layer],
            "kl_of_values": choice.values[layer],
        }
        for layer in range(len(choice.keys))
    ]
