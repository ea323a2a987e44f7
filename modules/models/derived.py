"""Stock classes of transformers with a mixin in front."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def derive(name: str, *bases: Any, **attributes: Any) -> type[Any]:
    """A subclass of the stock class that is the last of `bases`; its forward takes the stock arguments, in their order.

    transformers reads the signature, as to whether a model takes images.
    """
    *mixins, stock = bases
    for forward in [mixin.forward for mixin in mixins if hasattr(mixin, "forward")]:
        attributes["forward"] = _as_stock(forward, stock.forward)
    return type(name, bases, attributes)


def _as_stock(forward: Callable, stock: Callable) -> Callable:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def with_names(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            named = dict(list(signature.bind_partial(self, *args).arguments.items())[1:])
            if twice := named.keys() & kwargs.keys():
                raise TypeError(f"{type(self).__name__}.forward() got several values for {', '.join(sorted(twice))}.")
            kwargs |= named
        return forward(self, **kwargs)

    return with_names
