"""A stock model of transformers with a KIVI cache: `attach_kivi(model, k_bits=2, v_bits=2)`, and `detach_kivi(model)`.

Three objects of the model change their class to a subclass of the same name: the model itself, its decoder and the
decoder's config, which then carries the options. No module is replaced and no weight touched; what is saved is what the
stock model saves.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from modules.models.base_model import StepMixin
from modules.models.causal_lm import CachingMixin
from modules.models.common_pattern import check_attachable, decoder_of
from modules.models.config import FIELD_DEFAULTS, RoutedConfigMixin, check_config, forget_forwards
from modules.models.derived import derive
from modules.models.graphs import DecodeGraphs
from modules.models.program import DecodeProgram
from modules.options import reject_unknown, with_preset

Model = TypeVar("Model", bound=Any)


class Attached:
    """An object whose class `attach_kivi` changed; pickled and copied as its stock class and the mixin."""

    kivi_mixin: type
    kivi_stock: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        return (_made_again, (self.kivi_mixin, self.kivi_stock), *reduced[2:])  # type: ignore[misc]


class AttachedConfigMixin(Attached, RoutedConfigMixin):
    """The config of a decoder; its KIVI fields are not saved."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in FIELD_DEFAULTS}


class AttachedDecoderMixin(Attached, StepMixin):
    """The decoder."""


class AttachedModelMixin(Attached, CachingMixin):
    """The model."""


def attach_kivi(model: Model, **options: Any) -> Model:
    """Give a stock model a KIVI cache: `create_kivi_cache()`, `prefill_chunk`, CUDA graphs, and a cache by itself in every call.

    Layers with a sliding window, chunks or linear attention keep transformers' own cache layers.

    Args:
        model: a decoder of transformers that generates, also one that takes images.
        options: those of `KIVIOptions` and of `RunOptions`, by name, or a `preset`; `use_kivi_cache` is True unless given.

    Returns:
        `model`, changed in place. `detach_kivi` undoes it.

    Raises:
        ValueError: for a model that cannot attend over codes, saying what of it, and for an option that is unknown or not
            allowed; nothing is changed then.

    Example:
        >>> model = attach_kivi(AutoModelForCausalLM.from_pretrained(path), k_bits=2, v_bits=2)
        >>> model.generate(**inputs, max_new_tokens=100)
    """
    options = with_preset(options)
    reject_unknown(options, FIELD_DEFAULTS, "attach_kivi()")
    check_attachable(model)
    decoder = decoder_of(model)
    config = decoder.config
    fields = {**FIELD_DEFAULTS, "use_kivi_cache": True, **options}
    _check_fields(config, fields)
    for name, value in fields.items():
        setattr(config, name, value)
    _become(config, AttachedConfigMixin)
    _become(decoder, AttachedDecoderMixin)
    _become(model, AttachedModelMixin)
    model._decode_graphs, model._decode_program = DecodeGraphs(), DecodeProgram()
    return model


def detach_kivi(model: Model) -> Model:
    """Take off what `attach_kivi` put on, without a trace.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: where nothing was attached.
    """
    if not issubclass(type(model), AttachedModelMixin):
        raise ValueError(f"attach_kivi() was not called on this {type(model).__name__}; there is nothing to detach.")
    decoder = decoder_of(model)
    config = decoder.config
    for attached in (model, decoder, config):
        _become_stock(attached)
    for name in ("_decode_graphs", "_decode_program", "use_cuda_graphs"):
        model.__dict__.pop(name, None)
    for name in FIELD_DEFAULTS:
        config.__dict__.pop(name, None)
    forget_forwards(config)
    return model


def _check_fields(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """Raise `ValueError` for options that are not allowed or do not fit the decoder of `config`."""
    if isinstance(config, RoutedConfigMixin):
        raise ValueError(
            "another model with a KIVI cache has the same config object; give each model a copy of its own."
        )
    own = [name for name in FIELD_DEFAULTS if name in vars(config) or hasattr(type(config), name)]
    if own:
        raise ValueError(
            f"{type(config).__name__} has a field {own[0]!r} of its own, which is also the name of an option of the cache. "
            "Make the cache with its options spelt out, KIVICache(None, k_bits=2, v_bits=2), and pass it as past_key_values."
        )
    twin = copy.copy(config)
    for name, value in fields.items():
        setattr(twin, name, value)
    check_config(twin)


@functools.cache
def _attached(mixin: type, stock: Any) -> Any:
    """The subclass of `stock` with `mixin`; by its name it is the stock class, as in what is saved."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return derive(stock.__name__, mixin, stock, kivi_mixin=mixin, kivi_stock=stock, **names)


def _made_again(mixin: type, stock: Any) -> Any:
    made = _attached(mixin, stock)
    return made.__new__(made)


def _become(stock: Any, mixin: type) -> None:
    stock_class: Any = type(stock)
    stock.__class__ = _attached(mixin, stock_class)
    _bind_forward(stock)


def _become_stock(attached: Any) -> None:
    attached.__class__ = type(attached).kivi_stock
    _bind_forward(attached)


def _bind_forward(module: Any) -> None:
    """accelerate's hooks, as `device_map` puts them on, keep the forward that they call, and leave it there when they go."""
    module_class: Any = type(module)
    for name in ("_old_forward", "forward"):
        method = vars(module).get(name)
        if isinstance(method, types.MethodType) and method.__self__ is module:
            setattr(module, name, types.MethodType(module_class.forward, module))


__all__ = ["attach_kivi", "detach_kivi"]
