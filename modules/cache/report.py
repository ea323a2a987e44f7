"""What a KIVI cache takes, counted from its tensors."""

from __future__ import annotations

from typing import Any

import torch

from modules.codecs.full_precision import FULL_PRECISION


def nominal_bits(tokens: int, bits: float, residual_length: int) -> float:
    """Bits an element by the usual table, `(R*16 + (T-R)*bits) / T`: codes and window, no metadata."""
    window = min(tokens, residual_length)
    return (window * 16 + (tokens - window) * bits) / tokens if tokens else 0.0


def _storage_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the storages of tensors, each counted once; those of the meta device have a size and no address."""
    storages = (t.untyped_storage() for t in tensors if t is not None and t.numel())
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _states_of(layer: Any) -> list[torch.Tensor]:
    """The states of a linear-attention layer of transformers: one of each kind to 5.17, by number later."""
    states = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states")]
    held = [list(state.values()) if isinstance(state, dict) else [state] for state in states]
    return [state for some in held for state in some if isinstance(state, torch.Tensor)]


def cache_report(cache: Any) -> dict[str, Any]:
    """What `KIVICache.get_cache_info()` returns; bytes are those of the tensors' storages.

    Keys:
        seq_length: columns seen, padding included (tokens); batch_size: sequences; num_layers; backend.
        tokens: `sinks`, `packed`, `window` of the longest sequence, and `lengths` of all.
        bytes: `codes`, `metadata` (scales, minima; the order of the channels), `full_precision` (sinks, window and 16-bit
            sides), `slack` (codes and metadata that are allocated and unused), `other_layers` (sliding windows), `recurrent` (states of linear-attention layers, whose size does
            not grow with the tokens), `total`;
            `dense` is the same tokens in the model's dtype; `ratio` is `dense / total`.
        bits: an element's, `stored` (all bytes over all stored elements), `packed` (codes and metadata alone), `nominal`
            (the table's `(R*16 + (T-R)*bits)/T`).
        options: those of the cache, by name.
        saturated: of static INT8, how many stored `keys`, `values` and, in `total`, of both lay beyond the range that
            was calibrated; counted from the codes. Waits for a GPU.
    """
    layers = [layer.store for layer in cache.kivi_layers if layer.store is not None]
    backends = [layer.backend.name for layer in cache.kivi_layers if layer.backend is not None]
    info: dict[str, Any] = {
        "type": type(cache).__name__,
        "seq_length": cache.get_seq_length(),
        "batch_size": layers[0].batch_size if layers else 0,
        "num_layers": len(cache.layers),
        "backend": backends[0] if layers else None,
        "options": {name: getattr(cache.options, name) for name in cache.options.names()},
    }
    lengths = list(layers[0].lengths) if layers else []
    longest = max(range(len(lengths)), key=lengths.__getitem__) if lengths else None
    stored = 0 if longest is None else lengths[longest]
    sinks = min(stored, layers[0].sink_length) if layers else 0
    packed = 0 if longest is None else layers[0].packed[longest]
    window = stored - sinks - packed
    info["tokens"] = {"sinks": sinks, "packed": packed, "window": window, "lengths": lengths}

    codes = metadata = fixed = full = slack = dense = elements = packed_elements = 0
    packed_used = 0.0
    for layer in layers:
        fixed += _storage_bytes(layer.query_energy)
        for side in layer.sides:
            side_packed = _storage_bytes(side.codes, side.extra)
            side_meta = _storage_bytes(side.scale, side.minimum)
            fixed += _storage_bytes(side.order)
            used = sum(layer.packed) / (len(layer.packed) * side.capacity) if side.capacity and layer.packed else 0.0
            per_token = side.sinks.shape[1] * side.sinks.shape[3]
            elements += per_token * sum(layer.lengths)
            dense += per_token * sum(layer.lengths) * side.sinks.element_size()
            slack += round((side_packed + side_meta) * (1 - used))
            if side.codec.layout == FULL_PRECISION:
                full += side_packed
            else:
                codes, metadata = codes + side_packed, metadata + side_meta
                packed_elements += per_token * sum(layer.packed)
                packed_used += (side_packed + side_meta) * used
            full += _storage_bytes(side.sinks, side.window)
    total = _storage_bytes(*(t for layer in layers for t in layer.tensors().values()))
    others = [layer for layer in cache.layers if layer not in cache.kivi_layers]
    other = _storage_bytes(*(getattr(layer, name, None) for layer in others for name in ("keys", "values")))
    recurrent = _storage_bytes(*(state for layer in others for state in _states_of(layer)))
    info["bytes"] = {
        "codes": codes,
        "metadata": metadata + fixed,
        "full_precision": full,
        "slack": slack,
        "other_layers": other,
        "recurrent": recurrent,
        "total": total + other + recurrent,
        "dense": dense + other + recurrent,
        "ratio": (dense + other + recurrent) / (total + other + recurrent) if total + other + recurrent else 0.0,
    }
    bits = [bits for layer in cache.kivi_layers for bits in layer.bits]
    info["bits"] = {
        "stored": 8 * total / elements if elements else 0.0,
        "packed": 8 * packed_used / packed_elements if packed_elements else 0.0,
        "nominal": nominal_bits(stored, sum(bits) / len(bits), cache.options.residual_length) if bits else 0.0,
    }
    if cache.static is not None:
        keys, values = (sum(counts) for counts in zip(*[(0, 0), *(layer.saturated() for layer in layers)]))
        info["saturated"] = {"keys": keys, "values": values, "total": keys + values}
    return info


_OTHERS = {"other_layers": "sliding windows of other layers", "recurrent": "states of linear attention"}


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.3f} MB"


def format_report(info: dict[str, Any]) -> str:
    """`cache_report` as a table of text."""
    tokens, size, bits, options = info["tokens"], info["bytes"], info["bits"], info["options"]
    rows = [
        ("layers, sequences, columns", f"{info['num_layers']}, {info['batch_size']}, {info['seq_length']}"),
        ("bits of keys, values", f"{options['k_bits']}, {options['v_bits']}" if options["use_kivi"] else "16, 16"),
        (
            "group, window, sinks (tokens)",
            f"{options['group_size']}, {options['residual_length']}, {options['sink_length']}",
        ),
        ("attention", str(info["backend"])),
        ("tokens in sinks / packed / window", f"{tokens['sinks']} / {tokens['packed']} / {tokens['window']}"),
        ("codes", _megabytes(size["codes"])),
        ("scales and minima", _megabytes(size["metadata"])),
        ("full precision", _megabytes(size["full_precision"])),
        ("of these unused (room to grow)", _megabytes(size["slack"])),
        *((name, _megabytes(size[key])) for key, name in _OTHERS.items() if size[key]),
        ("total", _megabytes(size["total"])),
        ("the same tokens unquantized", f"{_megabytes(size['dense'])}: {size['ratio']:.2f} times as much"),
        ("bits an element, all stored", f"{bits['stored']:.2f}"),
        ("bits an element, packed part", f"{bits['packed']:.2f}"),
        ("bits an element, nominal", f"{bits['nominal']:.2f}"),
    ]
    if saturated := info.get("saturated"):
        rows.append(("keys, values that saturated", f"{saturated['keys']}, {saturated['values']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{info['type']}"] + [f"  {name:<{width}}  {value}" for name, value in rows])
