"""Models with weights of other kinds, to measure a step by; what it costs in quality is not this project's subject."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel


def in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose linear layers, its head included, have int8 weights with a scale a row (torchao); changed in place.

    Raises:
        ValueError: without torchao, saying how to get it.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("int8 weights need torchao: `pip install 'kivi-kv-cache[weights]'`.") from error
    quantize_(model, Int8WeightOnlyConfig())
    return model


WEIGHTS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {"full": lambda model: model, "int8": in_int8}
