"""A cache in a file: what `KIVICache.save` writes and `KIVICache.load` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from modules.cache.fingerprint import (
    Weights,
    check_config,
    check_options,
    check_weights,
    config_values,
    dtype_name,
    sample_weights,
)
from modules.cache.layer import KIVICacheLayer
from modules.cache.other_layers import dtype_in, restore, state_of
from modules.codecs.static import StaticParameters
from modules.files import CheckedFile, check_target, open_checked, write_checked
from modules.options import KIVIOptions, reject_unknown
from modules.store.ledger import Ledger, Saved
from modules.store.live import fill, live_tensors

KIND, VERSION = "kivi-cache", 3
_FIRST_DEFAULTS = {"metadata_bits": 16, "wide_channels": 0.25}  # those of version 1 that have changed
_BITS = ("k_bits", "v_bits")
_CHANGED_BITS = 4  # of codes whose defaults have changed in version 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those that states can be loaded in
_STATIC = "static."  # before the names of its tensors
_FREE = frozenset({"backend", "exact_products"})  # options that do not say what is stored

Model: TypeAlias = PreTrainedModel | PreTrainedConfig
ToDtype: TypeAlias = Callable[[torch.dtype], torch.dtype]


@dataclasses.dataclass(frozen=True)
class State:
    """What of a saved cache is no tensor: JSON in the metadata of the file.

    Attributes:
        seq_length, lengths, packed, reach, draft_room: of the ledger.
        options: those of the cache, by name.
        config: what of the model's config decides keys and values.
        model_dtype: of the model; None where only its config was known.
        parameters: the dtypes of the model's parameters, by name; their samples are a tensor. None likewise.
        static: of static INT8 what of its parameters is no tensor; else None.
        layers: of each layer the name of its class and what makes one like it.
    """

    seq_length: int
    lengths: list[int]
    packed: list[int]
    reach: list[int]
    draft_room: int
    options: dict[str, Any]
    config: dict[str, Any]
    model_dtype: str | None
    parameters: dict[str, str] | None
    static: dict[str, Any] | None
    layers: list[dict[str, Any]]


def write(cache: Any, path: Path, tokens: torch.Tensor | None, model: Model) -> None:
    """Write a cache that no step is open on; see `KIVICache.save`."""
    ledger = cache.ledger
    check_target(path)
    config = _config_of(model)
    if not ledger.seq_length:
        raise ValueError("the cache holds no tokens, so there is nothing to save; run a forward over it first.")
    if cache.config is not None:
        check_config(config_values(cache.config), config, "the cache")
    tensors: dict[str, torch.Tensor] = {}
    if tokens is not None:
        tensors["tokens"] = _checked_tokens(tokens, ledger)
    if ledger.is_real is not None:
        tensors["is_real"] = ledger.is_real.cpu().contiguous()
    parameters = None
    if isinstance(model, PreTrainedModel):
        parameters, tensors["weights"] = sample_weights(model)
    if cache.static is not None:
        tensors |= {_STATIC + name: t for name, t in cache.static.tensors().items()}
    layers = []
    for index, layer in enumerate(cache.layers):
        described, held = _described(layer)
        layers.append(described)
        tensors |= {f"layers.{index}.{name}": t for name, t in held.items()}
    state = State(
        seq_length=ledger.seq_length,
        lengths=ledger.lengths,
        packed=ledger.packed,
        reach=ledger.save().reach,
        draft_room=ledger.geometry.draft_room,
        options={name: getattr(cache.options, name) for name in KIVIOptions.names()},
        config=config_values(config),
        model_dtype=dtype_name(model.dtype) if isinstance(model, PreTrainedModel) else None,
        parameters=parameters,
        static=None if cache.static is None else cache.static.about(),
        layers=layers,
    )
    write_checked(path, KIND, tensors, {"version": str(VERSION), "state": json.dumps(dataclasses.asdict(state))})


def read(
    make: Callable[..., Any],
    path: Path,
    model: Model,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    options: dict[str, Any],
    **more: Any,
) -> Any:
    """The cache in a file, made by `make(config, options=…, static=…, **more)`; see `KIVICache.load`."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(dtype_name, DTYPES))}, or None; got {dtype!r}.")
    reject_unknown(options, KIVIOptions.names(), "A KIVI cache")
    config = _config_of(model)
    with open_checked(path, KIND, "a saved KIVI cache") as file:
        state = _state_of(file, path)
        check_config(state.config, config, "the file")
        if isinstance(model, PreTrainedModel) and state.parameters is not None:
            check_weights(Weights(state.parameters, file.tensor("weights")), model)
        check_options(state.options, {name: value for name, value in options.items() if name not in _FREE})
        reject_unknown(state.options, KIVIOptions.names(), "A KIVI cache of this version")
        chosen = {**state.options, **options}
        static = _static_of(state, file)
        what = {"options": KIVIOptions(**chosen)} if static is None else {"backend": chosen["backend"]}
        cache = make(config, static=static or False, **what, **more)
        devices = _devices(model, device, len(cache.layers))
        _fill_ledger(cache.ledger, state, file, devices[0])
        kinds = [type(layer).__name__ for layer in cache.layers], [entry["kind"] for entry in state.layers]
        if kinds[0] != kinds[1]:
            raise ValueError(f"the layers of the model are {kinds[0]}; those of the file are {kinds[1]}.")
        to_dtype = _dtypes(state, model, dtype)
        for index, (layer, entry, place) in enumerate(zip(cache.layers, state.layers, devices)):
            _fill_layer(layer, entry, file, f"layers.{index}.", place, to_dtype)
            if cache.offloading:
                layer.offload()
        if isinstance(model, PreTrainedModel):
            cache.ran(model)
    return cache


