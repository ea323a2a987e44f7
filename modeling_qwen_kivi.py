"""Qwen2, Qwen2.5, Qwen2.5-Coder and Qwen3 with a packed KIVI cache.

model, tokenizer = load_qwen_kivi("Qwen/Qwen2.5-7B-Instruct", k_bits=2, v_bits=2)
outputs = model.generate(**inputs, past_key_values=model.create_kivi_cache(), max_new_tokens=100)
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from modules.kivi_cache_general import KIVICache, print_kivi_stats
from modules.models.families import classes_of, load_family

_QWEN2 = classes_of("qwen2")
Qwen2KIVIConfig = _QWEN2.config
Qwen2KIVISdpaAttention = _QWEN2.sdpa_attention
Qwen2KIVIFlashAttention2 = _QWEN2.flash_attention
Qwen2KIVIDecoderLayer = _QWEN2.decoder_layer
Qwen2KIVIModel = _QWEN2.model
Qwen2ForCausalLM_KIVI = _QWEN2.causal_lm

_QWEN3 = classes_of("qwen3")
Qwen3KIVIConfig = _QWEN3.config
Qwen3KIVISdpaAttention = _QWEN3.sdpa_attention
Qwen3KIVIFlashAttention2 = _QWEN3.flash_attention
Qwen3KIVIDecoderLayer = _QWEN3.decoder_layer
Qwen3KIVIModel = _QWEN3.model
Qwen3ForCausalLM_KIVI = _QWEN3.causal_lm


def load_qwen_kivi(model_name_or_path: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A Qwen2, Qwen2.5 or Qwen3 checkpoint as the KIVI model of its family, and its tokenizer.

    Args:
        model_name_or_path: a folder or a name on the hub.
        kwargs: the cache's options (`k_bits=2`, `v_bits=2`, `group_size=32`, `residual_length=128`, …; see
            `KIVIOptions`) and anything `from_pretrained` takes (`dtype`, `device_map`, `gguf_file`, …).

    Raises:
        ValueError: for a checkpoint of another family, and for an option that is unknown or not allowed.
    """
    return load_family(("qwen2", "qwen3"), model_name_or_path, **kwargs)


__all__ = [
    "KIVICache",
    "Qwen2ForCausalLM_KIVI",
    "Qwen2KIVIConfig",
    "Qwen2KIVIDecoderLayer",
    "Qwen2KIVIFlashAttention2",
    "Qwen2KIVIModel",
    "Qwen2KIVISdpaAttention",
    "Qwen3ForCausalLM_KIVI",
    "Qwen3KIVIConfig",
    "Qwen3KIVIDecoderLayer",
    "Qwen3KIVIFlashAttention2",
    "Qwen3KIVIModel",
    "Qwen3KIVISdpaAttention",
    "load_qwen_kivi",
    "print_kivi_stats",
]
