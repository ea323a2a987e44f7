"""Shapes of well-known models by name, so that a cache can be sized without the model or a network.

The values are those of the `config.json` that each model is published with; those that all models of a type share or that
change no size are left to transformers' defaults.
"""

from __future__ import annotations

from typing import Any

_LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
_LLAMA31 = _LLAMA3 | {"max_position_embeddings": 131072}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_QWEN25 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768}
_QWEN25_SMALL = _QWEN25 | {"vocab_size": 151936, "tie_word_embeddings": True}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "sliding_window": None,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return sizes if kv_heads is None else sizes | {"num_key_value_heads": kv_heads}


PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA2 | _sizes(4096, 11008, 32, 32, 32),
    "llama-2-13b": _LLAMA2 | _sizes(5120, 13824, 40, 40, 40),
    "llama-2-70b": _LLAMA2 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32),
    "llama-3-70b": _LLAMA3 | _sizes(8192, 28672, 80, 64),
    "llama-3.1-8b": _LLAMA31 | _sizes(4096, 14336, 32, 32),
    "llama-3.1-70b": _LLAMA31 | _sizes(8192, 28672, 80, 64),
    "llama-3.2-1b": _LLAMA31 | _sizes(2048, 8192, 16, 32) | {"head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA31 | _sizes(3072, 8192, 28, 24) | {"head_dim": 128, "tie_word_embeddings": True},
    "mistral-7b-v0.3": _MISTRAL | _sizes(4096, 14336, 32, 32),
    "qwen2.5-0.5b": _QWEN25_SMALL | _sizes(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _QWEN25_SMALL | _sizes(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _QWEN25_SMALL | _sizes(2048, 11008, 36, 16, 2),
    "qwen2.5-7b": _QWEN25 | _sizes(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _QWEN25 | _sizes(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _QWEN25 | _sizes(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _QWEN25 | _sizes(8192, 29568, 80, 64, 8),
    "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    "qwen3-4b": _QWEN3 | _sizes(2560, 9728, 36, 32) | {"tie_word_embeddings": True},
    "qwen3-8b": _QWEN3 | _sizes(4096, 12288, 36, 32),
    "qwen3-14b": _QWEN3 | _sizes(5120, 17408, 40, 40),
    "qwen3-32b": _QWEN3 | _sizes(5120, 25600, 64, 64),
    "smollm2-135m": _SMOLLM2 | _sizes(576, 1536, 30, 9, 3),
    "smollm2-360m": _SMOLLM2 | _sizes(960, 2560, 32, 15, 5),
    "smollm2-1.7b": _SMOLLM2 | _sizes(2048, 8192, 24, 32, 32),
}
