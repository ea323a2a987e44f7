"""Static INT8: a scale and an offset for every channel of every head, calibrated beforehand and the same for all tokens.

`x ≈ scale · code + offset`. What lies in the calibrated range has the codes -126 to 126; what lies beyond saturates at ±127,
so that the codes themselves say how many values did. A symmetric side has no offsets; an asymmetric one has the middle of the
range there, so that one rounding serves both.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modules.files import open_checked, write_checked
from modules.options import head_dim_of

LARGEST_CODE = 127  # of what lies beyond the range
LARGEST_WITHIN = 126
SMALLEST_SCALE = 1e-8  # of a channel that never moved: what does then saturates
KIND, VERSION = "kivi-static-int8", 1  # of the file
_SLICE_ELEMENTS = 1 << 21  # rounded at a time: bounds the float32 temporaries of a long prompt
_SIDES = ("key", "value")


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelScales:
    """Static INT8 of one side of one layer: `x ≈ scale · code + offset`, a code from -127 to 127.

    Attributes:
        scale: float32 `[H, D]`, above zero, for `H` KV heads of `D` channels.
        offset: float32 `[H, D]`; zeros where the side is symmetric.
    """

    scale: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def from_range(cls, low: torch.Tensor, high: torch.Tensor, symmetric: bool) -> ChannelScales:
        """The scales whose codes span the range `[low, high]` of each channel, `[H, D]` both (min-max calibration).

        Symmetric: `scale = max(|low|, |high|) / 126`. Else `scale = (high - low) / 252` about the middle of the range.

        Raises:
            ValueError: for ranges of different shapes, and for one that is not finite or ends before it begins.
        """
        if low.shape != high.shape or low.dim() != 2:
            raise ValueError(
                f"ranges must be [heads, head_dim], both alike; got {tuple(low.shape)} and {tuple(high.shape)}."
            )
        low, high = low.float(), high.float()
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
            raise ValueError(
                "every channel must have a range from a finite low to a finite high that is not below it; calibrate on states "
                "without NaN and infinity, and on at least one token."
            )
        if symmetric:
            scale, offset = torch.maximum(low.abs(), high.abs()) / LARGEST_WITHIN, torch.zeros_like(low)
        else:
            scale, offset = (high / 2 - low / 2) / LARGEST_WITHIN, high / 2 + low / 2
        return cls(scale.clamp_min(SMALLEST_SCALE), offset)

    @property
    def inverse(self) -> torch.Tensor:
        """`1 / scale`: rounding multiplies, here and in the kernels, so that both give the same codes."""
        return self.scale.reciprocal()

    def enter(self, states: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """States `[..., H, T, D]` in code space: whole numbers in `dtype`, None for that of the states, NaN where they are
        not finite."""
        return self._in_slices(states, dtype or states.dtype, self._enter)

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        """The codes of states `[..., H, T, D]`, which are finite; int8 of that shape."""
        return self.enter(states, torch.int8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The states `[..., H, T, D]` that codes stand for, in `dtype`."""
        return self._in_slices(codes, dtype, self._leave)

    def round(self, states: torch.Tensor) -> torch.Tensor:
        """States `[..., H, T, D]` as their codes give them back, in their dtype: what fake quantization makes of them."""
        return self._in_slices(states, states.dtype, lambda part: self._leave(self._enter(part)))

    def fold(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[B, heads, q, D]` to meet keys in code space, in their dtype; `heads` is a multiple of `H`."""
        scale = self.scale.repeat_interleave(query.shape[1] // self.scale.shape[0], dim=0).unsqueeze(1)
        return (query.float() * scale).to(query.dtype)

    def unfold(self, attended: torch.Tensor) -> torch.Tensor:
        """Weighted means `[B, q, heads, D]` of values in code space as means of the values, in their dtype."""
        group = attended.shape[2] // self.scale.shape[0]
        scale, offset = (t.repeat_interleave(group, dim=0) for t in (self.scale, self.offset))
        return torch.addcmul(offset, attended.float(), scale).to(attended.dtype)

    @staticmethod
    def saturated(codes: torch.Tensor) -> torch.Tensor:
        """How many of some codes, int8, stand for values beyond the calibrated range: an int64 scalar on their device."""
        return (codes.abs() == LARGEST_CODE).sum()

    def _enter(self, states: torch.Tensor) -> torch.Tensor:
        states = states.float()
        rounded = ((states - self.offset.unsqueeze(-2)) * self.inverse.unsqueeze(-2)).round_()
        return rounded.clamp_(-LARGEST_CODE, LARGEST_CODE).add_(states - states)  # which is NaN for infinity

    def _leave(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float() * self.scale.unsqueeze(-2) + self.offset.unsqueeze(-2)

    @staticmethod
    def _in_slices(states: torch.Tensor, dtype: torch.dtype, apply: Any) -> torch.Tensor:
        tokens = states.shape[-2]
        step = max(1, _SLICE_ELEMENTS * tokens // max(1, states.numel()))
        if tokens <= step:
            return apply(states).to(dtype)
        out = torch.empty_like(states, dtype=dtype)
        for start in range(0, tokens, step):
            out[..., start : start + step, :] = apply(states[..., start : start + step, :])
        return out

    def to(self, device: torch.device | str) -> ChannelScales:
        """The same on `device`."""
        return ChannelScales(self.scale.to(device), self.offset.to(device))


def model_facts(config: Any) -> dict[str, Any]:
    """What parameters fit, by a model's config: its type, and the numbers of its layers, KV heads and channels a head."""
    text = config.get_text_config(decoder=True)
    return {
        "model_type": text.model_type.removesuffix("_kivi"),
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "head_dim": head_dim_of(text),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class StaticParameters:
    """What calibration learnt of a model: the scales of each layer that is quantized. Other layers stay in full precision.

    Attributes:
        layers: the scales of keys and of values, by `layer_idx`.
        model: what it fits, see `model_facts`.
        spec: the YAML spec it was made with, as plain data.
        ranges: of each layer, where they are known, the observed key low, key high, value low and value high, float32 `[H, D]`.
        tokens: how many tokens were observed.
    """

    layers: Mapping[int, tuple[ChannelScales, ChannelScales]]
    model: Mapping[str, Any]
    spec: Mapping[str, Any]
    ranges: Mapping[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    tokens: int

    def same_codes(self, other: StaticParameters) -> bool:
        """Whether both give states the same codes: equal scales and offsets of the same layers."""
        if self is other:
            return True
        return self.layers.keys() == other.layers.keys() and all(
            torch.equal(one.scale, another.scale) and torch.equal(one.offset, another.offset)
            for index, sides in self.layers.items()
            for one, another in zip(sides, other.layers[index])
        )

    def check_fits(self, config: Any) -> None:
        """Raise `ValueError` that says what differs where these are not the parameters of a model of `config`."""
        facts = model_facts(config)
        differing = [
            f"{name} is {value!r} in the model and {self.model.get(name)!r} in the parameters"
            for name, value in facts.items()
            if value != self.model.get(name)
        ]
        if differing:
            raise ValueError(f"the static parameters are of another model: {'; '.join(differing)}. Calibrate this one.")
        heads, head_dim, layers = facts["num_key_value_heads"], facts["head_dim"], facts["num_hidden_layers"]
        for index, sides in self.layers.items():
            if not 0 <= index < layers:
                raise ValueError(
                    f"the static parameters have a layer {index}; the model has the layers 0 to {layers - 1}."
                )
            for what, scales in zip(_SIDES, sides):
                if tuple(scales.scale.shape) != (heads, head_dim):
                    raise ValueError(
                        f"the {what} scales of layer {index} are {tuple(scales.scale.shape)}; the model's heads are "
                        f"{(heads, head_dim)}. Calibrate this model."
                    )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Scales, offsets and ranges by a dotted name, on the CPU."""
        tensors: dict[str, torch.Tensor] = {}
        for index, sides in self.layers.items():
            for number, (what, scales) in enumerate(zip(_SIDES, sides)):
                named = {"scale": scales.scale, "offset": scales.offset}
                named |= dict(zip(("low", "high"), self.ranges.get(index, ())[2 * number : 2 * number + 2]))
                tensors |= {f"{index}.{what}.{name}": t.detach().cpu().clone() for name, t in named.items()}
        return tensors

    def about(self) -> dict[str, Any]:
        """What is no tensor: plain data."""
        return {"model": dict(self.model), "spec": dict(self.spec), "tokens": self.tokens}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> StaticParameters:
        """From what `tensors` and `about` gave.

        Raises:
            KeyError: where something is missing.
            ValueError: for scales that are not finite and above zero.
        """
        indices = sorted({int(name.split(".")[0]) for name in tensors})
        layers = {index: _sides_of(tensors, index) for index in indices}
        ranges = {index: _ranges_of(tensors, index) for index in indices if f"{index}.key.low" in tensors}
        return cls(layers, about["model"], about["spec"], ranges, about["tokens"])

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, with `about` as JSON in its metadata; it appears whole or not at all.

        Raises:
            ValueError: where no file can be written at `path`.
            OSError: as the disk has it.
        """
        metadata = {"version": str(VERSION), "about": json.dumps(self.about())}
        write_checked(Path(path), KIND, self.tensors(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> StaticParameters:
        """What `save` wrote.

        Raises:
            ValueError: for a file that is not there, truncated, altered, of another kind or of another version.
        """
        with open_checked(Path(path), KIND, "a file of static INT8 parameters") as file:
            version = file.metadata.get("version")
            if version != str(VERSION):
                raise ValueError(
                    f"{os.fspath(path)} has version {version} of the format and this code reads version {VERSION}; calibrate again."
                )
            tensors = {name: file.tensor(name).clone() for name in file.names}
            return cls.of(tensors, json.loads(file.metadata["about"]))


def _sides_of(tensors: Mapping[str, torch.Tensor], index: int) -> tuple[ChannelScales, ChannelScales]:
    key, value = (ChannelScales(tensors[f"{index}.{what}.scale"], tensors[f"{index}.{what}.offset"]) for what in _SIDES)
    for what, scales in zip(_SIDES, (key, value)):
        usable = torch.isfinite(scales.scale) & (scales.scale > 0) & torch.isfinite(scales.offset)
        if scales.scale.dim() != 2 or scales.scale.shape != scales.offset.shape or not bool(usable.all()):
            raise ValueError(f"the {what} scales of layer {index} are not finite numbers above zero for every channel")
    return key, value


def _ranges_of(
    tensors: Mapping[str, torch.Tensor], index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high, value_low, value_high = (
        tensors[f"{index}.{what}.{name}"] for what in _SIDES for name in ("low", "high")
    )
    return low, high, value_low, value_high
