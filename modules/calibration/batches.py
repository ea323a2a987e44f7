"""Batches of tokens as single sequences without padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

FIELDS = ("input_ids", "attention_mask")
IGNORED = ("token_type_ids", "special_tokens_mask", "overflow_to_sample_mapping", "length")  # some tokenizers add them


def sequences(batch: Any, name: str) -> Iterator[torch.Tensor]:
    """The sequences of a batch, int64 `[1, tokens]` each, without the columns that its mask hides.

    A sequence alone has the positions and the arithmetic that it has in no batch of another size or padding: what is observed
    does not depend on how texts are put together.

    Args:
        batch: ids `[batch, tokens]`, or a mapping such as a tokenizer gives, with input_ids and attention_mask.
        name: of the batch, for errors.

    Raises:
        ValueError: for anything else, and where the batch has no token.
    """
    ids, mask = _fields_of(batch, name)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name} must be ids [batch, tokens] of whole numbers, or a mapping with input_ids; got {_shown(ids)}. "
            'Tokenize texts with return_tensors="pt".'
        )
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        raise ValueError(
            f"the attention_mask of {name} must have the shape of its ids {tuple(ids.shape)}; got {_shown(mask)}."
        )
    real = mask.to(ids.device).bool()
    if not bool(real.any()):
        raise ValueError(
            f"{name} has no token: its ids are {tuple(ids.shape)}{' and all are padding' if ids.numel() else ''}."
        )
    for row, kept in zip(ids, real):
        if bool(kept.any()):
            yield row[kept].unsqueeze(0)


def _fields_of(batch: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(batch, Mapping):
        return batch, None
    unknown = sorted(set(map(str, batch)) - {*FIELDS, *IGNORED})
    if "input_ids" not in batch or unknown:
        raise ValueError(
            f"{name} must be a mapping with input_ids and, where it is padded, attention_mask; got the keys "
            f"{', '.join(map(str, batch)) or 'of an empty one'}."
        )
    return batch["input_ids"], batch.get("attention_mask")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
