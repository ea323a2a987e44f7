"""Which decoders of transformers attend over a KIVI cache: `python -m modules.evaluation.decoders`, which writes docs/models.md.

Every model type that `AutoModelForCausalLM` knows is built small and random, each in a process of its own, and tried: a prompt
and tokens one by one, at 16 bits against transformers' own cache, and at 2 bits.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
import multiprocessing
import sys
import traceback
import types
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.cache_utils import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modules.cli.command import argument, check_least, parse
from modules.evaluation import hybrids
from modules.evaluation.environment import Environment
from modules.evaluation.pages import render
from modules.evaluation.results import QualityResult, load_result
from modules.evaluation.tables import quality_table
from modules.kivi_cache_general import KIVICache
from modules.models.attach import attach_kivi
from modules.models.common_pattern import why_not

OVER_CODES, REBUILT, REFUSED, NOT_BUILT = "over codes", "rebuilt", "refused", "not built"
TEMPLATE = Path(__file__).with_name("models.md.jinja")
PAGE = "docs/models.md"
RESULTS = "benchmarks/results"
HYBRID_TOKENS = 1000
PROMPT, LATER = 60, 24  # tokens; groups of 16 are packed in the prompt and after it
EXACT = 1e-4  # relative error in float32
_OPTIONS: dict[str, Any] = {"group_size": 16, "residual_length": 16, "backend": "torch"}
_LAYERS, _MOST_PARAMETERS = 4, 30_000_000

_SIZES: dict[str, Any] = {  # by field, where a config has it
    "vocab_size": 131,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 128,
    "embedding_size": 128,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "global_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "query_pre_attn_scalar": 32,
    "vocab_size_per_layer_input": 131,
    "hidden_size_per_layer_input": 16,
    "rotary_dim": 16,
    "lru_width": 128,
    "sliding_window": 24,
    "decoder_layers": _LAYERS,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the side of images, of sound
    "depth": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 128,
}


_ALSO = ("head_dim", "num_key_value_heads")  # set where a config has them as None, too
_MORE: dict[str, dict[str, Any]] = {  # what a model type needs beside
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"head_dim": 32, "num_heads": 8, "n_groups": 1},
    "mistral": {"sliding_window": None},  # as in its newer checkpoints
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a model type.

    Attributes:
        name: the model type.
        outcome: `OVER_CODES`, `REBUILT`, `REFUSED` or `NOT_BUILT`.
        why: what keeps it from more; empty for what attends over codes.
        layers: kinds of its cache's layers, counted, small as it is.
        error: relative error of the logits at 16 bits against transformers' own cache.
    """

    name: str
    outcome: str
    why: str = ""
    layers: str = ""
    error: float | None = None


def model_types() -> list[str]:
    """The model types that `AutoModelForCausalLM` of the installed transformers knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(name: str) -> PreTrainedConfig:
    """A config of a model type with few and small layers, one of each kind among them."""
    return _small(CONFIG_MAPPING[name], CONFIG_MAPPING[name](), _MORE.get(name, {}))


def _small(
    config_class: type[PreTrainedConfig], default: PreTrainedConfig, more: dict[str, Any] | None = None
) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(default)} | set(vars(default)) | set(default.attribute_map)
    fields = {name: _SIZES[name] for name in names & set(_SIZES) if name in _ALSO or _value(default, name) is not None}
    if "qk_rope_head_dim" in names:  # which it then calls the size of its heads
        fields.pop("head_dim", None)
    depth = _value(default, "num_hidden_layers")
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _small(type(value), value)
        elif isinstance(value, list | tuple) and value and len(value) == depth:
            kinds = list(dict.fromkeys(value))
            fields[name] = [kinds[i % len(kinds)] for i in range(_LAYERS)]
    return config_class(**fields | (more or {}))


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field, None where it differs between layers, which a config says by raising."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def build(name: str) -> PreTrainedModel:
    """A small random model.

    Raises:
        ValueError: where it is not small however small its config.
    """
    config = small_config(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"it has {count / 1e6:.0f} million parameters however small its config")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(name), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def examine(name: str) -> Verdict:
    """Build a model type and try it."""
    try:
        model = build(name)
    except Exception as error:  # a config of another kind of model: dozens of reasons, all of them said
        return Verdict(name, NOT_BUILT, _in_a_line(error))
    config = model.config.get_text_config(decoder=True)
    try:
        exact = _logits(model, DynamicCache(config=config))
    except Exception as error:
        return Verdict(name, NOT_BUILT, f"it does not run over transformers' DynamicCache: {_in_a_line(error)}")
    try:
        why = why_not(model)
        if why is None:
            return _over_codes(attach_kivi(model, **_OPTIONS), name, exact)
    except Exception as error:
        why = _in_a_line(error)
    return _rebuilt(model, name, exact, why)


def _over_codes(model: Any, name: str, exact: torch.Tensor) -> Verdict:
    difference = _relative_error(_logits(model, model.create_kivi_cache(k_bits=16, v_bits=16)), exact)
    if not difference < EXACT:
        raise ValueError(f"at 16 bits the relative error is {difference:.0e}")
    cache = model.create_kivi_cache()
    if not 1e-6 < _relative_error(_logits(model, cache), exact) < 1:
        raise ValueError("at 2 bits the logits are full precision's, or noise")
    kinds = collections.Counter(_kind(layer) for layer in cache.layers)
    return Verdict(name, OVER_CODES, layers=", ".join(f"{n} {kind}" for kind, n in kinds.items()), error=difference)


def _rebuilt(model: Any, name: str, exact: torch.Tensor, why: str) -> Verdict:
    """The stock model over a KIVI cache that gives it dequantized states."""
    try:
        model = build(name)
        cache = KIVICache(model.config, k_bits=16, v_bits=16, **_OPTIONS)
        if not cache.kivi_layers:
            return Verdict(name, REFUSED, why)
        difference = _relative_error(_logits(model, cache), exact)
        packed = KIVICache(model.config, wide_channels=0, **_OPTIONS)
        _logits(model, packed)
    except Exception as error:
        return Verdict(name, REFUSED, f"{why}; rebuilt states: {_in_a_line(error)}")
    if not difference < EXACT:
        return Verdict(name, REFUSED, f"{why}; with rebuilt states the relative error is {difference:.0e}")
    if not packed.get_cache_info()["tokens"]["packed"]:
        return Verdict(name, REFUSED, f"{why}; it stores nothing in the cache")
    return Verdict(name, REBUILT, why, error=difference)


def _kind(layer: Any) -> str:
    if layer.__class__.__name__.startswith("KIVI"):
        return "packed"
    return type(layer).__name__.removeprefix("Dynamic").removesuffix("Layer")


@torch.no_grad()
def _logits(model: Any, cache: Any) -> torch.Tensor:
    """Logits of a prompt, and of tokens after it one by one."""
    ids = torch.randint(3, 131, (1, PROMPT + LATER), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(PROMPT + LATER).unsqueeze(0)
    lengths = [PROMPT, *[1] * LATER]
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    out = []
    for piece, place in zip(ids.split(lengths, dim=1), positions.split(lengths, dim=1)):
        more = {"position_ids": place} if takes_positions else {}  # as generate() gives them
        out.append(model(input_ids=piece, past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(out, dim=1)


def _relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    return text if len(text) < 200 else f"{text[:200]}…"


def _send_verdict(name: str, connection: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    try:
        verdict = examine(name)
    except BaseException:
        verdict = Verdict(name, NOT_BUILT, traceback.format_exc(limit=1).splitlines()[-1])
    connection.send(verdict)


def examine_apart(name: str, timeout: float) -> Verdict:
    """`examine` in a process of its own, which may crash or take too long."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_verdict, args=(name, there))
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            return Verdict(name, NOT_BUILT, f"it took longer than {timeout:.0f} s")
        return here.recv()
    except EOFError:
        return Verdict(name, NOT_BUILT, "its process ended")
    finally:
        process.kill()
        process.join()


