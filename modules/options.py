"""The options of a KIVI cache: one validated dataclass that every entry point builds."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

FULL_PRECISION_BITS = 16
MINIMUM_BITS = 16  # of a group of keys, whatever its scale has
# Of a head by default, by the bits of its other channels: the share, and channels at most.
WIDE_CHANNELS = {2: (0.5, 64), 4: (0.25, 32)}
ALLOWED_BITS = (2, 4, 8, FULL_PRECISION_BITS)
BY_LAYER = ("k_bits", "v_bits", "wide_channels")  # options that may be lists with an entry a layer
ALLOWED_K_RANGES = ("lsq", "minmax")
ALLOWED_V_RANGES = ("minmax", "clipped", "lsq", None)
ALLOWED_METADATA_BITS = (8, 16, None)
ALLOWED_BACKENDS = ("auto", "torch", "numba", "triton")
AUTO = "auto"  # left to the code, by sizes it knows
LEAST_COMMON = 16  # channels of a value group that is not group_size
MOST_TOKENS = 1 << 24  # no length is larger: beyond any context, and what an allocator would refuse


PRESETS: dict[str, dict[str, Any]] = {
    "small": {"group_size": 128, "wide_channels": 0.25},
    "balanced": {},
    "quality": {"k_bits": 4, "v_bits": 4},
}


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` by name where `preset`, if it is among them, stands for those of `PRESETS`; others that are given count more.

    Raises:
        ValueError: for a preset that is not one of `PRESETS`.
    """
    options = dict(options)
    name = options.pop("preset", None)
    if name is None:
        return options
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or None; got {name!r}.")
    return {**PRESETS[name], **options}


def reject_unknown(names: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first of `names` that is not in `allowed`, with the nearest allowed name."""
    allowed = sorted(allowed)
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no option {name!r}{hint} Allowed: {', '.join(allowed)}.")


def head_dim_of(config: Any) -> int:
    """Channels of a head, by a model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def head_dims_of(config: Any) -> list[int]:
    """Channels of a head, by a model's config: one size, or those of its layers where they differ."""
    try:
        return [head_dim_of(config)]
    except RuntimeError:  # what transformers raises for a field that differs between layers
        return sorted({head_dim_of(config.per_layer_config[layer]) for layer in range(config.num_hidden_layers)})


def rotary_share(config: Any) -> float:
    """The share of a head's channels, the first ones, that positions rotate in pairs half of them apart, as Llama and Qwen
    have it; 0 where a config says nothing of that."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # where it differs by kind of attention
    return float(rope.get("partial_rotary_factor", 1.0)) if rope else 0.0


def check_count(name: str, value: Any, minimum: int = 1, others: tuple = ()) -> None:
    """Raise `ValueError` where `value` is not a number of tokens from `minimum` to `MOST_TOKENS`, nor one of `others`."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MOST_TOKENS:
        more = "".join(f", or {other!r}" for other in others)
        raise ValueError(
            f"{name} must be a whole number of tokens, {minimum} or more and at most {MOST_TOKENS}{more}; got {value!r}."
        )


def check_flag(name: str, value: Any, *others: Any) -> None:
    """Raise `ValueError` where `value` is neither True nor False, nor one of `others`."""
    if not (isinstance(value, bool) or any(value is other for other in others)):
        raise ValueError(f"{name} must be {', '.join(map(str, (True, *others)))} or False; got {value!r}.")


def check_path(name: str, value: Any) -> None:
    """Raise `ValueError` where `value` is neither None nor the path of a file as a string, which a config can be saved with."""
    if not isinstance(value, (str, type(None))):
        raise ValueError(
            f"{name} must be the path of a file, as a string that a config is saved with, or None; got an object of the type "
            f"{type(value).__name__}. Save it and give its path, or pass it to create_kivi_cache({name}=…)."
        )


def _check_choice(name: str, value: Any, allowed: tuple) -> None:
    if not isinstance(value, (int, str, type(None))) or isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}.")


