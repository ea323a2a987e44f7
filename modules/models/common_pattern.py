"""Whether a stock model attends in the way that a KIVI cache needs, found out by reading it, before anything is changed.

Decoders of transformers follow one pattern: a layer projects, calls `past_key_values.update(...)` and then the attention
function that is registered under the config's implementation. What it passes to that function beside queries, keys and
values is in its source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from modules.models.attention import ARGUMENTS
from modules.models.causal_lm import CachingMixin
from modules.options import head_dims_of

_FEATURES = {  # arguments of attention functions: what they are called
    "softcap": "a soft cap on attention logits",
    "s_aux": "attention sinks as logits",
    "sinks": "attention sinks as logits",
    "position_bias": "a bias by position",
    "indices": "attention to a selection of tokens",
    "block_indices": "attention to a selection of blocks",
}


def decoder_of(model: Any) -> Any:
    """The decoder of a model that generates: what its head, or the model of images around it, runs."""
    decoder = model.get_decoder()
    while isinstance(decoder, PreTrainedModel) and decoder.can_generate():
        inner = [child for child in decoder.children() if isinstance(child, PreTrainedModel)]
        if len(inner) != 1:
            break
        decoder = inner[0]
    return decoder


def check_attachable(model: Any) -> None:
    """Raise `ValueError` for a model that cannot attend over codes, naming what keeps it from that."""
    why = why_not(model)
    if why is not None:
        raise ValueError(f"{type(model).__name__} cannot attend over a KIVI cache: {why}.")


def why_not(model: Any) -> str | None:
    """What keeps a model from attending over codes; None where nothing does."""
    if not isinstance(model, PreTrainedModel):
        return "it is no PreTrainedModel; where it wraps one (peft, torch.compile), attach to the model within"
    if isinstance(model, CachingMixin):
        return "it has one already; detach_kivi() takes off what attach_kivi() put on"
    if model.config.is_encoder_decoder:
        return "it is an encoder and a decoder, and the latter also attends to the former"
    if not model.can_generate():
        return "it does not generate; load it with its head, by AutoModelForCausalLM"
    decoder = decoder_of(model)
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        return "its decoder is not a model of its own"
    if decoder.config is not model.config.get_text_config(decoder=True):
        return "its decoder has another config than the one that it names"
    return _why_not_passed_on(model, decoder) or _why_not_config(decoder.config) or _why_not_attention(decoder)


def _why_not_passed_on(model: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    around = model.base_model
    if decoder is not around and "mask_mapping" in _source_of(type(around).forward):
        return f"{type(around).__name__} makes the masks of its decoder itself"
    for part in (model, decoder):
        name = type(part).__name__
        replaced = vars(part).get("forward", type(part).forward)
        if getattr(replaced, "__func__", replaced) is not type(part).forward and "_hf_hook" not in vars(part):
            return f"the forward of this {name} was replaced; attach first and replace it then"
        parameters = inspect.signature(type(part).forward).parameters
        if "past_key_values" not in parameters and part is decoder:
            return f"{name}.forward() takes no past_key_values"
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return f"{name}.forward() takes no further arguments (**kwargs)"
    return None


def _why_not_config(config: Any) -> str | None:
    layers = DynamicCache(config=config).layers
    if layers and not _full_layers(config):
        kinds = sorted({type(layer).__name__.removeprefix("Dynamic").removesuffix("Layer") for layer in layers})
        return f"none of its layers attends to all tokens ({', '.join(kinds)})"
    if getattr(config, "kv_lora_rank", None):
        return f"it has multi-head latent attention (kv_lora_rank={config.kv_lora_rank})"
    value_size, key_sizes = getattr(config, "v_head_dim", None), head_dims_of(config)
    if value_size not in (None, *key_sizes):
        return f"its values have other heads than its keys (v_head_dim={value_size}, head_dim={key_sizes[0]})"
    return None


def _full_layers(config: Any) -> set[int]:
    """Numbers of the layers that a KIVI cache packs."""
    return {i for i, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer}


def _why_not_attention(decoder: PreTrainedModel) -> str | None:
    full, found = _full_layers(decoder.config), False
    for module in decoder.modules():
        module_class: Any = type(module)
        forward = _attention_forward(module_class)
        found = found or forward is not None
        if hasattr(module, "create_position_ids_from_input_ids"):
            return f"{module_class.__name__} counts positions from its padding token on"
        if forward is None:
            continue
        if getattr(module, "is_causal", True) is False:
            return f"{module_class.__name__} is not causal, so it is no decoder"
        for name, value in (keyword for call in forward.calls for keyword in _keywords(call)):
            if name not in ARGUMENTS and not _is_off(module, value):
                what = _FEATURES.get(name, "something that changes attention")
                return f"{module_class.__name__} passes {name}= to its attention, {what}"
        if forward.changes_states and getattr(module, "layer_idx", None) in full:
            return f"{module_class.__name__} changes keys or values after they are stored"
    return None if found else "its attention is not among transformers' attention functions"


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The forward of an attention module, as it is written.

    Attributes:
        calls: of an attention function.
        changes_states: such a function gets other keys or values than the cache gave back.
    """

    calls: tuple[ast.Call, ...]
    changes_states: bool


@functools.cache
def _attention_forward(module_class: Any) -> _Forward | None:
    """The forward of a module that calls transformers' attention functions, None of any other."""
    source = _source_of(module_class.forward)
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        return None
    nodes = list(ast.walk(ast.parse(source)))
    calls = tuple(node for node in nodes if isinstance(node, ast.Call) and _is_attention(node.func))
    return _Forward(calls, any(_changes_states(nodes, call) for call in calls))


def _source_of(function: Any) -> str:
    """What a function is written as; nothing where that cannot be read."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""


def _is_attention(function: ast.expr) -> bool:
    return isinstance(function, ast.Name) and "attention" in function.id


def _changes_states(nodes: list[ast.AST], call: ast.Call) -> bool:
    """Whether keys or values come from elsewhere than the last assignment of what `update()` of the cache gave back."""
    stored = [
        (node.lineno, [name.id for name in target.elts if isinstance(name, ast.Name)])
        for node in nodes
        if isinstance(node, ast.Assign) and ".update(" in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Tuple)
    ]
    if not stored or len(call.args) < 4:
        return False
    line, names = stored[0]
    if [ast.unparse(argument) for argument in call.args[2:4]] != names:
        return True
    between = (node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return any(line < node.lineno < call.lineno and node.id in names for node in between)


def _keywords(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    return ((keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg is not None)


def _is_off(module: nn.Module, value: ast.expr) -> bool:
    """Whether an argument is None or False: as it is written, or as an attribute of the module."""
    if isinstance(value, ast.Constant):
        return value.value is None or value.value is False
    if not ast.unparse(value).startswith("self."):
        return False
    found: Any = module
    for name in ast.unparse(value).split(".")[1:]:
        found = getattr(found, name, module)  # `module` where it is more than a chain of attributes
    return found is None or found is False
