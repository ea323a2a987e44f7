"""What a cache takes in a model whose layers partly are linear attention, by arithmetic from its config."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas
import torch
from transformers import LlamaConfig

from modules.cache.plan import planned_cache
from modules.options import KIVIOptions

# Qwen3.6-27B, by its model card (huggingface.co/Qwen/Qwen3.6-27B): 64 layers, one in four of full attention with 4 KV heads of 256;
# Gated DeltaNet with 48 heads of values and 16 of queries and keys, of 128 each. The kernel of 4 is Qwen3.5's default.
QWEN3_6_27B: dict[str, Any] = {
    "layer_types": [("linear_attention", "full_attention")[layer % 4 == 3] for layer in range(64)],
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_value_heads": 48,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "linear_key_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes of a cache by part.

    Attributes:
        packed: codes, scales and minima of full-attention layers.
        window: their newest tokens and sinks, in the model's dtype.
        recurrent: states of linear-attention layers, however many tokens there are.
        dense: keys and values of full-attention layers unquantized, with `recurrent`.
    """

    packed: float
    window: float
    recurrent: float
    dense: float

    @property
    def total(self) -> float:
        return self.packed + self.window + self.recurrent


def parts(config: Any, tokens: int, *, element_bytes: int = 2, state_bytes: int = 4, **options: Any) -> Parts:
    """Bytes of one sequence of `tokens` tokens over a Qwen3.5 or Qwen3-Next, by arithmetic, without room to grow.

    Args:
        config: the decoder's; fields as in transformers' `Qwen3_5TextConfig`.
        element_bytes: of the model's dtype, which convolutions' states have too.
        state_bytes: of an element of a recurrent state, which transformers keeps in float32.
        options: those of `KIVIOptions`.
    """
    full = config.layer_types.count("full_attention")
    attending = LlamaConfig(
        num_hidden_layers=full, num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim
    )
    dtype = {2: torch.float16, 4: torch.float32}[element_bytes]
    planned = planned_cache(attending, tokens, options=KIVIOptions(**options), dtype=dtype, reserve=True)
    size = planned.get_cache_info()["bytes"]
    packed = size["codes"] + size["metadata"] - size["slack"]
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    a_layer = values * config.linear_key_head_dim * state_bytes
    a_layer += (2 * keys + values) * config.linear_conv_kernel_dim * element_bytes
    recurrent = (len(config.layer_types) - full) * a_layer
    return Parts(packed, size["full_precision"], recurrent, size["dense"] + recurrent)


@torch.no_grad()
def counted(model: Any, tokens: int) -> Parts:
    """Bytes of a cache that holds `tokens` tokens, counted from its tensors; `model` has a KIVI cache."""
    cache = model.create_kivi_cache(max_length=tokens)
    model(input_ids=torch.arange(tokens).remainder(100).unsqueeze(0), past_key_values=cache)
    size = cache.get_cache_info()["bytes"]
    packed = size["codes"] + size["metadata"] - size["slack"]
    return Parts(packed, size["full_precision"], size["recurrent"], size["dense"])


def table(rows: dict[str, Parts]) -> pandas.DataFrame:
    """A row each, in MB."""
    return pandas.DataFrame(
        [
            {"": name}
            | {part: f"{getattr(row, part) / 1e6:,.2f}" for part in ("packed", "window", "recurrent", "total", "dense")}
            | {"of dense": f"{row.total / row.dense:.1%}"}
            for name, row in rows.items()
        ]
    )
