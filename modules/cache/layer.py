"""`KIVICacheLayer`: one layer of a `KIVICache` under transformers' contract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from modules.cache.modes import as_data, autocasting
from modules.codecs.codec import Codec
from modules.codecs.kivi import codecs_of
from modules.codecs.static import ChannelScales
from modules.codecs.static_codec import StaticCodec
from modules.kernels.backend import Backend
from modules.kernels.registry import pick_backend
from modules.options import KIVIOptions
from modules.store.layer import PackedLayer
from modules.store.ledger import Ledger
from modules.store.side import PackedSide
from modules.store.step import Step


class KIVICacheLayer(CacheLayerMixin):
    """One layer of a `KIVICache`; its tensors are in `store` once the first tokens have come.

    Args:
        options: what to store, those of this layer.
        bits: `(k_bits, v_bits)` of this layer.
        layer_idx: its number.
        ledger: of the cache.
        static: calibrated scales of keys and values, which are then stored by those; None for KIVI's own.
        rotary: the share of a head's channels that positions rotate, see `modules.options.rotary_share`; all of them, as in
            Llama and Qwen, where there is no config to say it.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        options: KIVIOptions,
        bits: tuple[int, int],
        layer_idx: int,
        ledger: Ledger,
        static: tuple[ChannelScales, ChannelScales] | None = None,
        rotary: float = 1.0,
    ) -> None:
        super().__init__()
        self.options, self.bits, self.layer_idx, self.ledger = options, bits, layer_idx, ledger
        self.static, self.rotary = static, rotary
        self.store: PackedLayer | None = None
        self.backend: Backend | None = None

    def __repr__(self) -> str:
        k_bits, v_bits = self.bits
        return f"{type(self).__name__}(k_bits={k_bits}, v_bits={v_bits}, tokens={self.get_seq_length()})"

    @as_data
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for states shaped `[B, H, *, D]`; no token is stored."""
        self.dtype, self.device = key_states.dtype, key_states.device
        head_dim = key_states.shape[3]
        with self._located():
            self.options.check_head_dim(head_dim)
            codecs = self._codecs(head_dim)
            rotates, exact = self.options.rotates_values(self.bits[1]), self.options.exact_products
            store = PackedLayer.empty(key_states, codecs, self.ledger, rotates, exact)
            self.backend = pick_backend(self.options.backend, store)
        if not self.ledger.seq_length and self.ledger.batch_size != key_states.shape[0]:
            self.ledger.clear([0] * key_states.shape[0])
        self.store, self.is_initialized = store, True

    def _codecs(self, head_dim: int) -> tuple[Codec, Codec]:
        if self.static is None:
            return codecs_of(self.options, self.bits, head_dim, int(self.rotary * head_dim))
        key, value = self.static
        return StaticCodec(key.to(self.device)), StaticCodec(value.to(self.device))

    @property
    def stored(self) -> tuple[PackedLayer, Backend]:
        """The tensors and what attends over them."""
        if self.store is None or self.backend is None:
            raise ValueError(
                f"KIVI cache, layer {self.layer_idx}: it holds no tensors yet; run a forward over the cache first."
            )
        return self.store, self.backend

    def forget(self) -> None:
        """Drop the tensors."""
        self.store, self.is_initialized = None, False
        self.ledger.moves += 1

    @contextlib.contextmanager
    def _located(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"KIVI cache, layer {self.layer_idx}: {error}") from error

    def _admit(
        self, step: Step, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor | None
    ) -> tuple[PackedLayer, Backend]:
        """`stored`, made for first tokens; `ValueError` for states that do not fit it."""
        store, backend = self.store, self.backend
        if store is not None and not self.ledger.seq_length and store.batch_size != key.shape[0]:
            self.forget()  # memory that reset() kept, of another batch
            store = None
        if store is None or backend is None:
            self.lazy_initialization(key, value)
            store, backend = self.stored
        with self._located():
            self._check_shapes(store.key.window, step, key, value, query)
            self.ledger.check_room(step)
        return store, backend

    def _check_shapes(
        self,
        window: torch.Tensor,
        step: Step,
        key: torch.Tensor,
        value: torch.Tensor,
        query: torch.Tensor | None,
    ) -> None:
        _, heads, _, head_dim = window.shape
        self.ledger.check_batch(key.shape[0])
        expected = (window.shape[0], heads, step.length, head_dim)
        for what, states in (("keys", key), ("values", value)):
            if tuple(states.shape) != expected:
                raise ValueError(
                    f"the cache holds {what} of {heads} heads of {head_dim} channels and expects the shape {expected}; got "
                    f"{tuple(states.shape)}. Use a cache of its own for another model."
                )
        if query is not None and (
            query.shape[1] % heads or (query.shape[0], *query.shape[2:]) != (expected[0], *expected[2:])
        ):
            raise ValueError(
                f"queries must be [{expected[0]}, a multiple of {heads} heads, {step.length}, {head_dim}]; got "
                f"{tuple(query.shape)}. Use a cache of its own for another model."
            )
        if key.dtype != self.dtype and not autocasting():
            raise ValueError(
                f"the cache holds {self.dtype} states and the new ones are {key.dtype}; go on in the dtype it was filled "
                "in, or start with a new cache."
            )
        if key.device != self.device:
            raise ValueError(f"the cache is on {self.device} and the new states are on {key.device}.")

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, step: Step
    ) -> torch.Tensor:
        """Attend with the new tokens over what is stored and over themselves, then store them. Gives no gradients.

        Args:
            query: `[B, num_attention_heads, q, D]`; key, value: `[B, num_key_value_heads, q, D]`.

        Returns:
            `[B, q, num_attention_heads, D]` in the dtype of the cache.

        Raises:
            ValueError: naming the layer, for states that do not fit, NaN, infinite or too large ones, or a full cache;
                nothing is stored then.
        """
        store, backend = self._admit(step, key, value, query)
        if not query.dtype == key.dtype == value.dtype == self.dtype:  # under autocast
            query, key, value = (t.to(self.dtype) for t in (query, key, value))
        with self._located():
            out = None
            if step.all_real and step.length == 1:
                out = backend.decode(query, key, value, store, scaling)
            if out is None:
                out = self._attend_and_store(query, key, value, scaling, step)
        return out

    @as_data
    def _attend_and_store(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, step: Step
    ) -> torch.Tensor:
        store, backend = self.stored
        query, key, value = (step.real_first(states.detach()) for states in (query, key, value))
        key, value = store.enter(key, value)
        out = backend.attend(store.fold(query), key, value, store, scaling, step)
        _append(backend, store, key, value, query, step)
        return step.as_given(store.leave(out))

    @as_data
    def append(self, key: torch.Tensor, value: torch.Tensor, step: Step, query: torch.Tensor | None = None) -> None:
        """Store the real ones of the new tokens `[B, H, q, D]`; their queries, if known, help to choose wide channels.

        Raises:
            ValueError: as `attend`.
        """
        store, backend = self._admit(step, key, value, query)
        with self._located():
            key, value = (step.real_first(states.detach().to(self.dtype)) for states in (key, value))
            key, value = store.enter(key, value)
            _append(backend, store, key, value, None if query is None else step.real_first(query.detach()), step)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        step: Step | None = None,
        query: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return all keys and values, the past dequantized: `[B, H, columns, D]`.

        This is transformers' contract, so any model can use the cache, at the cost of a full-size copy.
        """
        step = step or Step.of(None, key_states.shape[0], key_states.shape[2])
        store, _ = self._admit(step, key_states, value_states, query)
        past = [self.dense(side) for side in store.sides] if self.ledger.seq_length else []
        self.append(key_states, value_states, step, query)
        seen = store.seen(key_states, value_states)
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(past, seen)) if past else seen

    @as_data
    def dense(self, side: PackedSide) -> torch.Tensor:
        """All stored states of a side in the columns they came in, `[B, H, columns, D]`; zeros at padding."""
        store, _ = self.stored
        real, batch = self.ledger.is_real, store.batch_size
        if real is None:
            return store.given(side, store.read(side, slice(None), self.dtype))
        dense = side.window.new_zeros(batch, side.window.shape[1], self.ledger.seq_length, side.window.shape[3])
        for row in range(batch):
            states = store.given(side, store.read(side, slice(row, row + 1), self.dtype))
            dense[row, :, real[row].to(dense.device)] = states[0]
        return dense

    def get_seq_length(self) -> int:
        """Columns seen, padding included (tokens)."""
        return self.ledger.columns_of(self.layer_idx)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns `(stored + query_length, first)` a mask spans."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Tokens the layer may hold, -1 without a limit."""
        return -1 if self.ledger.max_length is None else self.ledger.max_length

    @property
    def batch_size(self) -> int:
        """Sequences stored; an AttributeError before the first, as transformers expects."""
        if self.store is None:
            raise AttributeError("batch_size")
        return self.store.batch_size

    @as_data
    def offload(self) -> None:
        """Move the tensors to the CPU."""
        if self.store is not None:
            self.store.to("cpu")

    @as_data
    def prefetch(self) -> None:
        """Move the tensors back to the layer's device."""
        if self.store is not None:
            self.store.to(self.device)

    def _of_the_cache(self, *args: Any) -> NoReturn:
        raise ValueError("the layers of a KIVICache share their lengths: call this of the cache, not of a layer.")

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _of_the_cache


def _append(
    backend: Backend,
    store: PackedLayer,
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor | None,
    step: Step,
) -> None:
    if query is not None:
        store.observe(query, step)
    store.make_room(step)
    backend.append(store, key, value, step)
