"""`KIVICache`: transformers' `Cache` over packed layers that share one ledger."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import operator
import os
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from modules.cache.layer import KIVICacheLayer
from modules.cache.modes import as_data
from modules.cache.report import cache_report, format_report
from modules.cache.saved import read, write
from modules.cache.static import GEOMETRY, check_alone, check_packed, options_beside, parameters_of
from modules.cache.undo import Savepoint
from modules.codecs.static import StaticParameters
from modules.options import KIVIOptions, check_count, check_flag, head_dims_of, rotary_share, with_preset
from modules.store.ledger import Geometry, Ledger, OpenStep
from modules.store.step import Step

_WATCHED_TOKENS = 32  # marks of a GPU are copied once in so many steps, or a group where that is longer
DRAFT_ROOM = 64  # tokens that can be taken back exactly while a cache records its past
OVER_CODES = "kivi"  # attention implementations under which states are handed on, to be attended over the codes


class Deferred(NamedTuple):
    """What `KIVICache.update` leaves on the keys it hands on: where the attention function finds the past."""

    cache: KIVICache
    layer: KIVICacheLayer


class KIVICache(Cache):
    """A KV cache whose older tokens are packed 2-, 4- or 8-bit codes (KIVI, arXiv 2402.02750).

    Models under the attention implementation "kivi" attend over the codes; any other model gets dequantized states.
    Sliding-window and linear-attention layers keep transformers' own layer.

    Args:
        config: of the model; gives the layers. None makes layers as they come, all of them packed.
        options: what is stored; None takes what the config carries.
        max_length: tokens a sequence may reach, allocated at once; None grows as needed.
        offloading: keep the packed layers on the CPU but for the one in use; of no effect for a model on the CPU.
        static: calibrated INT8 parameters or their file: all tokens are then stored as int8 by their scales, from the
            first one on, in the layers they are for, and other layers in full precision. None takes the file that the config
            names, if it does; False does not.
        overrides: single options by name, or a `preset` of them; beside static parameters only `backend` has a meaning.

    Raises:
        ValueError: for an option that is unknown or not allowed, or that does not fit the model's heads, and for static
            parameters of another model.

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
        static: StaticParameters | str | os.PathLike | bool | None = None,
        **overrides: Any,
    ) -> None:
        check_flag("offloading", offloading)
        if max_length is not None:
            check_count("max_length", max_length)
        config = config and config.get_text_config(decoder=True)
        self.static = parameters_of(static, config)
        if self.static is not None:
            check_alone(options, overrides)
            options = options_beside(self.static, config, overrides)
        elif options is None:
            options = KIVIOptions.from_config(config, overrides)
        else:
            options = dataclasses.replace(options, **with_preset(overrides))
        self.config, self.options = config, options
        geometry = Geometry(options.group_size, options.residual_length, options.sink_length)
        self.ledger = Ledger(geometry if self.static is None else GEOMETRY, max_length)
        self._savepoint: Savepoint | None = None  # of the step of a model that opens none itself
        self._ended: Savepoint | None = None  # of the last such step, for a model that turns out to have more layers
        self._handed_on: set[int] = set()  # layers whose states are on their way to an attention function
        self._driven = self._over_codes = False
        self._model: weakref.ref[PreTrainedModel] | None = None  # that ran it last, where the model says so
        super().__init__(layers=[] if config is None else self._layers_of(config))
        if config is None:
            options.of_layer(0, 1)  # a list needs to know how many layers there are
        self.offloading = offloading

    def _layers_of(self, config: PreTrainedConfig) -> list[CacheLayerMixin]:
        for head_dim in head_dims_of(config):
            self.options.check_head_dim(head_dim)
        layers = DynamicCache(config=config).layers  # transformers' own choice of layer for each kind of attention
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                options = self.options.of_layer(index, len(layers))
                bits = options.bits_of_layer(0, 1)
                static = None if self.static is None else self.static.layers.get(index)
                layers[index] = KIVICacheLayer(options, bits, index, self.ledger, static, rotary_share(config))
        if self.static is not None:
            check_packed(self.static, layers)
        return layers

    def _layer(self, layer_idx: int) -> CacheLayerMixin:
        """The layer `layer_idx`; without a config it is made when it is first asked for."""
        if self.config is None and not self.ledger.seq_length:
            while len(self.layers) <= layer_idx:
                bits = self.options.bits_of_layer(0, 1)
                self.layers.append(KIVICacheLayer(self.options, bits, len(self.layers), self.ledger))
        if layer_idx >= len(self.layers):
            self._undo()
            raise ValueError(
                f"the cache has {len(self.layers)} layers and the model asks for one more, number {layer_idx}; make the "
                "cache with this model's config: model.create_kivi_cache() or KIVICache(model.config)."
            )
        return self.layers[layer_idx]

    @property
    def kivi_layers(self) -> list[KIVICacheLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, KIVICacheLayer)]

    @property
    def attends_over_codes(self) -> bool:
        """Whether the states go on to an attention function that knows codes: as the open step says, else by the config."""
        if self._driven:
            return self._over_codes
        implementation = getattr(self.config, "_attn_implementation", None) or ""
        return implementation.startswith(OVER_CODES)

    # Files

    @as_data
    def save(
        self,
        path: Path | str,
        tokens: torch.Tensor | None = None,
        model: PreTrainedModel | PreTrainedConfig | None = None,
    ) -> None:
        """Write what is stored to a file, which `load` reads: a prompt is fed once and asked many times, also by others.

        The file is safetensors with a SHA-256 over all of it. It holds the tokens that are alive and no room to grow, and
        takes the place of one that was there once it is whole.

        Args:
            path: of the file, in a folder that is there.
            tokens: ids of all columns, int64 `[B, columns]`; more may follow that are yet to be fed, such as the last one that
                `generate()` gave. None: those of the file that the cache is from, if it has not moved on.
            model: that filled the cache, so that another one is refused by its weights; a config, where weights are not to be
                compared. None: the KIVI model that ran it last.

        Raises:
            ValueError: for an empty cache, during a step or after one that was broken off; for tokens that are not those of
                the columns; for another model; for a folder that is not there; for layers that cannot be saved.
            OSError: as the disk has it. The file that was there before is untouched then.
        """
        if self._driven:
            raise ValueError("the cache is in the middle of a step; save it when the forward has ended.")
        self._settle()
        self.ledger.raise_if_marked()
        if tokens is None and self.tokens is not None and self.tokens.shape[1] >= self.ledger.seq_length:
            tokens = self.tokens
        model = model or (self._model and self._model())
        if model is None:
            raise ValueError(
                "the cache does not know which model filled it: pass save(path, model=model), or model=model.config for a file "
                "that any weights of that config may load."
            )
        write(self, Path(path), tokens, model)

    @classmethod
    def load(
        cls,
        path: Path | str,
        model: PreTrainedModel | PreTrainedConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
        offloading: bool = False,
        **options: Any,
    ) -> Self:
        """The cache in a file that `save` wrote, with its options; `tokens` are the ids saved with it.

        Args:
            path: of the file.
            model: that goes on with it. A config does as well, and then weights are not compared.
            device: of the tensors; None: that of each layer of the model, or the CPU for a config.
            dtype: of the states in full precision: torch.float32, bfloat16 or float16. A wider one is exact, a narrower one
                rounds them as a model of that dtype would have. None: as saved, or the model's if that has changed since.
            max_length, offloading: as of a new cache.
            options: by name. `backend` is taken; any other must be as it was saved.

        Raises:
            ValueError: for a file that is not there, truncated, altered in any byte or not a saved cache; for another config,
                other weights or options than it was saved with, saying what differs; for states that a dtype cannot say.
        """
        more = {"max_length": max_length, "offloading": offloading}
        return as_data(read)(cls, Path(path), model, device, dtype, options, **more)

    @property
    def tokens(self) -> torch.Tensor | None:
        """Ids of the columns from the first on, int64 `[B, n]`, of a cache from a file that says them, else None."""
        return self.ledger.tokens

    def check_tokens(self, input_ids: torch.Tensor) -> None:
        """Raise `ValueError` where ids `[B, n]` do not begin with `tokens`, as far as these are stored and known."""
        known = self.tokens
        if known is None or known.shape[0] != input_ids.shape[0]:
            return
        both = min(known.shape[1], input_ids.shape[1], self.ledger.seq_length)
        same = (known[:, :both].to(input_ids.device) == input_ids[:, :both]).all(0)
        if not bool(same.all()):
            raise ValueError(
                f"the tokens are not those that the cache holds from column {int(same.to(torch.uint8).argmin())} on: pass "
                "cache.tokens and what is to follow, torch.cat([cache.tokens, new_ids], dim=1)."
            )

    def ran(self, model: PreTrainedModel) -> None:
        """Note that `model` ran a step: `save` writes by what it can be told."""
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a process that reads a pickle has another model

    # Steps

    @contextlib.contextmanager
    def step(self, step: Step, over_codes: bool) -> Iterator[None]:
        """One forward of a model over the cache: within it layers write `step`, at its end the cache has moved on.

        A failure within leaves the cache as it was before.

        Args:
            over_codes: the model's attention function knows codes; else it gets dequantized states.

        Raises:
            ValueError: where some layers got no states.
        """
        self._settle()
        with self.undone_on_failure(step):
            self.ledger.open = opened = OpenStep(step)
            self._driven, self._over_codes = True, over_codes
            try:
                yield
                self._check_complete(opened)
                self._commit(step)
            finally:
                self._driven, self.ledger.open = False, None
                self._handed_on.clear()

    @contextlib.contextmanager
    def undone_on_failure(self, step: Step) -> Iterator[None]:
        """Within it, a failure leaves the cache as it was; `step` has all new tokens, in however many steps they come."""
        saved = Savepoint(self.layers, self.ledger, step)
        try:
            yield
        except BaseException:
            saved.restore()
            raise

    def _begin(self, query_length: int) -> None:
        """A forward begins of a model that opens no step itself: what it writes can be undone."""
        self._settle()
        step = Step.of(None, self.ledger.batch_size, query_length)
        self._savepoint = Savepoint(self.layers, self.ledger, step)

    def _settle(self) -> None:
        """End the step of a model that does not say when it ends."""
        if self._driven:
            return
        try:
            opened = self.ledger.open
            if opened is None and self._handed_on:
                opened = OpenStep(Step(0))  # states were handed on, and nobody attended
            if opened is not None:
                self._check_complete(opened)
                self._commit(opened.step)
        except ValueError:
            self._undo()
            raise
        self._savepoint = self._ended = None
        self._handed_on.clear()

    def _undo(self) -> None:
        """Forget the step of a model that opens none itself."""
        if self._driven:
            return
        saved = self._savepoint or self._ended
        if saved is not None:
            saved.restore()
        self._drop_open_step()

    def finish_replay(self, step: Step) -> None:
        """Move the host on after a step of one token that a graph has stored."""
        self._commit(step, on_devices=False)

    @as_data
    def _commit(self, step: Step, on_devices: bool = True) -> None:
        self.ledger.commit(step, on_devices)
        if step.length == 1 and self.ledger.seq_length % max(_WATCHED_TOKENS, self.ledger.geometry.group_size) == 0:
            self.ledger.watch_marks()

    def _check_complete(self, opened: OpenStep) -> None:
        layers = [layer.layer_idx for layer in self.kivi_layers]
        missing = [index for index in layers if index not in opened.written]
        if missing:
            raise ValueError(
                f"the last forward gave no states to the layers {missing} of the cache, so none were stored: it was broken "
                f"off, or the model has fewer layers than the cache has ({len(self.layers)}), or does not pass what update() "
                "gave back to its attention function. Make the cache with the model's own config: model.create_kivi_cache() or "
                "KIVICache(model.config)."
            )

    def _wrote(self, layer: KIVICacheLayer, step: Step) -> None:
        """A layer has written `step`; the last one ends it where the model does not."""
        if self.ledger.open is None:
            self.ledger.open = OpenStep(step)
        written = self.ledger.open.written
        written.add(layer.layer_idx)
        all_known = self.config is not None or self.ledger.seq_length > 0  # else a layer may yet be made
        if not self._driven and all_known and len(written) == len(self.kivi_layers):
            saved = self._savepoint
            self._settle()
            self._ended = saved

    def open_step(self, layer: KIVICacheLayer, mask: torch.Tensor | None, batch: int, length: int) -> Step:
        """The step in which a layer gets `length` new columns: the one that is open, else a new one under `mask`."""
        if self.ledger.open is not None and not self._driven and layer.layer_idx in self.ledger.open.written:
            self._settle()
        if self.ledger.open is not None:
            return self.ledger.open.step
        step = self._step_of(mask, batch, length)
        if self._savepoint is None or self._savepoint.length != length:
            self._savepoint = Savepoint(self.layers, self.ledger, step)
        return step

    def new_step(self, attention_mask: torch.Tensor | None, batch: int, length: int) -> Step:
        """The step for `length` new columns under a mask `[B, stored + length]`, 1 for real tokens.

        The past of a mask on a GPU is not looked at in steps of one token, which would wait for the device.

        Raises:
            ValueError: for another batch than is stored, a mask of another shape, or one that changes tokens already
                stored.
        """
        self._settle()
        return self._step_of(attention_mask, batch, length)

    def _step_of(self, attention_mask: torch.Tensor | None, batch: int, length: int) -> Step:
        stored = self.ledger.seq_length
        if stored:
            self.ledger.check_batch(batch)
        if length > 1:
            self.ledger.raise_if_marked()  # the host waits here anyway
        if attention_mask is None:
            return Step.of(None, batch, length)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            what = (
                f"{attention_mask.dim()} dimensions"
                if isinstance(attention_mask, torch.Tensor)
                else (f"the type {type(attention_mask).__name__}")
            )
            raise ValueError(
                f"a KIVI cache takes a mask that is a tensor [batch, tokens]; got one of {what}. "
                "Custom masks need a full-precision cache (past_key_values=DynamicCache())."
            )
        if tuple(attention_mask.shape) != (batch, stored + length):
            raise ValueError(
                f"attention_mask must have the shape {(batch, stored + length)}: {stored} stored tokens and {length} new "
                f"ones; got {tuple(attention_mask.shape)}."
            )
        real = attention_mask.bool()
        if stored and (length > 1 or real.device.type == "cpu"):
            self._check_past(real[:, :stored])
        return Step.of(real[:, stored:], batch, length)

    def _check_past(self, past: torch.Tensor) -> None:
        known = self.ledger.is_real
        same = bool(past.all()) if known is None else torch.equal(past, known.to(past.device))
        if not same:
            raise ValueError(
                "attention_mask changes tokens that are stored already: its first "
                f"{past.shape[1]} columns must be as they were. Start with a new cache, or crop() this one."
            )

    def next_positions(self, step: Step, batch: int, device: torch.device) -> torch.Tensor:
        """Positions `[B, length]` of the new tokens: each sequence counts its own real tokens."""
        if not self.ledger.seq_length:
            start = torch.zeros(batch, 1, dtype=torch.long, device=device)
        elif device.type == "cpu":
            start = torch.tensor(self.ledger.lengths).unsqueeze(1)
        else:
            start = self.ledger.counts(device)[0].long().unsqueeze(1)
        if step.real is None:
            return start + torch.arange(step.length, device=device)
        return start + (step.real.to(device).cumsum(1) - 1).clamp_min(0)

    # transformers' contract

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens of one layer; return all its keys and values, dequantized, `[B, H, columns, D]`.

        For a model under "kivi" it stores nothing yet and returns the new states: its attention function, which knows the
        queries, attends over the codes and stores.
        """
        layer = self._layer(layer_idx)
        if not isinstance(layer, KIVICacheLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if self.attends_over_codes:
            key_states.kivi = Deferred(self, layer)
            self._handed_on.add(layer.layer_idx)
            return key_states, value_states
        step = self.open_step(layer, None, key_states.shape[0], key_states.shape[2])
        return self.store(key_states, value_states, layer, step)

    def received(self, layer: KIVICacheLayer) -> None:
        """The states of a layer that `update` handed on have come to an attention function that knows codes."""
        self._handed_on.discard(layer.layer_idx)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: KIVICacheLayer,
        scaling: float,
        step: Step,
    ) -> torch.Tensor:
        """`KIVICacheLayer.attend` for one layer."""
        with self._writing(layer):
            out = layer.attend(query, key, value, scaling, step)
        self._wrote(layer, step)
        return out

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: KIVICacheLayer,
        step: Step,
        query: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`KIVICacheLayer.update` for one layer, with the queries that help to choose what is stored finely."""
        with self._writing(layer):
            states = layer.update(key, value, step=step, query=query)
        self._wrote(layer, step)
        return states

    @contextlib.contextmanager
    def _writing(self, layer: KIVICacheLayer) -> Iterator[None]:
        """Within it an offloaded layer is on its device; whatever happens, it is on the CPU afterwards.

        A failure undoes the step of a model that opens none itself.
        """
        try:
            if self.offloading:
                layer.prefetch()
            yield
        except BaseException:
            self._undo()
            raise
        finally:
            if self.offloading:
                layer.offload()
                if layer.store is not None and layer.device.type == "cpu":
                    _warn_of_nothing_to_offload()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns `(stored + query_length, first)` that a mask of `query_length` new columns spans.

        Models ask at the beginning of a forward, so a step begins here where the model opens none.
        """
        if not self._driven:
            self._begin(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included (tokens)."""
        return super().get_seq_length(layer_idx)

    def reserve(self, tokens: int) -> None:
        """Expect sequences of `tokens` tokens: what is allocated or grows from now on has room for them."""
        check_count("tokens", tokens)
        self.ledger.expected = max(self.ledger.expected, tokens)

    @as_data
    def activate_past_recording(self) -> None:
        """Let the newest tokens be taken back as if they had never come, as drafts are (assisted decoding)."""
        super().activate_past_recording()
        self._settle()
        ledger = self.ledger
        if ledger.geometry.draft_room or ledger.geometry.at_once:
            return
        geometry = ledger.make_draft_room(DRAFT_ROOM)
        for layer in self.kivi_layers:
            if layer.store is not None:
                layer.store.enlarge_window(geometry)
        ledger.geometry = geometry
        ledger.moves += 1
        ledger.only_window()

    @as_data
    def reset(self) -> None:
        """Forget everything; with `max_length` the memory is kept."""
        self._drop_open_step()
        for layer in self.layers:
            if not isinstance(layer, KIVICacheLayer):
                layer.reset()
            elif layer.store is not None:
                if self.ledger.max_length is None:
                    layer.forget()
                else:
                    layer.store.keep([0] * layer.batch_size)
        self.ledger.clear([0] * self.ledger.batch_size if self.ledger.max_length is not None else [])

    def _drop_open_step(self) -> None:
        self.ledger.open = self._savepoint = self._ended = None
        self._handed_on.clear()

    @as_data
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns; a positive number is the older convention, columns to keep.

        Raises:
            ValueError: for what is not a whole number.
        """
        given = _whole_number("crop", tokens_to_remove)
        self._settle()
        columns = self.ledger.seq_length
        keep = min(given, columns) if given > 0 else max(0, columns + given)
        for layer in self.layers:
            if not isinstance(layer, KIVICacheLayer):
                layer.crop(keep - columns)
        if keep == columns:
            return
        lengths = self.ledger.lengths_within(keep)
        for layer in self.kivi_layers:
            if layer.store is not None:
                layer.store.keep(lengths)
        self.ledger.crop(keep)

    @as_data
    def _select(self, index: torch.Tensor) -> None:
        self._settle()
        index = index.cpu()
        if torch.equal(index, torch.arange(self.ledger.batch_size)):
            return
        for layer in self.kivi_layers:
            if layer.store is not None:
                layer.store.select(index)
        self.ledger.select(index)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence `i` becomes what `beam_idx[i]` was (beam search)."""
        for layer in self.layers:
            if not isinstance(layer, KIVICacheLayer):
                layer.reorder_cache(beam_idx)
        if self.ledger.batch_size:
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, side by side."""
        if self.ledger.batch_size:
            self.reorder_cache(torch.arange(self.ledger.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`: int64 numbers or a bool mask. An IndexError for one that is not there."""
        if self.ledger.batch_size:
            self.reorder_cache(torch.arange(self.ledger.batch_size)[torch.as_tensor(indices).cpu()])

    @property
    def batch_size(self) -> int:
        """Sequences stored, -1 before the first."""
        return self.ledger.batch_size or -1

    @as_data
    def __deepcopy__(self, memo: dict[int, Any]) -> KIVICache:
        self._settle()
        twin = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.config)] = self.config  # the model's, whose attention implementation may change
        memo[id(self.static)] = self.static  # never written to
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def get_cache_info(self) -> dict[str, Any]:
        """What is stored, counted from the tensors: tokens, bytes by part, bits an element as stored and nominal, and of static
        INT8 how many values saturated."""
        self._settle()
        self.ledger.raise_if_marked()
        return cache_report(self)

    def __repr__(self) -> str:
        opt = self.options
        if self.static is not None:
            return f"{type(self).__name__}(layers={len(self.layers)}, tokens={self.get_seq_length()}, static INT8)"
        return (
            f"{type(self).__name__}(layers={len(self.layers)}, tokens={self.get_seq_length()}, k_bits={opt.k_bits}, "
            f"v_bits={opt.v_bits}, group_size={opt.group_size}, residual_length={opt.residual_length}, "
            f"sink_length={opt.sink_length})"
        )


class StaticInt8Cache(KIVICache):
    """A KV cache of static INT8: `KIVICache(config, static=parameters)` under a name of its own.

    Args:
        config: of the model.
        static: parameters that calibration gave, or the path of their file.
        more: `max_length`, `offloading` and `backend` of `KIVICache`.

    Raises:
        ValueError: for parameters that cannot be read or are of another model.

    Example:
        >>> cache = StaticInt8Cache(model.config, "int8.safetensors")
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, config: PreTrainedConfig, static: StaticParameters | str | os.PathLike, **more: Any) -> None:
        super().__init__(config, static=static, **more)
        if self.static is None:
            raise ValueError(f"static must be calibrated parameters or the path of their file; got {static!r}.")


def _whole_number(what: str, value: Any) -> int:
    """A whole number given as an int, or as a tensor of one."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what}() takes a whole number of tokens; got {value!r}.") from None


@functools.cache
def _warn_of_nothing_to_offload() -> None:
    warnings.warn("offloading=True has no effect: the model computes on the CPU, where the cache is.", stacklevel=6)


def print_kivi_stats(cache: KIVICache) -> None:
    """Print `cache.get_cache_info()` as a table."""
    print(format_report(cache.get_cache_info()))
