"""What a backend is: attention over a packed layer, and storing new tokens in it.

The defaults are plain torch on any device; a backend overrides what it has kernels for.
"""

from __future__ import annotations

import abc

import torch

from modules.codecs.full_precision import FULL_PRECISION
from modules.codecs.kivi import EIGHT_BIT_METADATA, GROUPED
from modules.codecs.static_codec import STATIC
from modules.kernels.append import append_sequences
from modules.store.layer import PackedLayer
from modules.store.side import PackedSide
from modules.store.step import Step


class Backend(abc.ABC):
    """Attends over packed layers and stores tokens in them.

    None of its calls moves the ledger on: what they write lies behind its lengths until the step is committed.

    Attributes:
        name: as the option `backend` has it.
        layouts: of codecs whose bytes it can read.
    """

    name: str
    layouts: frozenset[str] = frozenset((GROUPED, EIGHT_BIT_METADATA, FULL_PRECISION, STATIC))

    def __deepcopy__(self, memo: dict) -> Backend:
        return self

    @abc.abstractmethod
    def why_not(self, layer: PackedLayer) -> str | None:
        """What keeps it from attending over `layer`, as the end of a sentence; None where nothing does."""

    @abc.abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: PackedLayer,
        scaling: float,
        step: Step,
    ) -> torch.Tensor:
        """Attend with new tokens over what `layer` stores and, causally, over the new tokens themselves.

        Args:
            query: `[B, num_attention_heads, q, D]`, rotated by position, as `layer.fold` gives it.
            key, value: states of the new tokens, `[B, num_key_value_heads, q, D]`, not yet in `layer`, as they are stored
                there, that is `layer.enter(key, value)`.
            layer: the stored past, `layer.lengths[b]` tokens of sequence `b`.
            scaling: factor on the scores.
            step: which of the new tokens are real; those come first in every sequence.

        Returns:
            `[B, q, num_attention_heads, D]` in the dtype of `query`, for `layer.leave`; zeros where a token is not real.
        """

    def pack(self, side: PackedSide, sequences: slice, start: int, states: torch.Tensor) -> None:
        """Store whole groups `[b, H, T, D]` as packed tokens `start…` of `sequences`; channels have their order."""
        side.write(sequences, start, side.codec.encode(states, None if side.order is None else side.order[sequences]))

    def append(self, layer: PackedLayer, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Store new tokens `[B, H, q, D]`, real ones first and as `layer.enter` gives them, and pack the groups they fill.

        The caller has checked states and shapes and made room.
        """
        for sequences, count in list(layer.ledger.equally_long(step.lengths)):
            append_sequences(self, layer, sequences, key[sequences, :, :count], value[sequences, :, :count])

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: PackedLayer, scaling: float
    ) -> torch.Tensor | None:
        """One real token of every sequence: checked, observed, attended and stored by one call, sinks and groups to pack
        included; None, with nothing done, where there is no such call for this layer. States and results are as the model has
        them.

        It calls `layer.observe` and `layer.make_room` itself: the wide channels of a sequence that packs for the first time
        are chosen with the queries of this step counted, as after `attend`.

        Raises:
            ValueError: for states that do not fit the layer, and for NaN, infinite or too large ones; nothing is stored
                then.
        """
        return None
