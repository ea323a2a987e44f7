"""What the KIVI classes of every family share: config fields, attention over the cache, models, generation, loading."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import is_flash_attn_2_available

from modules.kivi_cache_general import KIVICache, KIVICacheLayer, Step
from modules.kivi_options import KIVIOptions, head_dim_of, reject_unknown

MODEL_DEFAULTS: dict[str, Any] = {"use_kivi_cache": False, "prefill_chunk": None}
FIELD_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in dataclasses.fields(KIVIOptions)},
    **MODEL_DEFAULTS,
}


SOURCE_OPTIONS = ("gguf_file", "revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")


@contextlib.contextmanager
def _stock_checkpoints_are_meant() -> Iterator[None]:
    """Without transformers' warning that a checkpoint is of another model type, which here is the very use."""
    log = logging.getLogger("transformers.configuration_utils")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("You are using a model of type")

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


class KIVIConfigMixin(PreTrainedConfig):
    """Config fields of a KIVI model: the options of `KIVIOptions`, and

    use_kivi_cache: `generate()` and `forward()` create a KIVI cache by themselves.
    prefill_chunk: longest piece (tokens) that goes through a KIVI cache at once; None for no limit.
    """

    k_bits: int | list[int] = 2
    v_bits: int | list[int] = 2
    group_size: int = 32
    residual_length: int = 128
    use_kivi: bool = True
    sink_length: int = 4
    k_range: str = "lsq"
    v_range: str | None = None
    wide_channels: float | None = None
    v_rotation: bool | None = None
    v_group_size: int | None = None
    backend: str = "auto"
    use_kivi_cache: bool = False
    prefill_chunk: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_fields(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        with _stock_checkpoints_are_meant():
            config = super().from_pretrained(*args, **kwargs)
        loaded = config[0] if isinstance(config, tuple) else config
        if loaded.model_type.removesuffix("_kivi") != cls.model_type.removesuffix("_kivi"):
            raise ValueError(
                f"{cls.__name__} takes checkpoints of the model type {cls.model_type.removesuffix('_kivi')!r}; got one of "
                f"{loaded.model_type!r}."
            )
        return config


def as_kivi_config(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """`config`, or where it is a stock one its twin of `config_class`, so that what is saved is loaded as a KIVI model."""
    if isinstance(config, config_class):
        return config
    twin = object.__new__(config_class)
    twin.__dict__.update(copy.deepcopy(config.__dict__))
    return twin


def check_config(config: PreTrainedConfig) -> None:
    """Give a config the KIVI fields it lacks and raise `ValueError` for one that is not allowed or does not fit."""
    for name, default in FIELD_DEFAULTS.items():
        if not hasattr(config, name):
            setattr(config, name, default)
    options = check_fields(config)
    options.check_head_dim(head_dim_of(config))
    options.bits_of_layer(0, config.num_hidden_layers)


def check_fields(config: PreTrainedConfig) -> KIVIOptions:
    """The options of a config; `ValueError` for a value that no model could have.

    Whether they fit the model is for `check_config`: `from_pretrained` sets its arguments one by one, after construction.
    """
    options = KIVIOptions.from_config(config)
    if not isinstance(config.use_kivi_cache, bool):
        raise ValueError(f"use_kivi_cache must be True or False; got {config.use_kivi_cache!r}.")
    chunk = config.prefill_chunk
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"prefill_chunk must be a whole number of tokens, 1 or more, or None; got {chunk!r}.")
    return options


def packed_layer(cache: Cache | None, layer_idx: int) -> KIVICacheLayer | None:
    """The packed layer of a cache, None where it is not a KIVI cache or the layer is of another kind."""
    layer = cache.layer(layer_idx) if isinstance(cache, KIVICache) else None
    return layer if isinstance(layer, KIVICacheLayer) else None


class KIVIAttentionMixin:
    """Attention over a `KIVICache`; with any other cache, or none, the stock attention.

    The first tokens of an empty cache attend in full precision through transformers' own SDPA or flash function and are
    then packed; later ones attend over the codes, except with "eager" attention, which runs on dequantized states and can
    give its weights.
    """

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value states `[B, heads, q, head_dim]` of `[B, q, hidden_size]`, before rotation."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return tuple(
            proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = packed_layer(past_key_values, self.layer_idx)
        if layer is None or getattr(self, "sliding_window", None):  # attention over codes knows no sliding window
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        query, key, value = self.project(hidden_states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        implementation, weights = self.config._attn_implementation, None
        if layer.get_seq_length() == 0 or implementation == "eager":
            keys, values = past_key_values.update(key, value, self.layer_idx, query=query)
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            attended, weights = attend(
                self, query, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        else:
            if self.training and query.requires_grad:
                warnings.warn(
                    "attention over stored tokens passes no gradients on. To train, pass an empty KIVI cache or a "
                    "DynamicCache, and no prefill_chunk.",
                    stacklevel=2,
                )
            attended = past_key_values.attend(query, key, value, self.layer_idx, self.scaling)
        return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class KIVIFlashMixin:
    """Prefill through transformers' `flash_attention_2`.

    Raises:
        ImportError: without the flash-attn package, saying how to get it.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        if not is_flash_attn_2_available():
            raise ImportError(
                f"{type(self).__name__} needs the flash-attn package and a CUDA GPU: "
                "`pip install flash-attn --no-build-isolation`. Without it, use attn_implementation='sdpa' (the default)."
            )
        super().__init__(config, layer_idx)


def attention_class(config: PreTrainedConfig, sdpa: type[nn.Module], flash: type[nn.Module]) -> type[nn.Module]:
    """The attention class for a config's attention implementation."""
    return flash if config._attn_implementation == "flash_attention_2" else sdpa


class KIVIModelMixin:
    """A base model that runs a step through a `KIVICache`: masks, positions, chunks; stock with any other cache."""

    @property
    def _slides(self) -> bool:
        """Whether some layers have a sliding window: those attend as in the stock model, with a mask."""
        return "sliding_attention" in (getattr(self.config, "layer_types", None) or ())

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        cache = past_key_values
        one_input = (input_ids is None) != (inputs_embeds is None)
        if not isinstance(cache, KIVICache) or not one_input:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        batch, length = tokens.shape[:2]
        if isinstance(attention_mask, dict):
            raise ValueError("a KIVI cache takes a mask of shape [batch, tokens]; got a dict of prepared masks.")
        step = cache.new_step(attention_mask, batch, length)
        if position_ids is None:
            position_ids = cache.next_positions(step, length, tokens.device)
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids.expand(batch, -1) if position_ids.dim() == 2 else position_ids,
        }
        with cache.step(step):
            chunk = self.config.prefill_chunk
            if chunk is not None and length > chunk:
                return self._forward_in_chunks(
                    inputs, attention_mask, cache, step, chunk, use_cache=use_cache, **kwargs
                )
            if cache.get_seq_length() and not self._slides and self.config._attn_implementation != "eager":
                attention_mask = None  # attention over codes goes by the step, so none need be built
            return super().forward(
                **inputs, attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache, **kwargs
            )

    def _forward_in_chunks(
        self,
        inputs: dict[str, torch.Tensor | None],
        attention_mask: torch.Tensor | None,
        cache: KIVICache,
        step: Step,
        chunk: int,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """A long forward, `chunk` tokens at a time, so that later tokens see a packed past.

        Chunks are of real tokens: each sequence of a padded batch is cut where it would be cut alone.
        """
        return_dict = kwargs.pop("return_dict", None)
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError(
                f"a forward in chunks gives no attention weights; got output_attentions=True with prefill_chunk={chunk}. Set "
                "prefill_chunk=None for it."
            )
        aligned = not self._slides
        length = inputs["position_ids"].shape[-1]
        stored = cache.get_seq_length()
        real = step.real
        if real is None and attention_mask is not None and not attention_mask[:, :stored].all():
            real = torch.ones_like(attention_mask[:, stored:], dtype=torch.bool)  # the past has padding
        if aligned and real is not None:
            inputs = {name: None if t is None else step.real_first(t, dim=1) for name, t in inputs.items()}
            real = step.real_first(real, dim=1)
        outputs = []
        for start in range(0, length, chunk):
            piece = slice(start, start + chunk)
            mask = None
            if real is not None:
                past = attention_mask[:, :stored].bool()
                mask = torch.cat([past.to(real.device), real[:, : piece.stop]], dim=1)
            part = {name: None if t is None else t[:, piece] for name, t in inputs.items()}
            outputs.append(self.forward(**part, attention_mask=mask, past_key_values=cache, return_dict=True, **kwargs))
        if aligned and step.order is not None:
            cache.set_columns(stored, step)
        joined = _join_outputs(outputs, step if aligned else None)
        return joined.to_tuple() if return_dict is False else joined


def _join_outputs(outputs: list[BaseModelOutputWithPast], step: Step | None) -> BaseModelOutputWithPast:
    def join(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        joined = torch.cat(parts, dim=1)
        return joined if step is None else step.as_given(joined)

    states = [out.hidden_states for out in outputs]
    return BaseModelOutputWithPast(
        last_hidden_state=join(tuple(out.last_hidden_state for out in outputs)),
        past_key_values=outputs[-1].past_key_values,
        hidden_states=None if states[0] is None else tuple(join(parts) for parts in zip(*states)),
    )


class KIVIForCausalLMMixin:
    """A causal LM that can create and use a KIVI cache.

    Attributes:
        use_kivi_cache: True lets `generate()` and `forward()` create a KIVI cache by themselves.
        prefill_chunk: longest piece (tokens) that goes through a KIVI cache at once; None for no limit.
        use_cuda_graphs: False runs every step eagerly, also on a GPU.
    """

    use_cuda_graphs: bool = True

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        reject_unknown(options, FIELD_DEFAULTS, type(self).__name__)
        config = as_kivi_config(config, type(self).config_class)
        for name, value in options.items():
            setattr(config, name, value)
        check_config(config)
        super().__init__(config)

    @property
    def use_kivi_cache(self) -> bool:
        return self.config.use_kivi_cache

    @use_kivi_cache.setter
    def use_kivi_cache(self, value: bool) -> None:
        self._set_checked("use_kivi_cache", value)

    @property
    def prefill_chunk(self) -> int | None:
        return self.config.prefill_chunk

    @prefill_chunk.setter
    def prefill_chunk(self, value: int | None) -> None:
        self._set_checked("prefill_chunk", value)

    def _set_checked(self, name: str, value: Any) -> None:
        """Set a field of the config, or leave it and raise the `ValueError` of a value that is not allowed."""
        previous = getattr(self.config, name)
        setattr(self.config, name, value)
        try:
            check_fields(self.config)
        except ValueError:
            setattr(self.config, name, previous)
            raise

    def create_kivi_cache(
        self, *, max_length: int | None = None, offloading: bool = False, **overrides: Any
    ) -> KIVICache:
        """An empty `KIVICache` for this model, with the options of its config.

        Args:
            max_length: tokens a sequence may reach, allocated at once; None grows as needed.
            offloading: keep layers on the CPU but for the one in use.
            overrides: options of `KIVIOptions` by name.

        Raises:
            ValueError: for an option that is unknown or not allowed.
        """
        return KIVICache(self.config, max_length=max_length, offloading=offloading, **overrides)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ):
        """As the stock model's, and with `use_kivi_cache` a new KIVI cache where none is passed.

        On a GPU, steps of one token replay a CUDA graph (see `use_cuda_graphs`).
        """
        wants_cache = self.config.use_cache if use_cache is None else use_cache
        if self.use_kivi_cache and past_key_values is None and wants_cache and not self.training:
            past_key_values = self.create_kivi_cache()
        asked = {name for name, value in kwargs.items() if value is not None and value is not False}
        plain = (
            input_ids is not None
            and inputs_embeds is None
            and labels is None
            and wants_cache
            and asked <= {"return_dict"}
            and kwargs.get("return_dict", self.config.return_dict) is not False
            and not (self.config.output_hidden_states or self.config.output_attentions)
        )
        if plain and isinstance(past_key_values, KIVICache) and self.use_cuda_graphs:
            logits = past_key_values.replay(self, input_ids, attention_mask, position_ids)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        wanted = self.use_kivi_cache and generation_config.use_cache is not False
        if (
            not wanted
            or model_kwargs.get("past_key_values") is not None
            or generation_config.cache_implementation is not None
        ):
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        model_kwargs["past_key_values"] = self.create_kivi_cache()
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()


def load_kivi(families: Mapping[str, type], name: str, **kwargs: Any) -> tuple[Any, Any]:
    """Load a checkpoint of one of `families` (model type to KIVI class) and its tokenizer.

    Raises:
        ValueError: for a checkpoint of another family.
    """
    source = {key: kwargs[key] for key in SOURCE_OPTIONS if key in kwargs}
    config = kwargs.get("config") or AutoConfig.from_pretrained(name, **source)
    family = config.model_type.removesuffix("_kivi")
    if family not in families:
        other = "load_llama_kivi" if family == "llama" else "load_qwen_kivi" if family.startswith("qwen") else None
        hint = f" Use {other}()." if other else ""
        raise ValueError(
            f"{name} is of the model type {config.model_type!r}; this helper loads {', '.join(families)}.{hint}"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    return families[family].from_pretrained(name, **kwargs), tokenizer
