"""The table of families, and the classes of each: stock classes of transformers with a KIVI cache.

A family is a row of `FAMILIES`; the names its classes go by are bound in `modeling_llama_kivi.py` and `modeling_qwen_kivi.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.utils import is_flash_attn_2_available
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from modules.models.attach import attach_kivi
from modules.models.base_model import KIVIModelMixin
from modules.models.causal_lm import KIVIForCausalLMMixin
from modules.models.config import FIELD_DEFAULTS, CompositeKIVIConfigMixin, KIVIConfigMixin, with_text_config
from modules.models.derived import derive

SOURCE_OPTIONS = ("gguf_file", "revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: what its classes' names begin with, here and in transformers.
        model_type: as its checkpoints have it.
        module: where its classes are bound.
        helper: the function that loads it.
        head: how the name of the class that generates ends; "ForConditionalGeneration" takes images beside text.
    """

    name: str
    model_type: str
    module: str
    helper: str
    head: str = "ForCausalLM"


_QWEN = ("modeling_qwen_kivi", "load_qwen_kivi")
_WITH_IMAGES = "ForConditionalGeneration"
FAMILIES = {
    family.model_type: family
    for family in (
        Family("Llama", "llama", "modeling_llama_kivi", "load_llama_kivi"),
        Family("Qwen2", "qwen2", *_QWEN),
        Family("Qwen2Moe", "qwen2_moe", *_QWEN),
        Family("Qwen2VL", "qwen2_vl", *_QWEN, _WITH_IMAGES),
        Family("Qwen2_5_VL", "qwen2_5_vl", *_QWEN, _WITH_IMAGES),
        Family("Qwen3", "qwen3", *_QWEN),
        Family("Qwen3Moe", "qwen3_moe", *_QWEN),
        Family("Qwen3VL", "qwen3_vl", *_QWEN, _WITH_IMAGES),
        Family("Qwen3Next", "qwen3_next", *_QWEN),
        Family("Qwen3_5", "qwen3_5_text", *_QWEN),
        Family("Qwen3_5", "qwen3_5", *_QWEN, _WITH_IMAGES),
        Family("Qwen3_5Moe", "qwen3_5_moe_text", *_QWEN),
        Family("Qwen3_5Moe", "qwen3_5_moe", *_QWEN, _WITH_IMAGES),
    )
}


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a family; those of the decoder are shared where it is also part of a model that takes images.

    Attributes:
        config: of `causal_lm`.
        text_config: of the decoder, the same where there is nothing else.
        model: the decoder.
        causal_lm: what generates.
    """

    config: type[Any]
    text_config: type[Any]
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


def _modeling_of(family: Family) -> Any:
    module = model_type_to_module_name(family.model_type)
    return getattr(getattr(transformers.models, module), f"modeling_{module}")


@functools.cache
def _decoder_of(name: str) -> dict[str, type[Any]]:
    """The classes of the decoder of a family, by the fields of `Classes`; made once, whatever is around it."""
    family = next(family for family in FAMILIES.values() if family.name == name)
    modeling = _modeling_of(family)

    def stock(part: str) -> type[Any]:
        names = (f"{name}Text{part}", f"{name}{part}")  # of the text side, where there is another
        return next(
            getattr(place, full) for full in names for place in (modeling, transformers) if hasattr(place, full)
        )

    def made(part: str, suffix: str, doc: str, *bases: Any, **attributes: Any) -> type[Any]:
        prefix = stock(part).__name__.removesuffix(part)
        return derive(f"{prefix}{suffix}", *bases, __module__=family.module, __doc__=doc, **attributes)

    attention = stock("Attention")
    config = made(
        "Config",
        "KIVIConfig",
        f"`{stock('Config').__name__}` with the options of the cache.",
        KIVIConfigMixin,
        stock("Config"),
        model_type=f"{stock('Config').model_type}_kivi",
    )
    sdpa = made(
        "Attention",
        "KIVISdpaAttention",
        f"{name}'s attention; over a KIVI cache, dense parts run through SDPA.",
        attention,
    )
    flash = made(
        "Attention",
        "KIVIFlashAttention2",
        f"{name}'s attention; over a KIVI cache, dense parts run through FlashAttention 2.",
        KIVIFlashMixin,
        sdpa,
    )
    layer = made(
        "DecoderLayer", "KIVIDecoderLayer", f"A decoder layer of {name} with KIVI attention.", stock("DecoderLayer")
    )
    model = made("Model", "KIVIModel", f"The decoder of {name}.", KIVIModelMixin, stock("Model"), config_class=config)
    # transformers finds what outputs a model can capture by its class's name, which a constructor enters: the decoder of
    # what generates is built as a stock one.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model), model._can_record_outputs)
    AutoModel.register(config, model, exist_ok=True)  # some models that take images make their decoder by its config
    model._no_split_modules = _renamed(model._no_split_modules, layer)
    return {
        "text_config": config,
        "sdpa_attention": sdpa,
        "flash_attention": flash,
        "decoder_layer": layer,
        "model": model,
    }


def _renamed(names: Iterable[str] | None, layer: type[Any]) -> list[str]:
    """Names of modules that stay on one device, with that of a KIVI decoder layer in place of the stock one's."""
    stock = layer.__mro__[1].__name__
    return [layer.__name__ if name == stock else name for name in names or ()]


