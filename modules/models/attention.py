"""KIVI as an attention implementation of transformers: "kivi", whose dense parts run through SDPA, and two beside it.

"kivi_flash_attention_2" has its dense parts run through flash; "kivi_eager" attends over dequantized states, and gives weights.

Every decoder of transformers calls `past_key_values.update(key, value, layer_idx)` and then the attention function that is
registered under its config's implementation. A `KIVICache` stores nothing in `update` but leaves on the keys where it is to
be found (`modules.cache.cache.Deferred`); the function here attends over the codes and stores, in one call. Without that
mark (no cache, another cache, a sliding layer) it is the dense function of transformers.

The mask function hands on the padding mask `[batch, tokens]` itself where a mask `[batch, 1, q, kv]` is not needed at once: attention over
codes goes by the padding alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from modules.cache.cache import OVER_CODES, Deferred
from modules.models.operator import attend

ROUTES = {  # implementation of a dense model: of the same model over a KIVI cache
    "sdpa": OVER_CODES,
    "flash_attention_2": f"{OVER_CODES}_flash_attention_2",
    "eager": f"{OVER_CODES}_eager",
}
IN_PROGRAM = "kivi_in_program"  # argument of a forward that is compiled, see `modules.models.program`
_PADDING = "kivi_padding"  # attribute of a mask [B, 1, q, kv] that holds the padding mask it was made from

# What decoders pass on that has no bearing on attention itself, or is in the mask or the positions by then.
_WITHOUT_EFFECT = frozenset(
    (
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "num_logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
_DENSE_ONLY = frozenset(("sliding_window", "is_causal"))  # known to the dense functions
# All that an attention function here may be called with by name.
ARGUMENTS = _WITHOUT_EFFECT | _DENSE_ONLY | {"query", "key", "value", "attention_mask", "dropout", "scaling"}


def check_arguments(module: nn.Module, extra: dict[str, Any], allowed: frozenset[str]) -> None:
    """Raise `ValueError` for an argument that changes attention in a way that is not known here."""
    for name, value in extra.items():
        if name not in allowed and value is not None and value is not False:
            raise ValueError(
                f"{type(module).__name__} passes {name}={_shown(value)} to its attention, which the implementation "
                f"{OVER_CODES!r} does not know; use attn_implementation='sdpa' or 'eager', with which a KIVI cache gives "
                "dequantized states."
            )


def _shown(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _forward_through(dense_name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The attention function whose dense parts run through transformers' function of that name."""

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `query` `[B, num_attention_heads, q, D]`: `[B, q, num_attention_heads, D]` and no weights."""
        if kwargs.pop(IN_PROGRAM, False):
            return _in_program(module, query, key, value, scaling, kwargs), None
        return eager(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

    @torch.compiler.disable
    def eager(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dense = ALL_ATTENTION_FUNCTIONS.get_interface(dense_name, eager_attention_forward)
        deferred: Deferred | None = getattr(key, "kivi", None)
        if deferred is not None:
            deferred.cache.received(deferred.layer)
        check_arguments(module, kwargs, _WITHOUT_EFFECT | _DENSE_ONLY)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if deferred is None:
            mask = _dense_mask(dense_name, attention_mask, query.shape[2], key)
            return dense(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        cache, layer = deferred
        _check_for_codes(module, kwargs)
        step = cache.open_step(layer, _padding_of(attention_mask), query.shape[0], query.shape[2])
        rebuilt = dense_name == "eager" or kwargs.get("sliding_window") is not None  # neither knows codes
        if layer.get_seq_length() and not rebuilt:
            _refuse_custom_mask(attention_mask)
            _warn_of_gradients(query)
            return cache.attend(query, key, value, layer, scaling, step), None
        keys, values = cache.store(key, value, layer, step, query)
        return dense(module, query, keys, values, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    return forward


def _in_program(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attention of one new token a sequence in a program that is compiled: over what the running step's cache holds."""
    check_arguments(module, kwargs, _WITHOUT_EFFECT | {"is_causal"})
    _check_for_codes(module, kwargs)
    return attend(query, key, value, module.layer_idx, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _check_for_codes(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal; a KIVI cache is for decoders.")


def _is_padding(mask: torch.Tensor | None) -> bool:
    return mask is not None and mask.dim() == 2


def _padding_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The padding mask `[batch, tokens]` that a mask is or was made from, the mask itself where that is not known."""
    return getattr(mask, _PADDING, mask)


def _refuse_custom_mask(mask: torch.Tensor | None) -> None:
    if mask is not None and not _is_padding(mask):
        raise ValueError(
            f"attention over codes takes a mask of shape [batch, tokens]; got one of {mask.dim()} dimensions. "
            "Custom masks need a full-precision cache (past_key_values=DynamicCache())."
        )


def _warn_of_gradients(query: torch.Tensor) -> None:
    if query.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            "attention over stored tokens passes no gradients on: wrap inference in torch.no_grad(). To train, pass an "
            "empty KIVI cache or a DynamicCache, and no prefill_chunk.",
            stacklevel=3,
        )


def _dense_mask(dense_name: str, mask: torch.Tensor | None, length: int, key: torch.Tensor) -> torch.Tensor | None:
    """The mask for dense attention over a past that is not packed: what the mask function put off, made now."""
    columns = key.shape[2]
    if (mask is not None and not _is_padding(mask)) or (mask is None and (length == 1 or length == columns)):
        return mask
    if dense_name != "sdpa":
        return mask
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=key.shape[0],
        q_length=length,
        kv_length=columns,
        q_offset=columns - length,
        attention_mask=None if mask is None else mask.bool(),
        device=key.device,
    )


def _mask_through(dense_name: str) -> Callable[..., torch.Tensor | None]:
    """The mask function for `_forward_through(dense_name)`."""

    def mask(
        *args: Any,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        mask_function: Callable = causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """The padding mask where there is a past and attention is plainly causal, else the dense mask with the padding on it."""
        plain = mask_function is causal_mask_function and kwargs.get("local_size") is None and dense_name != "eager"
        if plain and isinstance(q_offset, int) and q_offset and kv_length == q_offset + q_length:
            return attention_mask
        dense = ALL_MASK_ATTENTION_FUNCTIONS[dense_name](
            *args,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        if dense is not None:
            setattr(dense, _PADDING, attention_mask)
        return dense

    return mask


for _dense, _name in ROUTES.items():
    AttentionInterface.register(_name, _forward_through(_dense))
    AttentionMaskInterface.register(_name, _mask_through(_dense))
