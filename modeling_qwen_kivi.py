"""Qwen2, Qwen2.5, Qwen2.5-Coder and Qwen3 with a packed KIVI cache.

    model, tokenizer = load_qwen_kivi("Qwen/Qwen2.5-7B-Instruct", k_bits=2, v_bits=2)
    outputs = model.generate(**inputs, past_key_values=model.create_kivi_cache(), max_new_tokens=100)
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

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


class Qwen2KIVIConfig(KIVIConfigMixin, Qwen2Config):
    """`Qwen2Config` with the options of the cache."""

    model_type = "qwen2_kivi"


class Qwen2KIVISdpaAttention(KIVIAttentionMixin, Qwen2Attention):
    """Qwen2's attention over a KIVI cache; prefill through SDPA."""


class Qwen2KIVIFlashAttention2(KIVIFlashMixin, Qwen2KIVISdpaAttention):
    """Qwen2's attention over a KIVI cache; prefill through FlashAttention 2."""


class Qwen2KIVIDecoderLayer(Qwen2DecoderLayer):
    """A decoder layer with KIVI attention."""

    def __init__(self, config: Qwen2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = attention_class(config, Qwen2KIVISdpaAttention, Qwen2KIVIFlashAttention2)(config, layer_idx)


class Qwen2KIVIModel(KIVIModelMixin, Qwen2Model):
    """The base model."""

    config: Qwen2KIVIConfig
    _no_split_modules = ["Qwen2KIVIDecoderLayer"]

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Qwen2KIVIDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class Qwen2ForCausalLM_KIVI(KIVIForCausalLMMixin, Qwen2ForCausalLM):
    """The causal LM: `Qwen2ForCausalLM_KIVI.from_pretrained(path, k_bits=2, v_bits=2)`."""

    config: Qwen2KIVIConfig
    _no_split_modules = ["Qwen2KIVIDecoderLayer"]

    def __init__(self, config: Qwen2Config, **options: Any) -> None:
        super().__init__(config, **options)
        self.model = Qwen2KIVIModel(config)
        self.post_init()


class Qwen3KIVIConfig(KIVIConfigMixin, Qwen3Config):
    """`Qwen3Config` with the options of the cache."""

    model_type = "qwen3_kivi"


class Qwen3KIVISdpaAttention(KIVIAttentionMixin, Qwen3Attention):
    """Qwen3's attention over a KIVI cache; prefill through SDPA."""

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in the other families, with queries and keys normalized along the head."""
        query, key, value = super().project(hidden_states)
        return self.q_norm(query), self.k_norm(key), value


class Qwen3KIVIFlashAttention2(KIVIFlashMixin, Qwen3KIVISdpaAttention):
    """Qwen3's attention over a KIVI cache; prefill through FlashAttention 2."""


class Qwen3KIVIDecoderLayer(Qwen3DecoderLayer):
    """A decoder layer with KIVI attention."""

    def __init__(self, config: Qwen3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = attention_class(config, Qwen3KIVISdpaAttention, Qwen3KIVIFlashAttention2)(config, layer_idx)


class Qwen3KIVIModel(KIVIModelMixin, Qwen3Model):
    """The base model."""

    config: Qwen3KIVIConfig
    _no_split_modules = ["Qwen3KIVIDecoderLayer"]

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Qwen3KIVIDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class Qwen3ForCausalLM_KIVI(KIVIForCausalLMMixin, Qwen3ForCausalLM):
    """The causal LM: `Qwen3ForCausalLM_KIVI.from_pretrained(path, k_bits=2, v_bits=2)`."""

    config: Qwen3KIVIConfig
    _no_split_modules = ["Qwen3KIVIDecoderLayer"]

    def __init__(self, config: Qwen3Config, **options: Any) -> None:
        super().__init__(config, **options)
        self.model = Qwen3KIVIModel(config)
        self.post_init()


_FAMILIES = {"qwen2": Qwen2ForCausalLM_KIVI, "qwen3": Qwen3ForCausalLM_KIVI}


def load_qwen_kivi(
    model_name_or_path: str, **kwargs: Any
) -> tuple[Qwen2ForCausalLM_KIVI | Qwen3ForCausalLM_KIVI, PreTrainedTokenizerBase]:
    """A Qwen2, Qwen2.5 or Qwen3 checkpoint as a KIVI model of its family, and its tokenizer.

    Args:
        model_name_or_path: a folder or a name on the hub.
        kwargs: the cache's options (`k_bits=2`, `v_bits=2`, `group_size=32`, `residual_length=128`, …; see
            `KIVIOptions`) and anything `from_pretrained` takes (`dtype`, `device_map`, `gguf_file`, …).

    Raises:
        ValueError: for a checkpoint of another family, and for an option that is unknown or not allowed.
    """
    return load_kivi(_FAMILIES, model_name_or_path, **kwargs)


for _config, _model in ((Qwen2KIVIConfig, Qwen2ForCausalLM_KIVI), (Qwen3KIVIConfig, Qwen3ForCausalLM_KIVI)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)

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
