"""The config of a KIVI model: that of its family, with the options of the cache."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig

from modules.cache.cache import OVER_CODES
from modules.models.attention import ROUTES
from modules.options import KIVIOptions, RunOptions, check_path, config_fields, head_dims_of, with_preset

FIELD_DEFAULTS: dict[str, Any] = {name: default for name, (_, default) in config_fields().items()}
# Attributes of a config: whether forwards run over a KIVI cache now, and how many. Compiled code depends on the first alone.
_OVER, _FORWARDS = "_over_codes", "_forwards_over_codes"
_counting = threading.Lock()


@contextlib.contextmanager
def stock_checkpoints_are_meant() -> Iterator[None]:
    """Without transformers' warning that a checkpoint is of another model type, which here is the very use."""
    log = logging.getLogger("transformers.configuration_utils")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("You are using a model of type")

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


class RoutedConfigMixin(PreTrainedConfig):
    """A config that names what attends over codes while a forward runs over a KIVI cache."""

    @property
    def _attn_implementation(self) -> str | None:
        """As the user chose it; while a forward runs over a KIVI cache, what attends over one in its place."""
        chosen = self._attn_implementation_internal
        return ROUTES.get(chosen, chosen) if self.__dict__.get(_OVER) else chosen

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop(_OVER, None)
        d.pop(_FORWARDS, None)


class KIVIConfigMixin(RoutedConfigMixin):
    """Config fields of a KIVI model: those of `KIVIOptions` and of `RunOptions`."""

    __annotations__ = {name: type_ for name, (type_, _) in config_fields().items()}
    locals().update(FIELD_DEFAULTS)

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_preset(kwargs)
        super().__post_init__(**kwargs)
        check_fields(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return _of_model_type(cls, super().from_pretrained, *args, **kwargs)


class CompositeKIVIConfigMixin(PreTrainedConfig):
    """The config of a model whose decoder has a config of its own: the fields are those of the decoder's, read and set here.

    A property a field, so that `from_pretrained(path, k_bits=4)` and `config.k_bits` mean the decoder's.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_preset(kwargs)
        given = {name: kwargs.pop(name) for name in FIELD_DEFAULTS if name in kwargs}
        super().__post_init__(**kwargs)
        _convert_sub_configs(self)
        for name, value in given.items():
            setattr(self, name, value)
        check_fields(self.get_text_config(decoder=True))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return _of_model_type(cls, super().from_pretrained, *args, **kwargs)


def _refuse_preset(fields: dict[str, Any]) -> None:
    """A config made field by field cannot tell which of them were given."""
    if "preset" in fields:
        raise ValueError(
            f"preset={fields['preset']!r} is for from_pretrained(), attach_kivi() and caches; give a config the options of the "
            "preset: **PRESETS[name], of kivi_cache_general."
        )


def with_text_config(stock: type[PreTrainedConfig], text_config: type[PreTrainedConfig]) -> dict[str, Any]:
    """The class attributes by which a composite config that derives from `stock` makes a decoder's config of another class."""
    name = "sub_configs_defaults" if "sub_configs_defaults" in vars(stock) else "sub_configs"  # the latter to 5.17
    return {name: {**getattr(stock, name), "text_config": text_config}}


def _field_of_decoder(name: str) -> property:
    def get(self: PreTrainedConfig) -> Any:
        return getattr(self.get_text_config(decoder=True), name)

    def set_(self: PreTrainedConfig, value: Any) -> None:
        setattr(self.get_text_config(decoder=True), name, value)

    return property(get, set_, doc=f"`{name}` of the decoder's config.")


for _name in FIELD_DEFAULTS:
    setattr(CompositeKIVIConfigMixin, _name, _field_of_decoder(_name))


def _of_model_type(cls: Any, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `load` gives; a `ValueError` where it is of another model type than `cls`."""
    check_path("static", kwargs.get("static"))  # before transformers shows the config as JSON
    with stock_checkpoints_are_meant():
        config = load(*args, **with_preset(kwargs))
    loaded = config[0] if isinstance(config, tuple) else config
    if loaded.model_type.removesuffix("_kivi") != cls.model_type.removesuffix("_kivi"):
        raise ValueError(
            f"{cls.__name__} takes checkpoints of the model type {cls.model_type.removesuffix('_kivi')!r}; got one of "
            f"{loaded.model_type!r}."
        )
    return config


@contextlib.contextmanager
def over_codes(config: PreTrainedConfig) -> Iterator[bool]:
    """Within it, a model of `config` attends through the functions that know a KIVI cache; False where there is none for
    its implementation. Threads may run the model at once."""
    _count(config, 1)
    try:
        yield (config._attn_implementation or "").startswith(OVER_CODES)
    finally:
        _count(config, -1)


def _count(config: PreTrainedConfig, more: int) -> None:
    with _counting:
        config.__dict__[_FORWARDS] = config.__dict__.get(_FORWARDS, 0) + more
        config.__dict__[_OVER] = config.__dict__[_FORWARDS] > 0


def forget_forwards(config: PreTrainedConfig) -> None:
    """Take off what `over_codes` left on a config."""
    config.__dict__.pop(_OVER, None)
    config.__dict__.pop(_FORWARDS, None)


def as_kivi_config(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """`config`, or where it is a stock one its twin of `config_class`, so that what is saved is loaded as a KIVI model."""
    if isinstance(config, config_class):
        return config
    twin = object.__new__(config_class)
    twin.__dict__.update(copy.deepcopy(config.__dict__))
    _convert_sub_configs(twin)
    return twin


def _convert_sub_configs(config: PreTrainedConfig) -> None:
    for name, config_class in type(config).sub_configs.items():
        if issubclass(config_class, KIVIConfigMixin):
            setattr(config, name, as_kivi_config(getattr(config, name), config_class))


def check_config(config: PreTrainedConfig) -> None:
    """Give the config of a decoder the KIVI fields it lacks and raise `ValueError` for one that is not allowed or does not
    fit."""
    for name, default in FIELD_DEFAULTS.items():
        if not hasattr(config, name):
            setattr(config, name, default)
    options = check_fields(config)
    for head_dim in head_dims_of(config):
        options.check_head_dim(head_dim)
    options.of_layer(0, config.num_hidden_layers)


def check_fields(config: PreTrainedConfig) -> KIVIOptions:
    """The options of a config; `ValueError` for a value that no model could have.

    Whether they fit the model is for `check_config`: `from_pretrained` sets its arguments one by one, after construction.
    """
    RunOptions(**{field.name: getattr(config, field.name) for field in dataclasses.fields(RunOptions)})
    return KIVIOptions.from_config(config)