def _config_of(model: Any) -> PreTrainedConfig:
    config = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"model must be a model of transformers or its config; got {type(model).__name__}.")
    return config.get_text_config(decoder=True)


def _checked_tokens(tokens: torch.Tensor, ledger: Ledger) -> torch.Tensor:
    fits = (
        isinstance(tokens, torch.Tensor)
        and tokens.dim() == 2
        and tokens.shape[0] == ledger.batch_size
        and tokens.shape[1] >= ledger.seq_length
        and not tokens.is_floating_point()
    )
    if not fits:
        got = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(
            f"tokens must be the ids of all {ledger.seq_length} columns of the cache's {ledger.batch_size} sequences, padding "
            f"included, [{ledger.batch_size}, {ledger.seq_length}] or more of them; got {got}."
        )
    return tokens.detach().to("cpu", torch.int64).contiguous()


def _described(layer: CacheLayerMixin) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What makes a layer like this one, and its tensors."""
    kind = type(layer).__name__
    if not isinstance(layer, KIVICacheLayer):
        tensors, plain = state_of(layer)
        return {"kind": kind, "plain": plain, "tensors": list(tensors)}, tensors
    store, _ = layer.stored
    tensors = live_tensors(store)
    _, heads, _, head_dim = store.key.window.shape
    described = {
        "kind": kind,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": dtype_name(layer.dtype),
        "layouts": [side.codec.layout for side in store.sides],
        "tensors": list(tensors),
    }
    return described, tensors


def _state_of(file: CheckedFile, path: Path) -> State:
    version = file.metadata.get("version")
    if version not in ("1", "2", str(VERSION)):
        raise ValueError(
            f"{path} has version {version} of the format and this code reads version {VERSION}; use the code that wrote it, or "
            "prefill again."
        )
    state = State(**json.loads(file.metadata["state"]))
    if version == str(VERSION):
        return state
    if any(_CHANGED_BITS in (bits if isinstance(bits, list) else [bits]) for bits in map(state.options.get, _BITS)):
        raise ValueError(
            f"{path} has {_CHANGED_BITS}-bit codes of version {version} of the format, which version {VERSION} stores in another "
            "way; use the code that wrote it, or prefill again."
        )
    return dataclasses.replace(state, options=_as_meant(state.options)) if version == "1" else state


def _as_meant(options: dict[str, Any]) -> dict[str, Any]:
    """Options of version 1, in which None stood for other values, by the values that were meant."""
    fitted = options.get("k_range") == "lsq"
    return options | {
        name: value if fitted else None for name, value in _FIRST_DEFAULTS.items() if options.get(name) is None
    }


def _static_of(state: State, file: CheckedFile) -> StaticParameters | None:
    if state.static is None:
        return None
    named = {name.removeprefix(_STATIC): file.tensor(name).clone() for name in file.names if name.startswith(_STATIC)}
    return StaticParameters.of(named, state.static)


def _devices(model: Model, device: torch.device | str | None, count: int) -> list[torch.device]:
    """The device of each layer."""
    if device is not None:
        return [torch.device(device)] * count
    if not isinstance(model, PreTrainedModel):
        return [torch.device("cpu")] * count
    layers = getattr(model.base_model, "layers", ())
    devices = [next(layer.parameters()).device for layer in layers] if len(layers) == count else [model.device] * count
    if any(device.type == "meta" for device in devices):
        raise ValueError("the weights of the model are offloaded, so that its device is not known here: pass device=.")
    return devices


def _dtypes(state: State, model: Model, dtype: torch.dtype | None) -> ToDtype:
    """In which dtype states are loaded that were saved in a dtype."""
    if (
        dtype is None
        and isinstance(model, PreTrainedModel)
        and state.model_dtype not in (None, dtype_name(model.dtype))
    ):
        dtype = model.dtype
    return lambda saved: dtype or saved


def _fill_ledger(ledger: Ledger, state: State, file: CheckedFile, device: torch.device) -> None:
    longest = max(state.lengths)
    if ledger.max_length is not None and longest > ledger.max_length:
        raise ValueError(f"the file holds {longest} tokens; got max_length={ledger.max_length}.")
    ledger.geometry = dataclasses.replace(ledger.geometry, draft_room=state.draft_room)

    def tensor(name: str) -> torch.Tensor | None:
        return file.tensor(name).to(device, copy=True) if name in file.names else None

    ledger.restore(
        Saved(
            seq_length=state.seq_length,
            lengths=state.lengths,
            packed=state.packed,
            is_real=tensor("is_real"),
            most=longest,
            fewest_packed=min(state.packed),
            reach=state.reach,
            tokens=tensor("tokens"),
            counts={},
        )
    )


def _fill_layer(
    layer: CacheLayerMixin,
    entry: dict[str, Any],
    file: CheckedFile,
    prefix: str,
    device: torch.device,
    to_dtype: ToDtype,
) -> None:
    def tensor(name: str) -> torch.Tensor:
        return file.tensor(prefix + name)

    if isinstance(layer, KIVICacheLayer):
        dtype = to_dtype(getattr(torch, entry["dtype"]))
        like = torch.empty(layer.ledger.batch_size, entry["heads"], 0, entry["head_dim"], dtype=dtype, device=device)
        layer.lazy_initialization(like, like)
        store, _ = layer.stored
        layouts = [side.codec.layout for side in store.sides]
        if layouts != entry["layouts"]:
            raise ValueError(
                f"layer {layer.layer_idx} is stored as {entry['layouts']} in the file; here it would be {layouts}. Use the "
                "code that wrote it, or prefill again."
            )
        fill(store, set(entry["tensors"]), tensor)
        return
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        saved = dtype_in(entry["plain"])
        if saved is not None and to_dtype(saved) != saved:
            raise ValueError(
                f"the states of linear-attention layers have dtypes of their own and cannot be converted: load the file in "
                f"{dtype_name(saved)}, in which it was saved, for a model of that dtype."
            )
        to_dtype = _as_saved
    restore(layer, entry["tensors"], tensor, entry["plain"], device, to_dtype)


def _as_saved(dtype: torch.dtype) -> torch.dtype:
    return dtype