def _option(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A field of `KIVIOptions`: its default, a sentence on it and, where it has them, the values it may take.

    Config fields, command lines and the table of docs/choosing-options.md are made from these.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class KIVIOptions:
    """What a KIVI cache stores and how (KIVI, arXiv 2402.02750, with sinks and a fitted key range beside it).

    `sink_length=0, k_range="minmax"` is the paper's algorithm; options left at None then keep to it.

    Raises:
        ValueError: for a value that is not allowed; the message names it and what is.
    """

    k_bits: int | list[int] = _option(
        2, "bits of a key code; 16 keeps keys in full precision; a list gives one entry a layer", ALLOWED_BITS
    )
    v_bits: int | list[int] = _option(2, "bits of a value code, likewise", ALLOWED_BITS)
    group_size: int = _option(32, "tokens (keys) or channels (values) that share a scale and a minimum")
    residual_length: int = _option(
        128, "the newest tokens that stay in full precision, a multiple of group_size (tokens)"
    )
    use_kivi: bool = _option(True, "False keeps everything in full precision")
    sink_length: int = _option(4, "the first tokens of each sequence, kept in full precision (tokens)")
    k_range: str = _option(
        "lsq",
        "how a key group's scale and minimum are found: by a least-squares fit, or the range of the group (the paper's)",
        ALLOWED_K_RANGES,
    )
    v_range: str | None = _option(
        None,
        "the same for values; clipped is the range less its edges; None: clipped where values are rotated, else minmax",
        ALLOWED_V_RANGES,
    )
    wide_channels: float | list[float] | None = _option(
        None,
        "share of each head's key channels, those that matter most, with two bits more where keys have 2 or 4; None: a half, "
        "at most 64 channels, or a quarter, at most 32, with k_range=lsq; a list gives one entry a layer",
    )
    v_rotation: bool | None = _option(
        None,
        "rotate values by a Hadamard matrix before they are quantized; None: 2-bit values with k_range=lsq",
    )
    v_group_size: int | None = _option(
        None,
        "channels of a value group; None: twice group_size for rotated values where that divides the head, else group_size, or "
        "what it has in common with the head",
    )
    metadata_bits: int | None = _option(
        None,
        "bits of the scale of 2- and 4-bit codes, and of the minimum of values; that of keys has 16; None: 8 with k_range=lsq "
        "and for rotated values, else 16",
        ALLOWED_METADATA_BITS,
    )
    backend: str = _option(
        "auto", "what attends over the codes; auto: Triton on a GPU, Numba on a CPU, else torch", ALLOWED_BACKENDS
    )
    exact_products: bool = _option(
        False,
        "codes are multiplied with queries and softmax weights in float32, as torch and Triton always do; False: Numba rounds "
        "these to 8 bits for codes of 2 and 4 bits, where the CPU multiplies bytes faster",
    )

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            for bits in value if isinstance(value, (list, tuple)) else [value]:
                _check_choice(name, bits, ALLOWED_BITS)
        check_count("group_size", self.group_size, 1)
        check_count("residual_length", self.residual_length, 0)
        check_count("sink_length", self.sink_length, 0)
        if self.residual_length % self.group_size:
            raise ValueError(
                f"group_size must divide residual_length; got group_size={self.group_size} and "
                f"residual_length={self.residual_length}. Nearest residual_length: "
                f"{-(-self.residual_length // self.group_size) * self.group_size}."
            )
        check_flag("use_kivi", self.use_kivi)
        _check_choice("k_range", self.k_range, ALLOWED_K_RANGES)
        _check_choice("v_range", self.v_range, ALLOWED_V_RANGES)
        wide = self.wide_channels
        for share in wide if isinstance(wide, (list, tuple)) else [] if wide is None else [wide]:
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(
                    f"wide_channels must be a share between 0 and 1, a list of them, or None; got {share!r}."
                )
        check_flag("v_rotation", self.v_rotation, None)
        if self.v_group_size is not None:
            check_count("v_group_size", self.v_group_size, 1)
        _check_choice("metadata_bits", self.metadata_bits, ALLOWED_METADATA_BITS)
        _check_choice("backend", self.backend, ALLOWED_BACKENDS)
        check_flag("exact_products", self.exact_products)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The option names, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_config(cls, config: Any, overrides: Mapping[str, Any] | None = None) -> KIVIOptions:
        """The options a model config carries (defaults where it carries none), with `overrides` on top: by name, or a `preset`.

        Raises:
            ValueError: for an unknown option name in `overrides`, or a value that is not allowed.
        """
        overrides = with_preset(overrides or {})
        reject_unknown(overrides, cls.names(), "A KIVI cache")
        values = {field.name: getattr(config, field.name, field.default) for field in dataclasses.fields(cls)}
        return cls(**{**values, **overrides})

    def of_layer(self, layer_idx: int, num_layers: int) -> KIVIOptions:
        """The options of one layer: lists give way to its entry.

        Raises:
            ValueError: for a list that is not as long as there are layers.
        """
        chosen = {name: self._entry(name, layer_idx, num_layers) for name in BY_LAYER}
        return dataclasses.replace(self, **chosen)

    def _entry(self, name: str, layer_idx: int, num_layers: int) -> Any:
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            return value
        if len(value) != num_layers:
            raise ValueError(
                f"{name} has {len(value)} entries for {num_layers} layers; give one entry a layer or one number."
            )
        return value[layer_idx]

    def bits_of_layer(self, layer_idx: int, num_layers: int) -> tuple[int, int]:
        """`(k_bits, v_bits)` of one layer; 16 on both sides with `use_kivi=False`."""
        if not self.use_kivi:
            return FULL_PRECISION_BITS, FULL_PRECISION_BITS
        return self._entry("k_bits", layer_idx, num_layers), self._entry("v_bits", layer_idx, num_layers)

    def wide_count(self, k_bits: int, head_dim: int) -> int:
        """Key channels of a head that get two bits more in a layer of `k_bits`: a multiple of 4, so that they fill bytes.

        Raises:
            ValueError: where the share differs by layer; `of_layer` gives the options of one.
        """
        share = self.wide_channels
        if k_bits not in WIDE_CHANNELS:
            return 0
        if share is None:
            usual, most = WIDE_CHANNELS[k_bits]
            share = min(usual, most / head_dim) if self.k_range == "lsq" else 0.0
        if isinstance(share, (list, tuple)):
            raise ValueError("wide_channels has an entry a layer; take the options of one layer by of_layer() first.")
        return int(share * head_dim) // 4 * 4

    def rotates_values(self, v_bits: int) -> bool:
        """Whether the values of a layer of `v_bits` are rotated."""
        if v_bits == FULL_PRECISION_BITS:
            return False
        return (v_bits == 2 and self.k_range == "lsq") if self.v_rotation is None else self.v_rotation

    def value_range(self, v_bits: int) -> str:
        """How the scale and minimum of the values of a layer of `v_bits` are found."""
        return self.v_range or ("clipped" if self.rotates_values(v_bits) else "minmax")

    def value_group_size(self, v_bits: int, head_dim: int) -> int:
        """Channels that share a scale and minimum of the values in a layer of `v_bits`."""
        if self.v_group_size is not None:
            return self.v_group_size
        double = 2 * self.group_size
        if self.rotates_values(v_bits) and head_dim % double == 0:
            return double
        return math.gcd(self.group_size, head_dim)

    def metadata_of(self, k_bits: int, v_bits: int) -> tuple[int, int]:
        """Bits of a scale of the keys and of the values in a layer. With None they are 8, which costs next to nothing, but where
        the paper's algorithm is asked for. Codes of 8 bits, which a coarse scale would cut short, always have 16."""
        fitted = self.k_range == "lsq"
        small = fitted, fitted or self.rotates_values(v_bits)
        keys, values = (self.metadata_bits or (8 if fits else 16) for fits in small)
        return keys if k_bits < 8 else 16, values if v_bits < 8 else 16

    def stored_bits(self, k_bits: int, v_bits: int, head_dim: int, element_bits: int = 16) -> tuple[float, float]:
        """Bits a packed element of the keys and of the values takes, with its share of scale and minimum."""
        of_keys, of_values = self.metadata_of(k_bits, v_bits)
        keys = k_bits + (of_keys + MINIMUM_BITS) / self.group_size + 2 * self.wide_count(k_bits, head_dim) / head_dim
        values = v_bits + 2 * of_values / self.value_group_size(v_bits, head_dim)
        return (
            element_bits if k_bits == FULL_PRECISION_BITS else keys,
            element_bits if v_bits == FULL_PRECISION_BITS else values,
        )

    def check_head_dim(self, head_dim: int) -> None:
        """Raise `ValueError` where `group_size` or the byte layout does not fit a head of `head_dim` channels."""
        if not self.use_kivi:
            return
        bits_used = [self.k_bits, self.v_bits]
        flat = [bits for entry in bits_used for bits in (entry if isinstance(entry, (list, tuple)) else [entry])]
        quantized = sorted({bits for bits in flat if bits != FULL_PRECISION_BITS})
        if not quantized:
            return
        size = self.v_group_size
        if size is not None and head_dim % size:
            fitting = max(divisor for divisor in range(1, size) if head_dim % divisor == 0)
            raise ValueError(
                f"v_group_size must divide head_dim; got v_group_size={size} and head_dim={head_dim}. Try {fitting}."
            )
        common = math.gcd(self.group_size, head_dim)
        if size is None and common < min(self.group_size, LEAST_COMMON):
            raise ValueError(
                f"group_size must divide head_dim, or have {LEAST_COMMON} or more in common with it; got "
                f"group_size={self.group_size} and head_dim={head_dim}. Try v_group_size={common}."
            )
        codes_per_byte = 8 // quantized[0]
        if head_dim % codes_per_byte:
            raise ValueError(
                f"{quantized[0]}-bit codes go {codes_per_byte} to a byte, so head_dim must be a multiple of "
                f"{codes_per_byte}; got head_dim={head_dim}. Use more bits."
            )


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a KIVI model uses its caches; config fields beside those of `KIVIOptions`.

    Raises:
        ValueError: for a value that is not allowed.
    """

    use_kivi_cache: bool = _option(False, "generate() and forward() make a KIVI cache by themselves")
    prefill_chunk: int | str | None = _option(
        AUTO,
        "longest piece that goes through a KIVI cache at once (tokens); auto: by the model, for long prompts; None: no limit",
    )
    compile_decode: bool = _option(
        False, "compile steps of one token on a CPU, all of the model as one program; takes up to minutes once"
    )
    static: str | None = _option(
        None, "file of calibrated INT8 parameters, by which caches store instead of by the options of KIVI"
    )

    def __post_init__(self) -> None:
        check_flag("use_kivi_cache", self.use_kivi_cache)
        check_flag("compile_decode", self.compile_decode)
        if self.prefill_chunk not in (None, AUTO):
            check_count("prefill_chunk", self.prefill_chunk, 1, (AUTO, None))
        check_path("static", self.static)


def config_fields() -> dict[str, tuple[str, Any]]:
    """The fields that a KIVI model's config has beside its family's: name, and its type's name and default."""
    return {
        field.name: (str(field.type), field.default)
        for options in (KIVIOptions, RunOptions)
        for field in dataclasses.fields(options)
    }
