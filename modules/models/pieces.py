"""What a forward gets for each token, cut into pieces of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from modules.store.step import Step

_MASK, _EMBEDS = "visual_pos_masks", "deepstack_visual_embeds"  # of Qwen3-VL: features added to hidden states of images


@dataclasses.dataclass
class TokenInputs:
    """Arguments of a forward: those that have an entry a token, batch and tokens first, and the others.

    Attributes:
        tokens: `[B, T, …]` each.
        planes: names among them of what came as `[planes, B, T]`, such as positions of time, height and width.
        embeds: features `[visual tokens, hidden_size]` a layer, which `tokens["visual_index"]` numbers.
        others: what is the same for every piece.
    """

    tokens: dict[str, torch.Tensor]
    planes: frozenset[str]
    embeds: list[torch.Tensor] | None
    others: dict[str, Any]

    @classmethod
    def of(cls, inputs: dict[str, Any], length: int) -> TokenInputs:
        """Sort the arguments of a forward over `length` columns."""
        inputs = dict(inputs)
        batch = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[0]
        embeds = inputs.pop(_EMBEDS, None)
        tokens, planes = {}, set()
        positions = inputs.get("position_ids")
        if positions is not None and positions.dim() == 3:
            tokens["position_ids"] = inputs.pop("position_ids").expand(-1, batch, -1).movedim(0, -1)
            planes.add("position_ids")
        for name, value in list(inputs.items()):
            if isinstance(value, torch.Tensor) and tuple(value.shape[:2]) == (batch, length):
                tokens[name] = inputs.pop(name)
        if embeds is not None:
            tokens["visual_index"] = (tokens[_MASK].flatten().cumsum(0) - 1).view(batch, length)
        return cls(tokens, frozenset(planes), embeds, inputs)

    def real_first(self, step: Step) -> TokenInputs:
        """The same with the real tokens of each sequence in front."""
        moved = {name: step.real_first(value, dim=1) for name, value in self.tokens.items()}
        return dataclasses.replace(self, tokens=moved)

    def piece(self, columns: slice) -> dict[str, Any]:
        """The arguments for some of the columns."""
        part: dict[str, Any] = {name: value[:, columns] for name, value in self.tokens.items()}
        if self.embeds is not None:
            index = part.pop("visual_index")[part[_MASK]]
            part[_EMBEDS] = [features[index] for features in self.embeds]
        return part | {name: part[name].movedim(-1, 0) for name in self.planes} | self.others
