"""Running code apart from autograd, inference mode and autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def as_data(method: F) -> F:
    """A method without autograd, inference tensors and autocast: what it stores serves steps in every mode."""
    apart = torch.inference_mode(False)(torch.no_grad()(method))

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        casting = autocasting()
        if casting:
            with contextlib.ExitStack() as stack:
                for device in casting:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return apart(*args, **kwargs)
        plain = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return (method if plain else apart)(*args, **kwargs)

    return run  # type: ignore[return-value]


def autocasting() -> list[str]:
    """The device types for which autocast is on."""
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
