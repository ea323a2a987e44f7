"""What an error of what a layer attended costs a model's predictions, to second order, without running the model again.

For a small error δ the KL divergence of the next-token distribution is `½ δᵀ Jᵀ (diag(p) − p pᵀ) J δ`, with `J` the derivative of
the logits and `p` their softmax: the Fisher information (Martens, arXiv 1412.1193, section 9). `u = √p ∘ z − p (√p · z)` with
normal `z` has `diag(p) − p pᵀ` as its covariance, so `½ E (g · δ)²` with the gradient `g = Jᵀ u` is the same number: one backward
pass gives `g` of all layers.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel

from modules.evaluation.recording import recording

PROBES = 2
_LOGITS = 64  # tokens whose logits are held at a time


@dataclasses.dataclass(frozen=True)
class LayerStates:
    """Of one layer and a text of `T` tokens, float32.

    Attributes:
        queries: `[H, g, T, D]` of the `g` query heads of each KV head, times the scaling of scores.
        keys, values: `[H, T, D]`.
        gradients: `[probes, H, g, T, D]` of what was attended, each for a draw of `z`.
        predictions: that the gradients are a sum over.
        rotary: channels of a head that positions rotate.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    gradients: torch.Tensor
    predictions: int
    rotary: int

    def cost(self, miss: torch.Tensor) -> float:
        """KL (nats a prediction) of an error `[H, g, T, D]` of what was attended.

        Errors of tokens count as independent of each other, which makes the estimate a mean over tokens and not over probes.
        """
        return 0.5 * (self.gradients * miss).sum((1, 2, 4)).square().sum(1).mean().item() / self.predictions


def record_layers(
    model: PreTrainedModel, input_ids: torch.Tensor, rotary: int, *, skip: int, probes: int = PROBES, seed: int = 0
) -> list[LayerStates]:
    """The states of every layer over ids `[1, T]`, with the gradients by which predictions from `skip` on move.

    Raises:
        ValueError: where some layers have no attention over all tokens.
    """
    layers = model.config.num_hidden_layers
    embeddings = model.get_input_embeddings()(input_ids.to(model.device)).detach().requires_grad_()
    with torch.enable_grad(), recording(model, range(layers)) as found:
        hidden = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    if len(found) < layers:
        raise ValueError(
            f"{layers - len(found)} of {layers} layers have no attention whose states could be recorded; bits are chosen for "
            "models all of whose layers have."
        )
    attended = [found[layer].attended for layer in range(layers)]
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.autograd.grad(hidden, attended, _probe(model, hidden.detach(), skip, generator), retain_graph=more > 0)
        for more in reversed(range(probes))
    ]
    states = []
    for layer in range(layers):
        queries, keys, values, _ = (t.detach().float() for t in found[layer])
        gradients = torch.cat([of_probe[layer] for of_probe in drawn]).float()
        shape = keys.shape[0], queries.shape[0] // keys.shape[0]
        states.append(
            LayerStates(
                queries.unflatten(0, shape), keys, values, gradients.unflatten(1, shape), keys.shape[1] - skip, rotary
            )
        )
    return states


def _probe(model: PreTrainedModel, hidden: torch.Tensor, skip: int, generator: torch.Generator) -> torch.Tensor:
    """The gradient of `Σ u · logits` by the last hidden state `[1, T, hidden_size]`, with a draw of `u` for each prediction."""
    gradient = torch.zeros_like(hidden)
    for start in range(skip, hidden.shape[1], _LOGITS):
        piece = hidden[:, start : start + _LOGITS].requires_grad_()
        with torch.enable_grad():
            logits = model.get_output_embeddings()(piece).float()
        root = logits.detach().softmax(-1).sqrt()
        z = torch.randn(root.shape, generator=generator).to(root.device)
        u = root * z - root.square() * (root * z).sum(-1, keepdim=True)
        gradient[:, start : start + _LOGITS] = torch.autograd.grad(logits, piece, u)[0]
    return gradient
