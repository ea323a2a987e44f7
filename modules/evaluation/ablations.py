"""Ways to store keys and values compared on the recorded states of a model: fast, as no model runs again for each of them.

Queries, keys and values of a text are recorded from a full-precision forward. Each variant then stores keys or values of a
layer alone, and what that does to the layer's attention output, behind the output projection, is compared. That ranks
variants; what one costs a model is a matter of its predictions (`modules/evaluation/quality.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modules.evaluation.environment import Environment
from modules.evaluation.recording import Recorded, recording
from modules.evaluation.results import BenchmarkResult
from modules.evaluation.texts import digest, encode, load_text
from modules.evaluation.variants import FIRST, States, Variant, key_variants, value_variants
from modules.options import KIVIOptions

NAME = "ablations"
SKIP = 512
_OPTIONS = KIVIOptions()


def record(model: PreTrainedModel, input_ids: torch.Tensor, wanted: Sequence[int]) -> dict[int, Recorded]:
    """The states of the layers `wanted` over ids `[1, T]`, by layer."""
    with torch.inference_mode(), recording(model, wanted) as found:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    return found


def states_of(model: PreTrainedModel, layer: int, recorded: Recorded) -> States:
    """What variants are given of a layer."""
    query, key, value, _ = recorded
    weight = model.model.layers[layer].self_attn.o_proj.weight.float()
    shape = key.shape[0], query.shape[0] // key.shape[0]
    return States(query.unflatten(0, shape), key, value, weight.T.unflatten(0, (*shape, query.shape[2])))


def measure(states: States, variant: Variant, skip: int = SKIP) -> float:
    """The squared relative error of the attention output of tokens from `skip` on with one side stored by `variant`.

    Sinks and the newest tokens stay as they are. With a `correction` scores of stored keys grow by that share of half the
    variance that rounding adds to them: the mean of an exponential is larger than that of its exponent.
    """
    tokens, sinks = states.keys.shape[1], _OPTIONS.sink_length
    whole = (tokens - sinks) // FIRST * FIRST + sinks  # groups of every size fit
    packed = slice(sinks, whole)
    cut = States(states.queries[:, :, packed], states.keys[:, packed], states.values[:, packed], states.projection)
    stored = (states.keys if variant.side == "keys" else states.values).clone()
    stored[:, packed] = variant.fake(cut)
    position = torch.arange(tokens)
    distance = position[:, None] - position
    far = (distance >= _OPTIONS.residual_length) & (position >= sinks) & (position < whole)
    scores = (states.queries @ states.keys.transpose(1, 2).unsqueeze(1)).masked_fill(distance < 0, -torch.inf)
    exact = scores.softmax(-1) @ states.values.unsqueeze(1)
    if variant.side == "keys":
        found = _with_stored(scores, stored, states, variant, far).softmax(-1) @ states.values.unsqueeze(1)
    else:
        found = exact + (scores.softmax(-1) * far) @ (stored - states.values).unsqueeze(1)
    miss, whole_output = (
        torch.einsum("hgtd,hgdx->tx", out[:, :, skip:], states.projection) for out in (found - exact, exact)
    )
    return (miss.square().sum() / whole_output.square().sum()).item()


def _with_stored(
    scores: torch.Tensor, stored: torch.Tensor, states: States, variant: Variant, far: torch.Tensor
) -> torch.Tensor:
    """Scores `[H, g, T, T]` where far keys are those that are stored."""
    found = states.queries @ stored.transpose(1, 2).unsqueeze(1)
    if variant.correction:
        noise = (stored - states.keys).square().mean(1)[:, None, None]
        found += variant.correction / 2 * (states.queries.square() * noise).sum(-1, keepdim=True)
    return torch.where(far, found, scores)


def ablations(
    path: str, text: str, tokens: int, layers: int, progress: Callable[[str], None] | None = None
) -> BenchmarkResult:
    """Measure every variant on `layers` layers of a model, equally far apart, over the first `tokens` tokens of a text.

    Raises:
        ValueError: for a text that is shorter, or too few tokens or layers.
    """
    if tokens < SKIP + FIRST or layers < 1:
        raise ValueError(f"tokens must be at least {SKIP + FIRST} and layers 1; got {tokens} and {layers}.")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = encode(AutoTokenizer.from_pretrained(path), load_text(text), tokens, text)
    count = model.config.num_hidden_layers
    wanted = sorted({round((i + 0.5) * count / layers - 0.5) for i in range(min(layers, count))})
    recorded = record(model, ids, wanted)
    with torch.inference_mode():
        rows = list(_rows([states_of(model, layer, recorded[layer]) for layer in wanted], progress))
    settings = {"model": Path(path).name, "text": text, "tokens": tokens, "layers": wanted, "digest": digest(ids)}
    return BenchmarkResult(NAME, rows, Environment.here(model), settings)


def _rows(layers: list[States], progress: Callable[[str], None] | None) -> Iterator[dict]:
    head_dim = layers[0].keys.shape[2]
    for variants in (key_variants(head_dim), value_variants(head_dim)):
        base = None
        for variant in variants:
            error = sum(measure(states, variant) for states in layers) / len(layers)
            base = base or error
            row = {"side": variant.side, "variant": variant.name, "stored_bits": variant.bits}
            yield {**row, "error": error, "of_base": error / base}
            if progress is not None:
                progress(variant.name)
