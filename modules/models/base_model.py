"""The base model of a KIVI model: a forward is a step of its cache."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from modules.cache.cache import KIVICache
from modules.models.config import over_codes
from modules.models.pieces import TokenInputs, longest_piece
from modules.options import AUTO
from modules.store.step import Step

_WHOLE_ONLY = ("output_attentions", "output_router_logits")  # asked for, that a forward in pieces does not give


class StepMixin:
    """A decoder that runs a step through a `KIVICache`: masks, positions, chunks; stock with any other cache."""

    _takes_positions: bool  # else it has biases by distance in their place

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._takes_positions = "position_ids" in inspect.signature(cls.forward).parameters

    @property
    def _all_full(self) -> bool:
        """Whether every layer attends to all tokens. Others run as in the stock model, by columns, padding included."""
        return set(getattr(self.config, "layer_types", None) or ()) <= {"full_attention"}

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        kivi_step: Step | None = None,
        kivi_drafts: int = 0,
        kivi_kept: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the stock model's. `kivi_step` says which new tokens are real where the caller has found out already,
        `kivi_drafts` how many of them, at the end, may be taken back, and `kivi_kept` how many of the last states are all that
        is asked for; 0 stands for all of them."""
        cache = past_key_values
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        inputs = {name: value for name, value in given.items() if value is not None}
        if not isinstance(cache, KIVICache) or len(inputs.keys() - {"position_ids"}) != 1:
            return super().forward(
                **inputs, attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache, **kwargs
            )
        tokens = inputs["input_ids"] if inputs_embeds is None else inputs_embeds
        if tokens.dim() != (2 if inputs_embeds is None else 3):
            raise ValueError(
                f"a KIVI cache takes input_ids [batch, tokens] or inputs_embeds [batch, tokens, hidden_size]; got the shape "
                f"{tuple(tokens.shape)}."
            )
        batch, length = tokens.shape[:2]
        cache.ran(self)
        step = kivi_step or cache.new_step(attention_mask, batch, length)
        if position_ids is None and self._takes_positions:
            position_ids = cache.next_positions(step, batch, tokens.device)
        if position_ids is not None:
            inputs["position_ids"] = position_ids.expand(batch, -1) if position_ids.dim() == 2 else position_ids
        pieces = cache.ledger.pieces(length, self._longest_piece(length, kwargs), kivi_drafts)
        if len(pieces) > 1:
            with cache.undone_on_failure(step), cache.ledger.in_pieces(step):
                return self._forward_in_pieces(
                    inputs, attention_mask, cache, step, pieces, kivi_kept, use_cache=use_cache, **kwargs
                )
        with over_codes(self.config) as routed, cache.step(step, over_codes=routed):
            return super().forward(
                **inputs, attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache, **kwargs
            )

    def _longest_piece(self, length: int, kwargs: dict[str, Any]) -> int | None:
        """Tokens that go through the cache at once, of `length`; None for all of them.

        A forward that only runs whole, as it is to give gradients or what pieces do not give, is cut where the user says so and not
        by itself.
        """
        piece = longest_piece(self.config, length)
        if piece is None or self.config.prefill_chunk != AUTO:
            return piece
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        return None if learns or self._asked_beyond_pieces(kwargs) else piece

    def _asked_beyond_pieces(self, kwargs: dict[str, Any]) -> str | None:
        """What is asked for that a forward in pieces does not give."""
        asked = (name for name in _WHOLE_ONLY if kwargs.get(name, getattr(self.config, name, False)))
        return next(asked, None)

    def _forward_in_pieces(
        self,
        inputs: dict[str, Any],
        attention_mask: torch.Tensor | None,
        cache: KIVICache,
        step: Step,
        pieces: list[int],
        kept: int,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """A long forward in pieces of so many tokens, so that later tokens see a packed past.

        They are of real tokens: each sequence of a padded batch is cut where it would be cut alone.
        """
        return_dict = kwargs.pop("return_dict", None)
        if asked := self._asked_beyond_pieces(kwargs):
            raise ValueError(
                f"a forward in pieces of {pieces[0]} tokens gives neither attention weights nor router logits; got "
                f"{asked}=True. Set prefill_chunk=None for it."
            )
        aligned = self._all_full
        stored = cache.get_seq_length()
        real = step.real
        if real is None and attention_mask is not None and not attention_mask[:, :stored].all():
            real = torch.ones_like(attention_mask[:, stored:], dtype=torch.bool)  # the past has padding
        parts = TokenInputs.of(inputs | kwargs, step.length)
        if aligned and real is not None:
            parts, real = parts.real_first(step), step.real_first(real, dim=1)
        outputs: list[BaseModelOutputWithPast] = []
        in_order = step.order is None or not aligned
        for stop, size in zip(itertools.accumulate(pieces), pieces):
            mask = None
            if real is not None:
                past = real.new_ones(len(real), stored) if attention_mask is None else attention_mask[:, :stored].bool()
                mask = torch.cat([past.to(real.device), real[:, :stop]], dim=1)
            part = parts.piece(slice(stop - size, stop))
            outputs.append(self.forward(**part, attention_mask=mask, past_key_values=cache, return_dict=True))
            if kept and in_order:
                outputs = _without_early_states(outputs, kept)
        if aligned and step.order is not None:
            cache.ledger.set_columns(stored, step)
        joined = _join_outputs(outputs, step if aligned else None)
        return joined.to_tuple() if return_dict is False else joined


class KIVIModelMixin(StepMixin):
    """The base model of a family: the stock constructor builds it; its layers then become those of the family."""

    kivi_classes: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.become_kivi()

    def become_kivi(self) -> None:
        """Give the layers the classes of the family."""
        classes = self.kivi_classes
        flash = self.config._attn_implementation == "flash_attention_2"
        for layer in self.layers:
            layer.__class__ = classes.decoder_layer
            if hasattr(layer, "self_attn"):  # else it is a linear-attention layer
                layer.self_attn.__class__ = classes.flash_attention if flash else classes.sdpa_attention


def _without_early_states(outputs: list[BaseModelOutputWithPast], kept: int) -> list[BaseModelOutputWithPast]:
    """The outputs of the pieces so far with their `kept` newest states, or somewhat more, and no others."""
    newest = outputs[-1].last_hidden_state
    if newest.shape[1] < kept:
        return outputs
    states = newest[:, -kept:].clone()  # a view would keep them all
    nothing = [dataclasses.replace(out, last_hidden_state=states[:, :0]) for out in outputs[:-1]]
    return [*nothing, dataclasses.replace(outputs[-1], last_hidden_state=states)]


def _join_outputs(outputs: list[BaseModelOutputWithPast], step: Step | None) -> BaseModelOutputWithPast:
    def join(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        joined = torch.cat(parts, dim=1)
        return joined if step is None else step.as_given(joined)

    states = [out.hidden_states for out in outputs]
    return dataclasses.replace(  # of the class that the family returns
        outputs[-1],
        last_hidden_state=join(tuple(out.last_hidden_state for out in outputs)),
        hidden_states=None if states[0] is None else tuple(join(parts) for parts in zip(*states)),
    )