@functools.cache
def classes_of(model_type: str) -> Classes:
    """The classes of a family, made once and registered with the Auto classes."""
    family = FAMILIES[model_type]
    decoder = _decoder_of(family.name)
    config = text_config = decoder["text_config"]
    if text_config.model_type != f"{model_type}_kivi":
        stock_config = getattr(transformers, f"{family.name}Config")
        config = derive(
            f"{family.name}KIVIConfig",
            CompositeKIVIConfigMixin,
            stock_config,
            __module__=family.module,
            __doc__=f"`{stock_config.__name__}` with the options of the cache in its decoder's.",
            model_type=f"{model_type}_kivi",
            **with_text_config(stock_config, text_config),
        )
    stock = getattr(_modeling_of(family), f"{family.name}{family.head}")
    name = f"{stock.__name__}_KIVI"
    causal_lm = derive(
        name,
        KIVIForCausalLMMixin,
        stock,
        __module__=family.module,
        __doc__=f"What generates: `{name}.from_pretrained(path, k_bits=2, v_bits=2)`.",
        config_class=config,
        _no_split_modules=_renamed(stock._no_split_modules, decoder["decoder_layer"]),
    )
    classes = Classes(config=config, causal_lm=causal_lm, **decoder)
    causal_lm.kivi_classes = classes
    if not hasattr(classes.model, "kivi_classes"):
        classes.model.kivi_classes = classes
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    _convert_as(stock, model_type, causal_lm)
    _convert_as(classes.model.__mro__[2], text_config.model_type.removesuffix("_kivi"), classes.model)
    return classes


def _convert_as(stock: type[Any], model_type: str, derived: type[Any]) -> None:
    """Have transformers convert checkpoints for a class as it does for the stock one: by its name, else by model type."""
    for name in (stock.__name__, model_type):
        conversions = get_checkpoint_conversion_mapping(name)
        if conversions is not None:
            register_checkpoint_conversion_mapping(derived.__name__, conversions, overwrite=True)
            return


def classes_bound_in(module: str) -> dict[str, type[Any]]:
    """All classes of the families of a module, by name."""
    return {
        made.__name__: made
        for family in FAMILIES.values()
        if family.module == module
        for made in vars(classes_of(family.model_type)).values()
    }


def load_any(name: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A checkpoint as a KIVI model, and its tokenizer; see `load_family`. One of no family is a stock model with
    `attach_kivi()`, whose `use_kivi_cache` is False, as it is in a family, unless it is given."""
    source = {key: kwargs[key] for key in SOURCE_OPTIONS if key in kwargs}
    config = kwargs.get("config") or AutoConfig.from_pretrained(name, **source)
    if config.model_type.removesuffix("_kivi") in FAMILIES:
        return load_family(FAMILIES, name, **kwargs)
    options = {key: kwargs.pop(key) for key in (*FIELD_DEFAULTS, "preset") if key in kwargs}
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    return attach_kivi(model, **{"use_kivi_cache": False, **options}), AutoTokenizer.from_pretrained(name, **source)


def load_family(model_types: Iterable[str], name: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A checkpoint of one of some families as a KIVI model, and its tokenizer.

    Args:
        model_types: of the families.
        name: a folder or a name on the hub.
        kwargs: the cache's options (see `KIVIOptions`), or a `preset` of them, and anything `from_pretrained` takes.

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
