"""A decode step as one compiled program: `torch.compile` takes all of the model, in which attention over the cache is one operator.

The operator finds the cache and the step in the context it runs in, so that one program serves every cache, however long.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers.cache_utils import Cache

from modules.cache.cache import OVER_CODES, KIVICache
from modules.cache.layer import KIVICacheLayer
from modules.cache.modes import as_data, autocasting
from modules.models.attention import IN_PROGRAM, ROUTES
from modules.models.config import over_codes
from modules.models.operator import running
from modules.models.rows import FewRows
from modules.store.step import Step

_MOST_PROGRAMS = 8  # batch sizes that are compiled for; more run eagerly


class DecodeProgram:
    """Runs steps of one token a sequence of one model on the CPU, compiled once for each batch size.

    Not covered, and then for the model to run, with the same result: what `why_not` names, the first step of a cache, and
    several new tokens at once. Whatever the compiler refuses runs eagerly from then on, after one warning.

    Attributes:
        refused: why the compiler refused the model, None where it did not.
    """

    def __init__(self) -> None:
        self._programs: dict[int, Callable[..., torch.Tensor]] = {}
        self._said: set[str] = set()
        self.refused: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeProgram:
        return DecodeProgram()

    def __reduce__(self) -> tuple[type[DecodeProgram], tuple[()]]:
        return DecodeProgram, ()

    def why_not(self, model: Any, cache: KIVICache, batch: int) -> str | None:
        """What keeps a step of `batch` sequences over `cache` from being compiled; None where nothing does."""
        if model.training:
            return "the model is in training mode; call model.eval()"
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            return "gradients are on; wrap the loop in torch.no_grad()"
        if autocasting():
            return "autocast is on; load the model in the dtype that it is to run in"
        attention = model.get_decoder().config._attn_implementation
        if ROUTES.get(attention, attention) != OVER_CODES:
            return f"attn_implementation={attention!r} is not compiled; load the model with 'sdpa'"
        if not all(isinstance(layer, KIVICacheLayer) and layer.store is not None for layer in cache.layers):
            return "some layers of its cache are not packed"
        if batch not in self._programs and len(self._programs) == _MOST_PROGRAMS:
            return f"it was compiled for {_MOST_PROGRAMS} other batch sizes already"
        return None

    def can_run(self, model: Any, cache: KIVICache, batch: int) -> bool:
        """Whether a step may go through `step`; what keeps it from that is said once."""
        if self.refused is not None:
            return False
        why = self.why_not(model, cache, batch)
        if why is not None:
            self._warn(why)
        return why is None

    @as_data
    def step(
        self,
        model: Any,
        cache: KIVICache,
        input_ids: torch.Tensor,
        step: Step,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Logits `[B, 1, vocabulary]` after storing the tokens `input_ids`, int64 `[B, 1]`; None, with nothing stored, where the
        compiler refuses the model. Gives no gradients.

        Args:
            position_ids: int64 `[B or 1, 1]`; None: as many as each sequence has tokens.

        Raises:
            ValueError: as `KIVICacheLayer.attend`, and where the cache is full; nothing is stored then.
        """
        batch, decoder = input_ids.shape[0], model.get_decoder()
        if position_ids is None:
            position_ids = cache.next_positions(step, batch, input_ids.device)
        # copies: in inference mode what is given is of another kind of tensor, for which all would be compiled again
        ids, positions = input_ids.clone(), position_ids.expand(batch, -1).clone()
        cache.ran(decoder)
        try:
            with over_codes(decoder.config), cache.step(step, over_codes=True), running(cache, step):
                return self._program(batch)(model, ids, positions)
        except _REFUSALS as error:
            self.refused = f"the compiler gave up ({' '.join(str(error).split())[:200]})"
            self._warn(self.refused)
            return None

    def _program(self, batch: int) -> Callable[..., torch.Tensor]:
        if batch not in self._programs:
            # code of its own: the compiler counts what it compiled by code, and gives up after some
            own = types.FunctionType(_logits.__code__.replace(co_name=f"decode_{batch}"), globals())
            self._programs[batch] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._programs[batch]

    def _warn(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"decoding stays eager in spite of compile_decode: {why}.", stacklevel=6)


_REFUSALS = (TorchDynamoException, FailOnRecompileLimitHit)


class _Past(Cache):
    """Stands for a KIVI cache that holds tokens while a step is compiled: nothing of it changes from token to token."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return 1 + query_length, 0


_PAST = _Past()


def _logits(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """What is compiled: the model's own forward."""
    with FewRows():
        out = model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=_PAST, use_cache=True, **{IN_PROGRAM: True}
        )
    return out.logits


__all__ = ["DecodeProgram"]
