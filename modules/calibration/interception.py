"""Attention modules, and a hand on what they give to their cache.

Every attention layer of transformers calls `cache.update(key_states, value_states, layer_idx)` of the cache that is passed
to its forward. A hook on the module hands it, for that one call, a stand-in whose `update` shows the states to a function
first. The cache itself is never changed: whatever it calls in turn, its own `update` again included, is not seen, and when
the hooks are gone nothing is left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

ATTENTION = "*self_attn*"
CACHE_NAMES = ("past_key_values", "past_key_value", "cache", "kv_cache", "layer_past")
INTERFACE = "update(key_states, value_states, layer_idx), which returns all keys and values"

Before = Callable[[str, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model by their full paths: those whose own name has "self_attn" in it.

    Raises:
        ValueError: where there is none.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if fnmatchcase(path.rpartition(".")[2], ATTENTION)
        and (hasattr(module, "layer_idx") or any(module.children()))  # not a norm that is called after it
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention module: none of its modules is named {ATTENTION}. Name the attribute "
            "of the decoder layer that holds its attention self_attn."
        )
    return found


class Interception:
    """Hooks on attention modules: `before(path, key_states, value_states, layer_idx)` gives the states for the cache.

    Within `with` or until `remove()`. Of two on one module the newer one counts. CUDA graphs that were recorded before are
    replayed without it.

    Attributes:
        got_cache: paths of the modules that were handed a cache.
    """

    def __init__(self, modules: Mapping[str, nn.Module], before: Before) -> None:
        self.before = before
        self.active = True
        self.got_cache: set[str] = set()
        self._hooks = [
            module.register_forward_pre_hook(self._hook_of(path, module), with_kwargs=True)
            for path, module in modules.items()
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        self.active = False
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Interception:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _hook_of(self, path: str, module: nn.Module) -> Callable[..., Any]:
        names = list(inspect.signature(module.forward).parameters)
        names += [""] * 32  # of what goes to *args

        def stand_in(name: str, value: Any) -> Any:
            if not _is_cache(path, name, value):
                return value
            self.got_cache.add(path)
            cache = value.intercepted if type(value) is InterceptedCache else value
            return InterceptedCache(cache, self, path)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (
                tuple(stand_in(name, value) for name, value in zip(names, args)),
                {name: stand_in(name, value) for name, value in kwargs.items()},
            )

        return hook


class InterceptedCache:
    """A cache whose `update` shows the states to an interception first; in all else the cache itself."""

    def __init__(self, cache: Any, interception: Interception, path: str) -> None:
        vars(self).update(intercepted=cache, interception=interception, path=path)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the cache's own, of the states that the interception gives."""
        own = vars(self)
        cache, interception, path = own["intercepted"], own["interception"], own["path"]
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise ValueError(
                f"{path} calls update() with layer_idx={layer_idx!r}, and layers are told apart by it: pass the number of the "
                "layer."
            )
        if interception.active:
            key_states, value_states = interception.before(path, key_states, value_states, layer_idx)
        states = cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if not isinstance(states, (tuple, list)) or len(states) != 2:
            raise ValueError(
                f"update() of {type(cache).__name__} returned {type(states).__name__}, not a pair of keys and values; a cache "
                f"needs {INTERFACE}."
            )
        key_states, value_states = states
        return key_states, value_states

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # attention may ask what kind of cache it has
        return type(vars(self)["intercepted"])

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["intercepted"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["intercepted"], name, value)

    def __len__(self) -> int:
        return len(vars(self)["intercepted"])

    def __bool__(self) -> bool:
        return bool(vars(self)["intercepted"])

    def __getitem__(self, index: Any) -> Any:
        return vars(self)["intercepted"][index]


def _is_cache(path: str, name: str, value: Any) -> bool:
    """Whether an argument of an attention module is its cache."""
    if value is None or isinstance(value, (bool, torch.Tensor)):
        return False
    if isinstance(value, Cache):
        return True
    update = None if isinstance(value, (Mapping, set)) else getattr(value, "update", None)
    if name in CACHE_NAMES:
        if not callable(update):
            raise ValueError(
                f"{path} is handed a {type(value).__name__} as {name}, which has no update() of a cache. Give it the method "
                f"{INTERFACE}; or pass a DynamicCache."
            )
        return True
    return callable(update) and "layer_idx" in inspect.signature(update).parameters