def table(verdicts: Iterable[Verdict]) -> pandas.DataFrame:
    """A row a model type: the layers of its cache, small as it is, or what keeps it from attending over codes."""
    verdicts = list(verdicts)
    what = "layers of the cache" if any(verdict.layers for verdict in verdicts) else "why"
    return pandas.DataFrame(
        {
            "model type": [f"`{verdict.name}`" for verdict in verdicts],
            what: [(verdict.layers or verdict.why).replace("|", "/") for verdict in verdicts],
        }
    )


def page(verdicts: list[Verdict]) -> str:
    """The page as Markdown."""
    by_outcome = {
        outcome: [verdict for verdict in verdicts if verdict.outcome == outcome]
        for outcome in (OVER_CODES, REBUILT, REFUSED, NOT_BUILT)
    }
    results = [load_result(path) for path in sorted(Path(RESULTS).glob("stock-*.json"))]
    return render(
        TEMPLATE,
        environment=Environment.here(),
        verdicts=by_outcome,
        tables={outcome: table(some) for outcome, some in by_outcome.items()},
        worst=f"{max((verdict.error or 0 for verdict in by_outcome[OVER_CODES]), default=0.0):.0e}",
        total=len(verdicts),
        exact=f"{EXACT:.0e}",
        stock=[result for result in results if isinstance(result, QualityResult)],
        quality_table=quality_table,
        hybrids=hybrids.table(_hybrids()),
        hybrid_tokens=HYBRID_TOKENS,
    )


def _hybrids() -> dict[str, hybrids.Parts]:
    """Bytes of a small random hybrid, counted and by arithmetic, and those of a large one by arithmetic."""
    model = attach_kivi(build("qwen3_5_text").bfloat16(), backend="torch")
    return {
        "Qwen3.5, small and random: counted": hybrids.counted(model, HYBRID_TOKENS),
        "the same by arithmetic": hybrids.parts(model.config, HYBRID_TOKENS),
        "Qwen3.6-27B, 262,144 tokens, by arithmetic": hybrids.parts(
            types.SimpleNamespace(**hybrids.QWEN3_6_27B), 262_144
        ),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoders:
    """Try every decoder of the installed transformers over a KIVI cache, small and random."""

    only: tuple[str, ...] = argument((), "model types; none: all, which are then written as a page")
    timeout: float = argument(120.0, "for one model type (seconds)")
    output: str = argument(PAGE, "the page")

    def __post_init__(self) -> None:
        check_least(self.timeout, 1, "--timeout")
        unknown = sorted(set(self.only) - set(model_types()))
        if unknown:
            raise ValueError(f"transformers has no decoder {unknown[0]!r}; see transformers' AutoModelForCausalLM.")


def main(arguments: list[str] | None = None) -> int:
    """Examine, show, and write the page where all were examined."""
    flags = parse(Decoders, arguments, description=__doc__ or "")
    console = Console(stderr=True)
    names = list(flags.only) or model_types()
    verdicts = [examine_apart(name, flags.timeout) for name in track(names, console=console)]
    for verdict in verdicts:
        print(f"{verdict.name}: {verdict.outcome}{f' ({verdict.layers or verdict.why})'}")
    print(dict(collections.Counter(verdict.outcome for verdict in verdicts)))
    if not flags.only:
        Path(flags.output).write_text(page(verdicts))
        print(f"written: {flags.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
