"""The options of a KIVI cache: one validated dataclass that every entry point builds."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

FULL_PRECISION_BITS = 16
ALLOWED_BITS = (2, 4, 8, FULL_PRECISION_BITS)
ALLOWED_RANGES = ("lsq", "minmax")
ALLOWED_BACKENDS = ("auto", "torch", "numba", "triton")


def reject_unknown(names: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first of `names` that is not in `allowed`, with the nearest allowed name."""
    allowed = sorted(allowed)
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no option {name!r}{hint} Allowed: {', '.join(allowed)}.")


def _check_count(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number of tokens, {minimum} or more; got {value!r}.")


def _check_choice(name: str, value: Any, allowed: tuple) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class KIVIOptions:
    """What a KIVI cache stores and how (KIVI, arXiv 2402.02750, with sinks and a fitted key range beside it).

    Args:
        k_bits, v_bits: bits of a key / value code: 2, 4 or 8; 16 keeps that side in full precision. A list gives one
            entry a layer.
        group_size: tokens (keys) or channels (values) that share one scale and minimum.
        residual_length: the newest tokens that are always in full precision, a multiple of `group_size`.
        use_kivi: False keeps everything in full precision, as `k_bits=v_bits=16` does.
        sink_length: the first tokens of a sequence, kept in full precision.
        k_range, v_range: "minmax" (the paper's) or "lsq", the least-squares fit of scale and minimum.
        backend: "auto" picks Triton on a GPU, Numba on a CPU where it is installed, else torch.

    Raises:
        ValueError: for a value outside these limits; the message names it and what is allowed.
    """

    k_bits: int | list[int] = 2
    v_bits: int | list[int] = 2
    group_size: int = 32
    residual_length: int = 128
    use_kivi: bool = True
    sink_length: int = 4
    k_range: str = "lsq"
    v_range: str = "minmax"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            for bits in value if isinstance(value, (list, tuple)) else [value]:
                _check_choice(name, bits, ALLOWED_BITS)
        _check_count("group_size", self.group_size, 1)
        _check_count("residual_length", self.residual_length, 0)
        _check_count("sink_length", self.sink_length, 0)
        if self.residual_length % self.group_size:
            raise ValueError(
                f"group_size must divide residual_length; got group_size={self.group_size} and "
                f"residual_length={self.residual_length}. Nearest residual_length: "
                f"{-(-self.residual_length // self.group_size) * self.group_size}."
            )
        if not isinstance(self.use_kivi, bool):
            raise ValueError(f"use_kivi must be True or False; got {self.use_kivi!r}.")
        _check_choice("k_range", self.k_range, ALLOWED_RANGES)
        _check_choice("v_range", self.v_range, ALLOWED_RANGES)
        _check_choice("backend", self.backend, ALLOWED_BACKENDS)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The option names, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_config(cls, config: Any, overrides: Mapping[str, Any] | None = None) -> KIVIOptions:
        """The options a model config carries (defaults where it carries none), with `overrides` on top.

        Raises:
            ValueError: for an unknown option name in `overrides`, or a value that is not allowed.
        """
        overrides = dict(overrides or {})
        reject_unknown(overrides, cls.names(), "A KIVI cache")
        values = {field.name: getattr(config, field.name, field.default) for field in dataclasses.fields(cls)}
        return cls(**{**values, **overrides})

    def bits_of_layer(self, layer_idx: int, num_layers: int) -> tuple[int, int]:
        """`(k_bits, v_bits)` of one layer; 16 on both sides with `use_kivi=False`."""
        if not self.use_kivi:
            return FULL_PRECISION_BITS, FULL_PRECISION_BITS
        chosen = []
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                if len(value) != num_layers:
                    raise ValueError(
                        f"{name} has {len(value)} entries for {num_layers} layers; give one entry a layer or one number."
                    )
                value = value[layer_idx]
            chosen.append(value)
        return chosen[0], chosen[1]

    def check_head_dim(self, head_dim: int) -> None:
        """Raise `ValueError` where `group_size` or the byte layout does not fit a head of `head_dim` channels."""
        all_bits = {bits for layer in (self.k_bits, self.v_bits) for bits in (layer if isinstance(layer, (list, tuple)) else [layer])}
        quantized = sorted(bits for bits in all_bits if bits != FULL_PRECISION_BITS)
        if not self.use_kivi or not quantized:
            return
        if head_dim % self.group_size:
            allowed = [size for size in (16, 32, 64, 128) if head_dim % size == 0]
            raise ValueError(
                f"group_size must divide head_dim; got group_size={self.group_size} and head_dim={head_dim}. "
                f"Try one of {allowed}."
            )
        codes_per_byte = 8 // quantized[0]
        if head_dim % codes_per_byte:
            raise ValueError(
                f"{quantized[0]}-bit codes go {codes_per_byte} to a byte, so head_dim must be a multiple of "
                f"{codes_per_byte}; got head_dim={head_dim}. Use more bits."
            )
