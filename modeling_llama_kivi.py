"""Llama with a packed KIVI cache: Llama 2, 3, 3.1, 3.2 and whatever else loads as `LlamaForCausalLM`.

model, tokenizer = load_llama_kivi("meta-llama/Llama-3.1-8B-Instruct", k_bits=2, v_bits=2)
outputs = model.generate(**inputs, past_key_values=model.create_kivi_cache(), max_new_tokens=100)
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from modules.kivi_cache_general import KIVICache, print_kivi_stats
from modules.models.families import classes_of, load_family

_LLAMA = classes_of("llama")
LlamaKIVIConfig = _LLAMA.config
LlamaKIVISdpaAttention = _LLAMA.sdpa_attention
LlamaKIVIFlashAttention2 = _LLAMA.flash_attention
LlamaKIVIDecoderLayer = _LLAMA.decoder_layer
LlamaKIVIModel = _LLAMA.model
LlamaForCausalLM_KIVI = _LLAMA.causal_lm


def load_llama_kivi(model_name_or_path: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A Llama checkpoint as a `LlamaForCausalLM_KIVI`, and its tokenizer.

    Args:
        model_name_or_path: a folder or a name on the hub.
        kwargs: the cache's options (`k_bits=2`, `v_bits=2`, `group_size=32`, `residual_length=128`, …; see
            `KIVIOptions`) and anything `from_pretrained` takes (`dtype`, `device_map`, `gguf_file`, …).

    Raises:
        ValueError: for a checkpoint of another family, and for an option that is unknown or not allowed.
    """
    return load_family(("llama",), model_name_or_path, **kwargs)


__all__ = [
    "KIVICache",
    "LlamaForCausalLM_KIVI",
    "LlamaKIVIConfig",
    "LlamaKIVIDecoderLayer",
    "LlamaKIVIFlashAttention2",
    "LlamaKIVIModel",
    "LlamaKIVISdpaAttention",
    "load_llama_kivi",
    "print_kivi_stats",
]
