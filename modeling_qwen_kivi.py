"""Qwen with a packed KIVI cache: Qwen2 and 2.5, Qwen3, their mixtures of experts, the hybrids Qwen3-Next and Qwen3.5, and
the models that take images: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.

model, tokenizer = load_qwen_kivi("Qwen/Qwen2.5-7B-Instruct", k_bits=2, v_bits=2)
outputs = model.generate(**inputs, past_key_values=model.create_kivi_cache(), max_new_tokens=100)

Each family has here `QwenNForCausalLM_KIVI` (with images `QwenNForConditionalGeneration_KIVI`), `QwenNKIVIConfig`, and the
classes of its decoder: `QwenNKIVIModel`, `QwenNKIVIDecoderLayer`, `QwenNKIVISdpaAttention`, `QwenNKIVIFlashAttention2`.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from modules.kivi_cache_general import KIVICache, print_kivi_stats
from modules.models.families import FAMILIES, classes_bound_in, load_family

_CLASSES = classes_bound_in(__name__)
globals().update(_CLASSES)


def load_qwen_kivi(model_name_or_path: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A checkpoint of a Qwen as the KIVI model of its family, and its tokenizer.

    A model that takes images is loaded with all of it; `AutoProcessor.from_pretrained` gives what prepares them.

    Args:
        model_name_or_path: a folder or a name on the hub.
        kwargs: the cache's options (`k_bits=2`, `v_bits=2`, `group_size=32`, `residual_length=128`, …; see
            `KIVIOptions`) and anything `from_pretrained` takes (`dtype`, `device_map`, `gguf_file`, …).

    Raises:
        ValueError: for a checkpoint of another family, and for an option that is unknown or not allowed.
    """
    model_types = [family.model_type for family in FAMILIES.values() if family.module == __name__]
    return load_family(model_types, model_name_or_path, **kwargs)


__all__ = ["KIVICache", "load_qwen_kivi", "print_kivi_stats", *_CLASSES]
