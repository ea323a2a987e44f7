"""By what a saved cache knows the model that filled it: the values of its config, and some of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modules.options import config_fields

SAMPLES = 16  # values a parameter
_STRIDE = 0x9E3779B1  # 2^32 over the golden ratio: multiples of it lie evenly in whatever they are taken modulo
_NOT_OF_THE_STATES = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
) | set(config_fields())  # of a config: what keys and values do not depend on


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config may decide keys and values, as JSON has it."""
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_STATES}
    values["model_type"] = config.model_type.removesuffix("_kivi")
    return json.loads(json.dumps(values, default=str))


def check_config(known: Mapping[str, Any], config: PreTrainedConfig, where: str) -> None:
    """Raise `ValueError` where a config differs in a value from the ones that are known from `where`; those that only one has
    are not compared, as versions of transformers add some."""
    here = config_values(config)
    differing = _differing({name: (known[name], here[name]) for name in known if name in here}, where)
    if differing:
        raise ValueError(
            f"this is not the model that filled the cache: {differing}. Use that model, or prefill again with this one."
        )


def check_options(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `ValueError` where an option is wanted to be another than it was saved with."""
    pairs = {name: (saved.get(name), json.loads(json.dumps(value))) for name, value in wanted.items()}
    differing = _differing(pairs, "the file")
    if differing:
        raise ValueError(
            f"the cache was saved with other options: {differing}. What is packed stays as it is: leave the options out, or "
            "prefill again."
        )


def _differing(pairs: Mapping[str, tuple[Any, Any]], where: str) -> str:
    """In words, the first few values that are not the same; "" where all are."""
    found = [
        f"{name} is {there!r} in {where} and {here!r} here" for name, (there, here) in pairs.items() if there != here
    ]
    return "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as torch has it: "float32"."""
    return str(dtype).removeprefix("torch.")


class Weights(NamedTuple):
    """A sample of the weights of a model.

    Attributes:
        dtypes: of each parameter, by its name within the base model.
        values: float32 `[parameters, SAMPLES]`, NaN for parameters that are not there to be read (offloaded by accelerate).
    """

    dtypes: dict[str, str]
    values: torch.Tensor


@torch.no_grad()
def sample_weights(model: PreTrainedModel) -> Weights:
    """`SAMPLES` values of each parameter of the base model, evenly spread: another checkpoint is told by them, also one of
    the same shape or name. A change of few single values may lie between them; buffers and the head are not looked at."""
    named = dict(model.base_model.named_parameters())
    rows = [_sample(parameter) for parameter in named.values()]
    values = torch.stack([row.cpu() for row in rows]) if rows else torch.zeros(0, SAMPLES)
    return Weights({name: dtype_name(parameter.dtype) for name, parameter in named.items()}, values)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    count = parameter.numel()
    if parameter.device.type == "meta" or not count:
        return torch.full((SAMPLES,), torch.nan)
    places = torch.tensor([number * _STRIDE % count for number in range(1, SAMPLES + 1)], device=parameter.device)
    return parameter.detach().reshape(-1)[places].float()


def check_weights(saved: Weights, model: PreTrainedModel) -> None:
    """Raise `ValueError` where the weights of a model are not those saved.

    In the same dtype they must be equal; in another they may differ by its rounding.
    """
    here = sample_weights(model)
    others = sorted(saved.dtypes.keys() ^ here.dtypes.keys())
    if others:
        raise ValueError(
            f"the model has other parameters than the one that filled the file, {others[0]} for instance ({len(others)} in "
            "all): load the file with that model."
        )
    values = dict(zip(here.dtypes, here.values))
    differing = []
    for name, then in zip(saved.dtypes, saved.values):
        pair = _first_difference(then, values[name], _tolerance(saved.dtypes[name], here.dtypes[name]))
        if pair is not None:
            differing.append((name, *pair))
    if differing:
        name, then, now = differing[0]
        raise ValueError(
            f"the weights are not those of the model that filled the file: {len(differing)} of {len(values)} parameters differ, "
            f"{name} for instance has {then:.6g} in the file and {now:.6g} here. Load the file with that model, or prefill "
            "again with this one."
        )


def _tolerance(saved: str, here: str) -> float:
    """By how much a value may differ, relatively, between two dtypes."""
    if saved == here:
        return 0.0
    dtypes = [getattr(torch, name) for name in (saved, here)]
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def _first_difference(then: torch.Tensor, now: torch.Tensor, tolerance: float) -> tuple[float, float] | None:
    smallest = 2**-24 if tolerance else 0.0  # a step of float16 near zero
    differ = (then - now).abs() > tolerance * then.abs() + smallest  # False for NaN
    if not differ.any():
        return None
    place = int(differ.to(torch.uint8).argmax())
    return then[place].item(), now[place].item()
