"""Packed layers of random tokens, with a ledger of their own: what backends are tested on, without a cache or a model."""

from __future__ import annotations

import torch

from modules.cache.static import GEOMETRY
from modules.codecs.kivi import codecs_of
from modules.codecs.static import LARGEST_WITHIN, ChannelScales
from modules.codecs.static_codec import StaticCodec
from modules.kernels.backend import Backend
from modules.kernels.registry import backend as backend_named
from modules.options import KIVIOptions
from modules.store.layer import PackedLayer
from modules.store.ledger import Geometry, Ledger
from modules.store.step import Step


def random_states(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, device="cpu"):
    """Keys `[B, H, T, D]` with a scale and an offset a channel, and values likewise shaped: the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    keys = draw(*shape) * (draw(shape[-1]).abs() + 0.1) + 2 * draw(shape[1], 1, shape[-1])
    return keys.to(device, dtype), draw(*shape).to(device, dtype)


def random_scales(kv_heads: int, head_dim: int, symmetric: bool, device="cpu") -> ChannelScales:
    """Scales of channels that reach from about -6 to 6, somewhat beyond or less."""
    generator = torch.Generator().manual_seed(head_dim)
    low, high = (4 + 4 * torch.rand(kv_heads, head_dim, generator=generator) for _ in range(2))
    if symmetric:
        return ChannelScales(torch.maximum(low, high) / LARGEST_WITHIN, torch.zeros_like(low)).to(device)
    return ChannelScales((high + low) / (2 * LARGEST_WITHIN), (high - low) / 2).to(device)


def empty_layer(
    batch: int = 1,
    *,
    static: str | None = None,
    bits: tuple[int, int] = (2, 2),
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    rotary: int = 0,
    **options,
) -> PackedLayer:
    """A layer without tokens, and its ledger (`layer.ledger`) of `batch` empty sequences; `options` are `KIVIOptions`'.

    With `static` it is one of a static cache: "int8", or "full precision" as layers are there that are not calibrated.
    """
    if static is not None:
        options, bits = {**options, "group_size": 1, "residual_length": 0, "sink_length": 0}, (16, 16)
    chosen = KIVIOptions(**options)
    geometry = Geometry(chosen.group_size, chosen.residual_length, chosen.sink_length)
    ledger = Ledger(GEOMETRY if static else geometry, max_length)
    like = torch.empty(batch, kv_heads, 0, head_dim, dtype=dtype, device=device)
    codecs = codecs_of(chosen, bits, head_dim, rotary)
    if static == "int8":
        key, value = (StaticCodec(random_scales(kv_heads, head_dim, symmetric, device)) for symmetric in (True, False))
        codecs = key, value
    layer = PackedLayer.empty(like, codecs, ledger, chosen.rotates_values(bits[1]), chosen.exact_products)
    ledger.clear([0] * batch)
    return layer


def make_layer(lengths: list[int], *, backend: str = "torch", seed: int = 0, **more) -> PackedLayer:
    """A layer, as by `empty_layer(**more)`, into which `backend` has put `lengths[b]` random tokens of sequence `b`.

    Two thirds come as a prompt, then all but the last five, then those one at a time, so that the ring has wrapped and groups
    were packed from it and from new tokens. Queries were observed before, so that wide channels differ from head to head.
    """
    layer = empty_layer(len(lengths), **more)
    batch, heads, _, head_dim = layer.key.window.shape
    window = layer.key.window
    states = random_states((batch, heads, max(1, *lengths), head_dim), window.dtype, seed, window.device)
    if layer.query_energy is not None:
        query, _ = random_states((batch, heads, 4, head_dim), torch.float32, seed + 1, window.device)
        layer.observe(query, Step.of(None, batch, 4))
    singles = 5
    marks = [[length * 2 // 3 for length in lengths], [max(length * 2 // 3, length - singles) for length in lengths]]
    marks += [[min(length, last + i + 1) for length, last in zip(lengths, marks[1])] for i in range(singles)]
    for target in marks:
        put(layer, backend_named(backend), *states, [goal - now for goal, now in zip(target, layer.lengths)])
    return layer


def put(layer: PackedLayer, backend: Backend, keys: torch.Tensor, values: torch.Tensor, counts: list[int]) -> None:
    """Store the next `counts[b]` of the tokens `keys`, `values` `[B, H, T, D]`, as a model gives them, and commit."""
    most = max(counts)
    if not most:
        return
    rows = [range(now, now + most) for now in layer.lengths]
    index = torch.tensor([[min(token, keys.shape[2] - 1) for token in row] for row in rows], device=keys.device)
    new = [
        states.gather(2, index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
        for states in (keys, values)
    ]
    step = Step.of_lengths(counts, most)
    layer.make_room(step)
    backend.append(layer, *layer.enter(*new), step)
    layer.ledger.commit(step)


def attend_and_store(
    backend: Backend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PackedLayer,
    scaling: float,
    counts: list[int] | None = None,
) -> torch.Tensor:
    """One step of a cache with this one layer, the general way: attend, observe, append, commit. States are as a model gives them."""
    step = Step.of_lengths(counts or [query.shape[2]] * query.shape[0], query.shape[2])
    key, value = layer.enter(key, value)
    layer.make_room(step)
    out = backend.attend(layer.fold(query), key, value, layer, scaling, step)
    layer.observe(query, step)
    backend.append(layer, key, value, step)
    layer.ledger.commit(step)
    return layer.leave(out)


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖; NaN compares false with every bound, and zeros give 1."""
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()
