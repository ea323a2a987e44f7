"""`KIVICache`: transformers' `Cache` over packed layers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from modules.kivi_options import KIVIOptions, head_dim_of
from modules.memory import cache_report, format_report
from modules.packed_attention import attend_and_store, decode, pick_backend
from modules.packed_state import PackedLayer, PackedSide

if TYPE_CHECKING:
    from modules.decode_runner import DecodeRunner


def as_data(method: Callable) -> Callable:
    """A method without autograd, inference tensors and autocast: what it stores serves steps in every mode."""
    apart = torch.inference_mode(False)(torch.no_grad()(method))

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        casting = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if casting:
            with contextlib.ExitStack() as stack:
                for device in casting:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return apart(*args, **kwargs)
        plain = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return (method if plain else apart)(*args, **kwargs)

    return run


@dataclasses.dataclass
class Step:
    """The tokens of one forward: which of the `[B, q]` new columns are real.

    Attributes:
        real: bool `[B, q]`, None where all are.
        lengths: real tokens of each sequence.
        order: int64 `[B, q]`, columns with the real ones first; None where they are first already.
    """

    real: torch.Tensor | None
    lengths: list[int]
    order: torch.Tensor | None

    @classmethod
    def of(cls, real: torch.Tensor | None, batch: int, length: int) -> Step:
        """The step for a mask of new columns, bool `[B, q]`, or None."""
        if real is None or bool(real.all()):
            return cls(None, [length] * batch, None)
        lengths = real.sum(1).tolist()
        first = torch.arange(length, device=real.device) < real.sum(1, keepdim=True)
        order = None if torch.equal(first, real) else torch.argsort(~real, dim=1, stable=True)
        return cls(real, lengths, order)

    def real_first(self, states: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """`states` with the real tokens moved to the front of `dim`."""
        return states if self.order is None else states.gather(dim, self._index(states, dim, self.order))

    def as_given(self, states: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The inverse of `real_first`."""
        if self.order is None:
            return states
        return states.gather(dim, self._index(states, dim, self.order.argsort(dim=1)))

    @staticmethod
    def _index(states: torch.Tensor, dim: int, order: torch.Tensor) -> torch.Tensor:
        shape = [1] * states.dim()
        shape[0], shape[dim] = order.shape
        return order.to(states.device).view(shape).expand_as(states)


