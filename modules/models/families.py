"""The table of families, and the classes of each: stock classes of transformers with a KIVI cache.

A family is a row of `FAMILIES`; the names its classes go by are bound in `modeling_llama_kivi.py` and `modeling_qwen_kivi.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from modules.models.base_model import KIVIModelMixin
from modules.models.causal_lm import KIVIForCausalLMMixin
from modules.models.config import KIVIConfigMixin

SOURCE_OPTIONS = ("gguf_file", "revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: what its classes' names begin with, here and in transformers.
        model_type: as its checkpoints have it.
        module: where its classes are bound.
        helper: the function that loads it.
    """

    name: str
    model_type: str
    module: str
    helper: str


FAMILIES = {
    family.model_type: family
    for family in (
        Family("Llama", "llama", "modeling_llama_kivi", "load_llama_kivi"),
        Family("Qwen2", "qwen2", "modeling_qwen_kivi", "load_qwen_kivi"),
        Family("Qwen3", "qwen3", "modeling_qwen_kivi", "load_qwen_kivi"),
    )
}


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a family."""

    config: type[Any]
    sdpa_attention: type[Any]
    flash_attention: type[Any]
    decoder_layer: type[Any]
    model: type[Any]
    causal_lm: type[Any]


class KIVIFlashMixin:
    """Dense attention through transformers' `flash_attention_2`.

    Raises:
        ImportError: without the flash-attn package, saying how to get it.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        check_flash(type(self).__name__)
        super().__init__(config, layer_idx)  # type: ignore[call-arg]


def check_flash(name: str) -> None:
    """Raise `ImportError` without the flash-attn package."""
    if not is_flash_attn_2_available():
        raise ImportError(
            f"{name} needs the flash-attn package and a CUDA GPU: `pip install flash-attn --no-build-isolation`. Without it, "
            "use attn_implementation='sdpa' (the default)."
        )


@functools.cache
def classes_of(model_type: str) -> Classes:
    """The classes of a family, made once and registered with the Auto classes."""
    family = FAMILIES[model_type]
    stock = getattr(transformers.models, model_type)
    modeling = getattr(stock, f"modeling_{model_type}")

    def derive(suffix: str, bases: tuple[type, ...], doc: str, **attributes: Any) -> type[Any]:
        attributes |= {"__module__": family.module, "__doc__": doc}
        return type(f"{family.name}{suffix}", bases, attributes)

    name = family.name
    attention, layer = getattr(modeling, f"{name}Attention"), getattr(modeling, f"{name}DecoderLayer")
    config = derive(
        "KIVIConfig",
        (KIVIConfigMixin, getattr(transformers, f"{name}Config")),
        f"`{name}Config` with the options of the cache.",
        model_type=f"{model_type}_kivi",
    )
    sdpa = derive(
        "KIVISdpaAttention", (attention,), f"{name}'s attention; over a KIVI cache, dense parts run through SDPA."
    )
    flash = derive(
        "KIVIFlashAttention2",
        (KIVIFlashMixin, sdpa),
        f"{name}'s attention; over a KIVI cache, dense parts run through FlashAttention 2.",
    )
    decoder_layer = derive("KIVIDecoderLayer", (layer,), f"A decoder layer of {name} with KIVI attention.")
    shared = {"config_class": config, "_no_split_modules": [decoder_layer.__name__]}
    model = derive(
        "KIVIModel", (KIVIModelMixin, getattr(modeling, f"{name}Model")), f"The base model of {name}.", **shared
    )
    causal_lm = derive(
        "ForCausalLM_KIVI",
        (KIVIForCausalLMMixin, getattr(modeling, f"{name}ForCausalLM")),
        f"The causal LM: `{name}ForCausalLM_KIVI.from_pretrained(path, k_bits=2, v_bits=2)`.",
        **shared,
    )
    # transformers finds what outputs a model can capture by its class's name, which a constructor enters: the base model of
    # a causal LM is built as a stock one.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model), model._can_record_outputs)
    classes = Classes(config, sdpa, flash, decoder_layer, model, causal_lm)
    model.kivi_classes = causal_lm.kivi_classes = classes
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    return classes


def load_any(name: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A checkpoint of any family as a KIVI model, and its tokenizer; see `load_family`."""
    return load_family(FAMILIES, name, **kwargs)


def load_family(model_types: Iterable[str], name: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A checkpoint of one of some families as a KIVI model, and its tokenizer.

    Args:
        model_types: of the families.
        name: a folder or a name on the hub.
        kwargs: the cache's options (see `KIVIOptions`) and anything `from_pretrained` takes.

    Raises:
        ValueError: for a checkpoint of another family, and for an option that is unknown or not allowed.
    """
    allowed = tuple(model_types)
    source = {key: kwargs[key] for key in SOURCE_OPTIONS if key in kwargs}
    config = kwargs.get("config") or AutoConfig.from_pretrained(name, **source)
    model_type = config.model_type.removesuffix("_kivi")
    if model_type not in allowed:
        other = FAMILIES.get(model_type)
        hint = f" Use {other.helper}()." if other else ""
        raise ValueError(
            f"{name} is of the model type {config.model_type!r}; this helper loads {', '.join(allowed)}.{hint}"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    return classes_of(model_type).causal_lm.from_pretrained(name, **kwargs), tokenizer


__all__ = ["FAMILIES", "Classes", "Family", "classes_of", "load_any", "load_family"]
