"""Llama with a packed KIVI cache: Llama 2, 3, 3.1, 3.2 and whatever else loads as `LlamaForCausalLM`.

    model, tokenizer = load_llama_kivi("meta-llama/Llama-3.1-8B-Instruct", k_bits=2, v_bits=2)
    outputs = model.generate(**inputs, past_key_values=model.create_kivi_cache(), max_new_tokens=100)
"""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from modules.kivi_cache_general import KIVICache, print_kivi_stats
from modules.kivi_modeling import (
    KIVIAttentionMixin,
    KIVIConfigMixin,
    KIVIFlashMixin,
    KIVIForCausalLMMixin,
    KIVIModelMixin,
    attention_class,
    load_kivi,
)


class LlamaKIVIConfig(KIVIConfigMixin, LlamaConfig):
    """`LlamaConfig` with the options of the cache."""

    model_type = "llama_kivi"


class LlamaKIVISdpaAttention(KIVIAttentionMixin, LlamaAttention):
    """Llama's attention over a KIVI cache; prefill through SDPA."""


class LlamaKIVIFlashAttention2(KIVIFlashMixin, LlamaKIVISdpaAttention):
    """Llama's attention over a KIVI cache; prefill through FlashAttention 2."""


class LlamaKIVIDecoderLayer(LlamaDecoderLayer):
    """A decoder layer with KIVI attention."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = attention_class(config, LlamaKIVISdpaAttention, LlamaKIVIFlashAttention2)(config, layer_idx)


class LlamaKIVIModel(KIVIModelMixin, LlamaModel):
    """The base model."""

    config: LlamaKIVIConfig
    _no_split_modules = ["LlamaKIVIDecoderLayer"]

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LlamaKIVIDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class LlamaForCausalLM_KIVI(KIVIForCausalLMMixin, LlamaForCausalLM):
    """The causal LM: `LlamaForCausalLM_KIVI.from_pretrained(path, k_bits=2, v_bits=2)`."""

    config: LlamaKIVIConfig
    _no_split_modules = ["LlamaKIVIDecoderLayer"]

    def __init__(self, config: LlamaConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.model = LlamaKIVIModel(config)
        self.post_init()


def load_llama_kivi(model_name_or_path: str, **kwargs: Any) -> tuple[LlamaForCausalLM_KIVI, PreTrainedTokenizerBase]:
    """A Llama checkpoint as a KIVI model, and its tokenizer.

    Args:
        model_name_or_path: a folder or a name on the hub.
        kwargs: the cache's options (`k_bits=2`, `v_bits=2`, `group_size=32`, `residual_length=128`, …; see
            `KIVIOptions`) and anything `from_pretrained` takes (`dtype`, `device_map`, `gguf_file`, …).

    Raises:
        ValueError: for a checkpoint of another family, and for an option that is unknown or not allowed.
    """
    return load_kivi({"llama": LlamaForCausalLM_KIVI}, model_name_or_path, **kwargs)


AutoConfig.register("llama_kivi", LlamaKIVIConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaKIVIConfig, LlamaForCausalLM_KIVI, exist_ok=True)

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
