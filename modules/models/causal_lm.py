"""The causal LM of a KIVI model: it makes and uses KIVI caches, and has decode steps replayed from CUDA graphs or compiled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from modules.cache.cache import KIVICache
from modules.codecs.static import StaticParameters
from modules.models.config import FIELD_DEFAULTS, as_kivi_config, check_config, check_fields
from modules.models.graphs import DecodeGraphs
from modules.models.pieces import longest_piece
from modules.models.program import DecodeProgram
from modules.options import reject_unknown, with_preset


class CachingMixin:
    """A causal LM that can create and use a KIVI cache, with the options that its decoder's config carries.

    Attributes:
        use_kivi_cache: True lets `generate()` and `forward()` create a KIVI cache by themselves.
        prefill_chunk: longest piece (tokens) that goes through a KIVI cache at once; "auto" leaves prompts whole up to 8,192
            tokens and cuts longer ones by the sizes of the model, None sets no limit.
        compile_decode: True compiles steps of one token on a CPU, once for each batch size.
        static: file of calibrated INT8 parameters that caches store by; None for the options of KIVI. `save_pretrained`
            keeps the path, as it was given.
        use_cuda_graphs: False runs every step eagerly, also on a GPU.
    """

    use_cuda_graphs: bool = True

    @property
    def _kivi_config(self) -> PreTrainedConfig:
        """The config that carries the options: the decoder's."""
        return self.config.get_text_config(decoder=True)

    @property
    def use_kivi_cache(self) -> bool:
        return self._kivi_config.use_kivi_cache

    @use_kivi_cache.setter
    def use_kivi_cache(self, value: bool) -> None:
        self._set_checked("use_kivi_cache", value)

    @property
    def prefill_chunk(self) -> int | str | None:
        return self._kivi_config.prefill_chunk

    @prefill_chunk.setter
    def prefill_chunk(self, value: int | str | None) -> None:
        self._set_checked("prefill_chunk", value)

    @property
    def compile_decode(self) -> bool:
        return self._kivi_config.compile_decode

    @compile_decode.setter
    def compile_decode(self, value: bool) -> None:
        self._set_checked("compile_decode", value)

    @property
    def static(self) -> str | None:
        return self.config.static

    @static.setter
    def static(self, value: str | None) -> None:
        self._set_checked("static", value)

    def _set_checked(self, name: str, value: Any) -> None:
        """Set a field of the config, or leave it and raise the `ValueError` of a value that is not allowed."""
        config = self._kivi_config
        previous = getattr(config, name)
        setattr(config, name, value)
        try:
            check_fields(config)
        except ValueError:
            setattr(config, name, previous)
            raise

    def create_kivi_cache(
        self,
        *,
        max_length: int | None = None,
        offloading: bool = False,
        static: StaticParameters | str | os.PathLike | bool | None = None,
        **overrides: Any,
    ) -> KIVICache:
        """An empty `KIVICache` for this model, with the options of its config.

        Args:
            max_length: tokens a sequence may reach, allocated at once; None grows as needed.
            offloading: keep layers on the CPU but for the one in use.
            static: calibrated INT8 parameters, or their file, that say what is stored; None for the file that the config
                names, if it does; False for none.
            overrides: options of `KIVIOptions` by name, or a `preset` of them.

        Raises:
            ValueError: for an option that is unknown or not allowed, or has no meaning beside static parameters, and for
                parameters of another model.
        """
        return KIVICache(self.config, max_length=max_length, offloading=offloading, static=static, **overrides)

    def load_kivi_cache(self, path: Path | str, **kwargs: Any) -> KIVICache:
        """A cache that was saved with `cache.save(path)`, for this model; see `KIVICache.load`, which takes `kwargs`."""
        return KIVICache.load(path, self, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ):
        """As the stock model's, and with `use_kivi_cache` a new KIVI cache where none is passed.

        Steps of one token replay a CUDA graph on a GPU (see `use_cuda_graphs`); on a CPU they run compiled with
        `compile_decode`.
        """
        wants_cache = self._kivi_config.use_cache if use_cache is None else use_cache
        if self.use_kivi_cache and past_key_values is None and wants_cache and not self.training:
            past_key_values = self.create_kivi_cache()
        if kwargs.get("kivi_step") is None and isinstance(past_key_values, KIVICache):
            logits = self._decoded(past_key_values, input_ids, attention_mask, position_ids, wants_cache, kwargs)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        if isinstance(past_key_values, KIVICache):
            kept = kwargs.get("logits_to_keep", 0)
            kept = kept if isinstance(kept, int) else 0
            if past_key_values.ledger.geometry.draft_room:
                # assisted decoding wants the logits of the drafts and of one token before
                kwargs["kivi_drafts"] = max(0, kept - 1)
            if kept and self._may_be_cut(input_ids if input_ids is not None else kwargs.get("inputs_embeds")):
                kwargs["kivi_kept"] = kept
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        return super().forward(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    def _may_be_cut(self, tokens: torch.Tensor | None) -> bool:
        """Whether a forward of `tokens` `[B, T, …]` is so long that it may go through in pieces."""
        if tokens is None or tokens.dim() < 2:  # the latter is refused where it is looked at
            return False
        piece = longest_piece(self._kivi_config, tokens.shape[1])
        return piece is not None and piece < tokens.shape[1]

    def _decoded(
        self,
        cache: KIVICache,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        wants_cache: bool,
        others: dict[str, Any],
    ) -> torch.Tensor | None:
        """Logits `[B, 1, vocabulary]` of a step of one token, from a CUDA graph or compiled; None where the step is for the
        model."""
        if input_ids is None or input_ids.shape[1:] != (1,) or not (input_ids.is_cuda or self.compile_decode):
            return None
        asked = {name for name, value in others.items() if value is not None and value is not False}
        return_dict = others.get("return_dict")
        plain = (
            wants_cache
            and asked <= {"return_dict", "logits_to_keep"}  # of one token all are kept
            and (self.config.return_dict if return_dict is None else return_dict)
            and not (self.config.output_hidden_states or self.config.output_attentions)
            and (position_ids is None or position_ids.dim() == 2)
        )
        if not plain or not cache.get_seq_length():
            return None
        if position_ids is None and self.get_decoder() is not self.base_model:
            return None  # the model around the decoder finds the positions, by the images before
        run = self._replayed if input_ids.is_cuda else self._compiled
        return run(cache, input_ids, attention_mask, position_ids)

    def _replayed(
        self,
        cache: KIVICache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if not self.use_cuda_graphs or self.training or torch.is_autocast_enabled("cuda"):
            return None
        runner = self._decode_graphs.runner(cache)
        if runner.running:
            return None
        step = cache.new_step(attention_mask, input_ids.shape[0], 1)
        return runner.step(self, cache, input_ids, step, position_ids).clone()

    def _compiled(
        self,
        cache: KIVICache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        batch = input_ids.shape[0]
        if input_ids.device.type != "cpu" or not self._decode_program.can_run(self, cache, batch):
            return None
        step = cache.new_step(attention_mask, batch, 1)
        return self._decode_program.step(self, cache, input_ids, step, position_ids)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As the stock model's; of all tokens, only those go on that a KIVI cache does not hold.

        transformers sees to that itself, but for the first step of assisted decoding.
        """
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if next_sequence_length is None and isinstance(cache, KIVICache) and kwargs.get("inputs_embeds") is None:
            stored, given = cache.get_seq_length(), input_ids.shape[1]
            if 0 < stored < given and (mask is None or mask.shape[1] == given):
                next_sequence_length = given - stored
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the stock model's; the tokens must go on from those that a KIVI cache holds.

        Raises:
            ValueError: where it holds as many tokens as are given, or more, so that nothing is left to feed; where it is from
                a file that says its tokens and others are given.
        """
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        given = input_ids.shape[1]
        all_given = mask is None or mask.shape[1] == given  # else only the new tokens are
        if isinstance(cache, KIVICache) and all_given:
            cache.check_tokens(input_ids)
        if isinstance(cache, KIVICache) and all_given and 0 < given <= cache.get_seq_length():
            stored = cache.get_seq_length()
            raise ValueError(
                f"the cache holds {stored} tokens and generate() got {given}, of which none is new. Pass all tokens, those "
                f"that are stored and at least one more; or take back what is too much: cache.crop({given - 1 - stored})."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        wanted = self.use_kivi_cache and generation_config.use_cache is not False
        if wanted and cache is None and generation_config.cache_implementation is None:
            cache = model_kwargs["past_key_values"] = self.create_kivi_cache()
            if generation_config.is_assistant:
                cache.activate_past_recording()
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if isinstance(cache, KIVICache) and self.device.type == "cuda":
            cache.reserve(max_cache_length)  # once, so that a graph is recorded once


class KIVIForCausalLMMixin(CachingMixin):
    """The causal LM of a family."""

    kivi_classes: Any

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        options = with_preset(options)
        reject_unknown(options, FIELD_DEFAULTS, type(self).__name__)
        config = as_kivi_config(config, type(self).config_class)
        for name, value in options.items():
            setattr(config, name, value)
        check_config(config.get_text_config(decoder=True))
        super().__init__(config)
        decoder = self.get_decoder()
        decoder.__class__ = self.kivi_classes.model
        decoder.become_kivi()
        self._decode_graphs, self._decode_program = DecodeGraphs(), DecodeProgram()
