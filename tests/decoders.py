"""Small random decoders of transformers, by model type."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
# What each model type needs beside the sizes.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"hidden_size": 192},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS | _LINEAR,
    "qwen3_5_text": _LINEAR,
    "mistral": {"sliding_window": None},
    "phi3": {"hidden_size": 192},
    "granite": {"hidden_size": 192},
    "olmo2": {"hidden_size": 192},
    "smollm3": {"hidden_size": 192},
    "gemma3_text": {
        "query_pre_attn_scalar": 32,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}
HYBRIDS = ("qwen3_next", "qwen3_5_text")  # their linear-attention layers cannot be cropped


def decoder(model_type: str, **changes: Any) -> PreTrainedModel:
    """A stock model of random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **DECODERS.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() > 1:
                parameter.mul_(2)  # so that attention is not uniform
    return model
