"""What static INT8 parameters mean to a cache: its layers, its options, and what has no place beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from modules.cache.layer import KIVICacheLayer
from modules.codecs.static import StaticParameters
from modules.options import FULL_PRECISION_BITS, KIVIOptions, reject_unknown
from modules.store.ledger import Geometry

GEOMETRY = Geometry(group_size=1, residual_length=0, sink_length=0, at_once=True)
_INT8_BITS = 8
_MEANT_BESIDE = frozenset(("backend",))


def parameters_of(static: Any, config: Any) -> StaticParameters | None:
    """The parameters that `static` is or names; None where there are none to be used.

    Args:
        static: parameters, the path of their file, False for none, or None for what `config` names.

    Raises:
        ValueError: for anything else, a file that cannot be read, and parameters that do not fit the model of `config`.
    """
    if static is None:
        static = getattr(config, "static", None)
    if static is None or static is False:
        return None
    if isinstance(static, (str, os.PathLike)):
        static = StaticParameters.load(static)
    if not isinstance(static, StaticParameters):
        raise ValueError(
            f"static must be calibrated parameters, the path of their file, False or None; got {static!r}."
        )
    if config is None:
        raise ValueError(
            "static parameters need the model's config, which says whether they fit: KIVICache(model.config, …)."
        )
    static.check_fits(config)
    return static


def check_alone(options: KIVIOptions | None, overrides: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options given beside static parameters that those leave nothing to choose for."""
    reject_unknown(overrides, KIVIOptions.names(), "A KIVI cache")
    given = ["options", *overrides] if options is not None else list(overrides)
    contrary = [name for name in given if name not in _MEANT_BESIDE]
    if contrary:
        raise ValueError(
            f"{', '.join(contrary)} cannot go with static parameters, which say what is stored and how; leave it out, or pass "
            f"static=False for a cache that finds its scales itself. Allowed beside them: {', '.join(_MEANT_BESIDE)}."
        )


def options_beside(parameters: StaticParameters, config: Any, overrides: Mapping[str, Any]) -> KIVIOptions:
    """The options that describe a cache of `parameters`: 8 bits in their layers, 16 in the others, no window, no sinks."""
    bits = [
        _INT8_BITS if index in parameters.layers else FULL_PRECISION_BITS for index in range(config.num_hidden_layers)
    ]
    chosen = bits[0] if len(set(bits)) == 1 else bits
    return KIVIOptions(
        k_bits=chosen,
        v_bits=chosen,
        group_size=GEOMETRY.group_size,
        residual_length=GEOMETRY.residual_length,
        sink_length=GEOMETRY.sink_length,
        k_range="minmax",
        backend=overrides.get("backend", getattr(config, "backend", "auto")),
    )


def check_packed(parameters: StaticParameters, layers: Sequence[Any]) -> None:
    """Raise `ValueError` where parameters are for layers that keep transformers' own cache layer."""
    other = [index for index in parameters.layers if not isinstance(layers[index], KIVICacheLayer)]
    if other:
        raise ValueError(
            f"the static parameters have scales for the layers {other}, which keep a cache layer of transformers (sliding "
            "windows, linear attention); exclude them in the spec and calibrate again."
        )