class KIVICacheLayer(CacheLayerMixin):
    """One layer of a `KIVICache`; its tensors are in `state` (a `PackedLayer`) once the first tokens have come.

    Args:
        options: what to store.
        bits: `(k_bits, v_bits)` of this layer.
        layer_idx: for messages.
        max_length: tokens a sequence may reach; None grows as needed.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, options: KIVIOptions, bits: tuple[int, int], layer_idx: int = 0, max_length: int | None = None):
        super().__init__()
        self.options, self.bits, self.layer_idx, self.max_length = options, bits, layer_idx, max_length
        self.state: PackedLayer | None = None
        self.columns = 0  # padded tokens seen
        self.column_is_real: torch.Tensor | None = None  # bool [B, columns] once some are padding

    def __repr__(self) -> str:
        k_bits, v_bits = self.bits
        return f"{type(self).__name__}(k_bits={k_bits}, v_bits={v_bits}, tokens={self.columns})"

    @as_data
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for states shaped `[B, H, *, D]`; no token is stored."""
        self.dtype, self.device = key_states.dtype, key_states.device
        with self._located():
            self.state = PackedLayer.empty(key_states, self.bits, self.options, self.max_length)
            self.state.backend = pick_backend(self.options.backend, self.state)
        self.is_initialized = True

    @as_data
    def append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step, query: torch.Tensor | None = None
    ) -> None:
        """Store the real ones of the new tokens `[B, H, q, D]`; their queries, if known, help to choose wide channels.

        Raises:
            ValueError: naming the layer, for NaN, infinite or too large states, or a full cache. Nothing is stored then.
        """
        another_batch = self.columns == 0 and self.is_initialized and self.batch_size != key_states.shape[0]
        if not self.is_initialized or another_batch:
            self.lazy_initialization(key_states, value_states)
        with self._located():
            key_states, value_states = (step.real_first(states.detach()) for states in (key_states, value_states))
            self.state.check_room(key_states.shape[0], step.lengths)
            value_states = self.state.rotate(value_states)
            self.state.check_states(key_states, value_states)
            if query is not None:
                self.state.observe(step.real_first(query.detach()), step.lengths)
            self.state.append(key_states, value_states, step.lengths)
        self.add_columns(step, key_states.shape[2])

    def add_columns(self, step: Step, length: int) -> None:
        """Count the `length` columns of a step in, once its tokens are stored."""
        if step.real is not None or self.column_is_real is not None:
            self._add_marks(step, length)
        self.columns += length

    @as_data
    def _add_marks(self, step: Step, length: int) -> None:
        batch, device = self.state.batch_size, self.device
        old, new = self.column_is_real, step.real
        old = torch.ones(batch, self.columns, dtype=torch.bool, device=device) if old is None else old
        new = torch.ones(batch, length, dtype=torch.bool, device=device) if new is None else new.to(device)
        self.column_is_real = torch.cat([old, new], dim=1)

    @contextlib.contextmanager
    def _located(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"KIVI cache, layer {self.layer_idx}: {error}") from error

    def attend(
        self, query: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, scaling: float, step: Step
    ) -> torch.Tensor:
        """Attend with the new tokens over what is stored and over themselves, then store them. Gives no gradients.

        Args:
            query: `[B, num_attention_heads, q, D]`; key_states, value_states: `[B, num_key_value_heads, q, D]`.

        Returns:
            `[B, q, num_attention_heads, D]` in the dtype of the cache.
        """
        out = None
        if not query.dtype == key_states.dtype == value_states.dtype == self.dtype:  # under autocast
            query, key_states, value_states = (t.to(self.dtype) for t in (query, key_states, value_states))
        with self._located():
            if step.real is None and query.shape[2] == 1:
                out = decode(query, key_states, value_states, self.state, scaling)
            if out is None:
                out = self._attend_and_store(query, key_states, value_states, scaling, step)
            elif self.state.observes:
                self._observe(query, step)
        self.add_columns(step, key_states.shape[2])
        return out

    @as_data
    def _observe(self, query: torch.Tensor, step: Step) -> None:
        self.state.observe(query.detach(), step.lengths)

    @as_data
    def _attend_and_store(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, step: Step
    ) -> torch.Tensor:
        query, key, value = (step.real_first(states.detach()) for states in (query, key, value))
        return step.as_given(attend_and_store(query, key, value, self.state, scaling, step.lengths))

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
        if self.columns == 0:
            self.append(key_states, value_states, step, query)
            return key_states, value_states
        past = [self._dense(self.state.key), self._dense(self.state.value)]
        self.append(key_states, value_states, step, query)
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(past, (key_states, value_states)))

    @as_data
    def _dense(self, side: PackedSide) -> torch.Tensor:
        """All stored states in the columns they came in, `[B, H, columns, D]`; zeros at padding."""
        dense = self._dense_as_stored(side)
        return self.state.rotate(dense) if side is self.state.value else dense

    def _dense_as_stored(self, side: PackedSide) -> torch.Tensor:
        if self.column_is_real is None:
            return self.state.read(side, slice(None), self.dtype)
        batch, heads, _, head_dim = side.sinks.shape
        dense = side.sinks.new_zeros(batch, heads, self.columns, head_dim)
        for row in range(batch):
            dense[row, :, self.column_is_real[row]] = self.state.read(side, slice(row, row + 1), self.dtype)[0]
        return dense

    def get_seq_length(self) -> int:
        """Columns seen, padding included (tokens)."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns `(stored + query_length, first)` a mask spans."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """Tokens the layer may hold, -1 without a limit."""
        return -1 if self.max_length is None else self.max_length

    @property
    def batch_size(self) -> int:
        """Sequences stored; an AttributeError before the first, as transformers expects."""
        if self.state is None:
            raise AttributeError("batch_size")
        return self.state.batch_size

    @as_data
    def reset(self) -> None:
        """Forget everything; with `max_length` the memory is kept."""
        if self.max_length is not None and self.state is not None:
            self.state.keep([0] * self.state.batch_size)
        else:
            self.state, self.is_initialized = None, False
        self.columns, self.column_is_real = 0, None

    @as_data
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns; a positive number is the older convention, columns to keep."""
        given = int(tokens_to_remove)
        keep = min(given, self.columns) if given > 0 else max(0, self.columns + given)
        if keep == self.columns:
            return
        if self.column_is_real is None:
            lengths = [keep] * self.state.batch_size
        else:
            self.column_is_real = self.column_is_real[:, :keep]
            lengths = self.column_is_real.sum(1).tolist()
        self.state.keep(lengths)
        self.columns = keep

    @as_data
    def _select(self, index: torch.Tensor) -> None:
        if self.state is None:
            return
        self.state.select(index)
        if self.column_is_real is not None:
            self.column_is_real = self.column_is_real[index.to(self.column_is_real.device)]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence `i` becomes what `beam_idx[i]` was (beam search)."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, side by side."""
        if self.state is not None:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`: int64 numbers or a bool mask. An IndexError for one that is not there."""
        if self.state is not None:
            self._select(torch.arange(self.batch_size)[torch.as_tensor(indices).cpu()])

    @as_data
    def offload(self) -> None:
        """Move the tensors to the CPU."""
        if self.state is not None:
            self.state.to("cpu")

    @as_data
    def prefetch(self) -> None:
        """Move the tensors back to the layer's device."""
        if self.state is not None:
            self.state.to(self.device)

    @as_data
    def __deepcopy__(self, memo: dict[int, Any]) -> KIVICacheLayer:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @as_data
    def snapshot(self, new_tokens: int) -> dict[str, Any]:
        """What `restore` needs to undo a step of `new_tokens` tokens."""
        saved = dict(self.__dict__)
        if self.state is not None:
            saved["state"] = self.state.snapshot(new_tokens)
        return saved


class KIVICache(Cache):
    """A KV cache whose older tokens are packed 2-, 4- or 8-bit codes (KIVI, arXiv 2402.02750).

    Works with the KIVI models, which attend over the codes, and with any stock model, which gets dequantized states.
    Sliding-window layers keep transformers' own layer.

    Args:
        config: of the model; gives the layers. None makes layers as they come, all of them packed.
        options: what is stored; None takes what the config carries.
        max_length: tokens a sequence may reach, allocated at once; None grows as needed.
        offloading: keep the layers on the CPU but for the one in use, as `DynamicCache(offloading=True)` does.
        overrides: single options by name.

    Raises:
        ValueError: for an option that is unknown or not allowed, or that does not fit the model's heads.

    Example:
        >>> cache = KIVICache(model.config, k_bits=2, v_bits=2)
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        options: KIVIOptions | None = None,
        *,
        max_length: int | None = None,
        offloading: bool = False,
        **overrides: Any,
    ) -> None:
        if options is None:
            options = KIVIOptions.from_config(config and config.get_text_config(decoder=True), overrides)
        else:
            options = dataclasses.replace(options, **overrides)
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1
        ):
            raise ValueError(f"max_length must be a whole number of tokens, 1 or more, or None; got {max_length!r}.")
        self.options, self.max_length = options, max_length
        if config is None:
            options.bits_of_layer(0, 1)  # a list of bits needs to know how many layers there are
            super().__init__(layer_class_to_replicate=self._new_layer, offloading=offloading)
        else:
            super().__init__(layers=self._layers_of(config.get_text_config(decoder=True)), offloading=offloading)
        self._step: Step | None = None
        self._runner: DecodeRunner | None = None

    def _layers_of(self, config: PreTrainedConfig) -> list[CacheLayerMixin]:
        self.options.check_head_dim(head_dim_of(config))
        layers = DynamicCache(config=config).layers  # transformers' own choice of layer for each kind of attention
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                bits = self.options.bits_of_layer(index, len(layers))
                layers[index] = KIVICacheLayer(self.options, bits, index, self.max_length)
        return layers

    def _new_layer(self) -> KIVICacheLayer:
        return KIVICacheLayer(self.options, self.options.bits_of_layer(0, 1), len(self.layers), self.max_length)

    def layer(self, layer_idx: int) -> CacheLayerMixin:
        """The layer `layer_idx`; without a config it is made when it is first asked for."""
        while self.layer_class_to_replicate is not None and len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        return self.layers[layer_idx]

    @property
    def kivi_layers(self) -> list[KIVICacheLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, KIVICacheLayer)]

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Within it, `step` says which new tokens are real; a failure leaves the cache as it was before."""
        new_tokens = max(step.lengths, default=0)
        saved = [
            layer.snapshot(new_tokens) if isinstance(layer, KIVICacheLayer) else dict(layer.__dict__)
            for layer in self.layers
        ]
        outer, self._step = self._step, step
        try:
            yield
        except BaseException:
            del self.layers[len(saved) :]
            for layer, state in zip(self.layers, saved):
                layer.__dict__.clear()
                layer.__dict__.update(state)
            raise
        finally:
            self._step = outer

    def new_step(self, attention_mask: torch.Tensor | None, batch: int, length: int) -> Step:
        """The step for `length` new columns under a mask `[B, stored + length]`, 1 for real tokens.

        Raises:
            ValueError: for another batch than is stored, a mask of another shape, or one that changes tokens already
                stored.
        """
        stored = self.get_seq_length()
        if stored and self.kivi_layers:
            self.kivi_layers[0].state.check_batch(batch)
        if attention_mask is None:
            return Step.of(None, batch, length)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"a KIVI cache takes a mask of shape [batch, tokens]; got one of {attention_mask.dim()} dimensions. "
                "Custom masks need a full-precision cache (past_key_values=DynamicCache())."
            )
        if tuple(attention_mask.shape) != (batch, stored + length):
            raise ValueError(
                f"attention_mask must have the shape {(batch, stored + length)}: {stored} stored tokens and {length} new "
                f"ones; got {tuple(attention_mask.shape)}."
            )
        real = attention_mask.bool()
        if stored and self.kivi_layers:
            known = self.kivi_layers[0].column_is_real
            past = real[:, :stored]
            same = bool(past.all()) if known is None else torch.equal(past, known.to(past.device))
            if not same:
                raise ValueError(
                    "attention_mask changes tokens that are stored already: its first "
                    f"{stored} columns must be as they were. Start with a new cache, or crop() this one."
                )
        return Step.of(real[:, stored:], batch, length)

    def next_positions(self, step: Step, length: int, device: torch.device) -> torch.Tensor:
        """Positions `[B, length]` of the new tokens: each sequence counts its own real tokens."""
        state = self.kivi_layers[0].state if self.kivi_layers else None
        stored = state.lengths if state is not None and self.get_seq_length() else [0] * len(step.lengths)
        start = torch.tensor(stored, device=device).unsqueeze(1)
        if step.real is None:
            return start + torch.arange(length, device=device)
        return start + (step.real.to(device).cumsum(1) - 1).clamp_min(0)

    def set_columns(self, stored: int, step: Step) -> None:
        """Say in which columns from `stored` on the real tokens of `step` came, where they were stored real ones first."""
        for layer in self.kivi_layers:
            layer.column_is_real = torch.cat([layer.column_is_real[:, :stored], step.real.to(layer.device)], dim=1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens of one layer; return all its keys and values, dequantized, `[B, H, columns, D]`."""
        return super().update(key_states, value_states, layer_idx, *args, step=self._step, **kwargs)

    def attend(
        self, query: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, scaling: float
    ) -> torch.Tensor:
        """`KIVICacheLayer.attend` for one layer, in the current step."""
        layer = self.layers[layer_idx]
        step = self._step or Step.of(None, query.shape[0], query.shape[2])
        if not self.offloading:
            return layer.attend(query, key_states, value_states, scaling, step)
        layer.prefetch()
        out = layer.attend(query, key_states, value_states, scaling, step)
        layer.offload()
        return out

    def replay(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Logits `[B, 1, vocabulary]` of a step of one token from a CUDA graph; None where the step is for the model.

        Args:
            model: the causal LM; its forward is what is recorded.
            input_ids, attention_mask, position_ids: as the forward got them.
        """
        if input_ids.shape[1] != 1 or model.training or not input_ids.is_cuda or torch.is_autocast_enabled("cuda"):
            return None
        if self._runner is None:
            from modules.decode_runner import DecodeRunner  # which needs this module

            self._runner = DecodeRunner(model)
        if self._runner.model is not model or self._runner.running or not self.get_seq_length():
            return None
        step = self.new_step(attention_mask, input_ids.shape[0], 1)
        if step.real is not None:
            return None
        if position_ids is not None and not torch.equal(
            position_ids, self.next_positions(step, 1, position_ids.device)
        ):
            return None
        return self._runner.step(self, input_ids).clone()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runner": None}  # a graph is bound to the memory of this very cache

    def get_cache_info(self) -> dict[str, Any]:
        """What is stored, counted from the tensors: tokens, bytes by part, bits an element as stored and nominal."""
        return cache_report(self)

    def __repr__(self) -> str:
        opt = self.options
        return (
            f"{type(self).__name__}(layers={len(self.layers)}, tokens={self.get_seq_length()}, k_bits={opt.k_bits}, "
            f"v_bits={opt.v_bits}, group_size={opt.group_size}, residual_length={opt.residual_length}, "
            f"sink_length={opt.sink_length})"
        )


def print_kivi_stats(cache: KIVICache) -> None:
    """Print `cache.get_cache_info()` as a table."""
    print(format_report(cache.get_cache_info()))


__all__ = ["KIVICache", "KIVICacheLayer", "print_kivi_stats"]
