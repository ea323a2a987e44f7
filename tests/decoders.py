"""Small random decoders of transformers, by model type."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

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


_MORE = {"qwen2_moe": _EXPERTS | {"hidden_size": 192}, "qwen3_5_moe_text": _EXPERTS | _LINEAR}  # much as those above
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TOKENS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}


def _planes(*section: int) -> dict[str, Any]:
    """Positions in time, height and width, with so many frequencies each."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}}


# Models that take images: what the decoder and what the side of images needs.
WITH_IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({"hidden_size": 192} | _planes(4, 6, 6), {"embed_dim": 32, "hidden_size": 192, "mlp_ratio": 1}),
    "qwen2_5_vl": (
        {"hidden_size": 192} | _planes(4, 6, 6),
        {"out_hidden_size": 192, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        _planes(6, 5, 5),
        {"out_hidden_size": 96, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_5": (_LINEAR | _planes(2, 1, 1), {"out_hidden_size": 96, "num_position_embeddings": 16}),
    "qwen3_5_moe": (_EXPERTS | _LINEAR | _planes(2, 1, 1), {"out_hidden_size": 96, "num_position_embeddings": 16}),
}


def prompt(model_type: str, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt `[1, length]`, for a model that takes images with two of them in it, as its processor would give it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 110, (1, length), generator=generator)
    if model_type not in WITH_IMAGES:
        return {"input_ids": ids}
    grids, place = torch.tensor([[1, 4, 8], [1, 4, 4]]), 5
    for grid in grids:
        merged = int(grid.prod()) // 4
        ids[0, place], ids[0, place + 1 + merged] = 122, 123
        ids[0, place + 1 : place + 1 + merged] = 120
        place += merged + 15
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == 120).int(),
    }


def decoder(model_type: str, **changes: Any) -> PreTrainedModel:
    """A stock model of random weights; `changes` are of the decoder's config."""
    torch.manual_seed(0)
    if model_type in WITH_IMAGES:
        text, vision = WITH_IMAGES[model_type]
        config = AutoConfig.for_model(
            model_type, text_config=_SIZES | text | changes, vision_config=_VISION | vision, **_TOKENS
        )
        model = AutoModelForImageTextToText.from_config(config).eval()
    else:
        config = AutoConfig.for_model(model_type, **{**_SIZES, **(DECODERS | _MORE).get(model_type, {}), **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() > 1:
                parameter.mul_(2)  # so that attention is not uniform
    return model
