"""The figures of `kivi memory`, from caches that are planned and not filled."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from modules.cache.plan import planned_cache
from modules.cli.presets import PRESETS
from modules.cli.source import source_of
from modules.cli.status import UserError
from modules.options import MOST_TOKENS, KIVIOptions, head_dim_of

FLOAT16_BYTES = 2


def model_config(model: str) -> PreTrainedConfig:
    """The config of a preset, a config.json, a checkpoint's folder, a GGUF file or a model on the hub."""
    if model.lower() in PRESETS:
        fields = dict(PRESETS[model.lower()])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if Path(model).suffix == ".json" and Path(model).expanduser().is_file():
        return AutoConfig.from_pretrained(str(Path(model).expanduser()))
    try:
        name, source = source_of(model)
    except UserError as error:
        near = difflib.get_close_matches(model.lower(), PRESETS, n=3, cutoff=0.5)
        raise UserError(f"{error}" + (f" Names that are known: {', '.join(near)}, …" if near else "")) from error
    return AutoConfig.from_pretrained(name, **source)


def shape_of(config: PreTrainedConfig) -> dict[str, int]:
    """Layers, KV heads, head size and longest context (tokens) of a model."""
    text = config.get_text_config(decoder=True)
    return {
        "layers": text.num_hidden_layers,
        "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "head_dim": head_dim_of(text),
        "max_position_embeddings": getattr(text, "max_position_embeddings", None) or MOST_TOKENS,
    }


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, counted on the meta device; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config(decoder=True), dtype=dtype)
    return sum(t.nbytes for tensors in (model.parameters(), model.buffers()) for t in tensors)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How caches of a model are filled; see `planned_cache`.

    Attributes:
        config: of the model.
        dtype: of the model.
        chunk: tokens that come at once, None for all.
        reserve: whether room is made for all tokens at the start.
    """

    config: PreTrainedConfig
    dtype: torch.dtype = torch.float16
    chunk: int | None = None
    reserve: bool = False

    def row(self, options: KIVIOptions, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Bits and bytes of a cache of `batch` sequences of `tokens` tokens, and of float16 for as many."""
        cache = planned_cache(
            self.config,
            tokens,
            batch_size=batch,
            options=options,
            dtype=self.dtype,
            chunk=self.chunk,
            reserve=self.reserve,
        )
        info = cache.get_cache_info()
        size, bits = info["bytes"], info["bits"]
        other = size["other_layers"] * FLOAT16_BYTES // self.dtype.itemsize
        float16 = size["dense"] * FLOAT16_BYTES // self.dtype.itemsize
        nominal = (float16 - other) * bits["nominal"] / (8 * FLOAT16_BYTES) + other
        return {
            "tokens": tokens,
            "batch": batch,
            "k_bits": options.k_bits if options.use_kivi else 16,
            "v_bits": options.v_bits if options.use_kivi else 16,
            "nominal": {"bits": bits["nominal"], "bytes": nominal, "ratio": float16 / nominal},
            "stored": {"bits": bits["stored"], "bytes": size["total"], "ratio": float16 / size["total"]},
            "float16_bytes": float16,
            "bytes": size,
        }

    def fit(self, options: KIVIOptions | None, room: int, lengths: list[int], batch: int) -> dict[str, Any]:
        """The longest context of `batch` sequences, and the largest batch at each length, in `room` bytes.

        For prompts that come at once. All tensors of a cache have the batch as a dimension, so its bytes are `batch` times
        those of one sequence.

        Args:
            options: of the cache; None for float16.
        """
        at_once = dataclasses.replace(self, chunk=None)

        def size(tokens: int) -> int:
            row = at_once.row(options or KIVIOptions(use_kivi=False), tokens)
            return row["stored"]["bytes"] if options else row["float16_bytes"]

        return {
            "longest_context": _largest(lambda tokens: size(tokens) * batch <= room),
            "largest_batch": {tokens: room // size(tokens) for tokens in lengths},
        }


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens up to `MOST_TOKENS` that fits; 0 where one token does not."""
    low, high = 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
