"""A forward cut into pieces of tokens: how long they are, and what each gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig

from modules.options import AUTO, head_dims_of
from modules.store.step import Step

WHOLE = 8192  # new tokens that go through a model at once, unless the user says otherwise; more go in pieces
_UNIT = 512  # pieces are multiples of it, and not shorter: those take longer and remember less in full precision
_CONTEXT = 32768  # tokens whose dense cache temporaries are weighed against
_SHARE = 12  # a twelfth of it is what the estimate may take; what is not estimated takes as much again
_MASK, _EMBEDS = "visual_pos_masks", "deepstack_visual_embeds"  # of Qwen3-VL: features added to hidden states of images


def longest_piece(config: PreTrainedConfig, length: int) -> int | None:
    """Tokens that go through a cache at once, of a forward of `length`, as `prefill_chunk` has it; None for all of them."""
    chunk = config.prefill_chunk
    if chunk != AUTO:
        return chunk
    return None if length <= WHOLE else piece_of(config)


def piece_of(config: PreTrainedConfig) -> int:
    """Tokens of a piece of a long forward: so many that what a layer works in takes little beside the cache.

    What a layer works in is counted in numbers a token, at its widest: in its MLP the state that goes around, its norm and
    three intermediate ones; in attention both states, and queries and what they attended, three times each. At most a twelfth
    of the keys and values of 32,768 tokens is taken; the piece is a multiple of 512, up to `WHOLE` tokens.
    """
    head_dim, hidden = max(head_dims_of(config)), config.hidden_size
    heads = _most(config, "num_attention_heads", 1)
    kv_heads = _most(config, "num_key_value_heads", heads)
    attention, mlp = 2 * hidden + 6 * heads * head_dim, 2 * hidden + 3 * _intermediate(config)
    cached = 2 * _full_layers(config) * kv_heads * head_dim
    most = _CONTEXT * cached // (_SHARE * max(attention, mlp))
    return max(_UNIT, min(WHOLE, most // _UNIT * _UNIT))


def _intermediate(config: PreTrainedConfig) -> int:
    """Channels of the MLP that a token goes through, of all its experts where there are several."""
    dense = _most(config, "intermediate_size", 4 * config.hidden_size)
    return max(dense, _most(config, "num_experts_per_tok", 0) * _most(config, "moe_intermediate_size", dense))


def _full_layers(config: PreTrainedConfig) -> int:
    """Layers that attend to all tokens, whose cache grows with them."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return max(1, kinds.count("full_attention"))


def _most(config: PreTrainedConfig, name: str, default: int) -> int:
    """A size by its name in a config, the largest where layers differ; `default` where there is none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # what transformers raises for a field that differs between layers
        value = [getattr(config.per_layer_config[layer], name, None) for layer in range(config.num_hidden_layers)]
    sizes = value if isinstance(value, (list, tuple)) else [value]
    return max([size for size in sizes if size], default=default)


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
