"""A small GPT in the manner of nanoGPT, with a KV cache: what the tour quantizes beside a real Llama.

Pre-norm blocks, learned positions, one key, query and value projection a head (Radford et al., "Language models are
unsupervised multitask learners", 2019). A past is a list of layers, of heads, of `(key, value)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

KeyValue = tuple[torch.Tensor, torch.Tensor]
Past = list[list[KeyValue]]


class Head(nn.Module):
    """One head of causal self-attention."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, head_size, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, past: KeyValue | None = None) -> tuple[torch.Tensor, KeyValue]:
        """Attend from the new tokens `x` [B, n, width] over `past` and themselves.

        Returns:
            What they attended to [B, n, head_size], and the keys and values of all tokens [B, T, head_size].
        """
        query, key, value = self.query(x), self.key(x), self.value(x)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
        new, seen = query.shape[1], key.shape[1]
        hidden = torch.ones(new, seen, dtype=torch.bool, device=x.device).triu(seen - new + 1)
        scores = query @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return weights @ value, (key, value)


class MultiHeadAttention(nn.Module):
    """Heads side by side, and a projection back to the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.projection = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, past: list[KeyValue] | None = None) -> tuple[torch.Tensor, list[KeyValue]]:
        """`x` [B, n, width] to the same shape, and what to keep of each head."""
        results = [head(x, None if past is None else past[number]) for number, head in enumerate(self.heads)]
        return self.projection(torch.cat([out for out, _ in results], dim=-1)), [kept for _, kept in results]


class Block(nn.Module):
    """Attention, then an MLP, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = MultiHeadAttention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, past: list[KeyValue] | None = None) -> tuple[torch.Tensor, list[KeyValue]]:
        """`x` [B, n, width] to the same shape, and what to keep of each head."""
        attended, kept = self.attention(self.attention_norm(x), past)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kept


class GPTLanguageModel(nn.Module):
    """Tokens to logits of the next ones."""

    def __init__(
        self, vocabulary: int, width: int = 128, heads: int = 2, layers: int = 3, block_size: int = 256
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, ids: torch.Tensor, past: Past | None = None, first: int = 0) -> tuple[torch.Tensor, Past]:
        """Logits [B, n, vocabulary] of the new tokens `ids` [B, n], and keys and values of all tokens so far.

        `first` is the position of the first of them, where there is no past.

        Raises:
            ValueError: where the text grows beyond `block_size` tokens.
        """
        start = first if past is None else past[0][0][0].shape[1]
        end = start + ids.shape[1]
        if end > self.block_size:
            raise ValueError(f"this model reads {self.block_size} tokens at most; got {end}. Give it a shorter text.")
        x = self.token(ids) + self.position.weight[start:end]
        kept: Past = []
        for number, block in enumerate(self.blocks):
            x, of_block = block(x, None if past is None else past[number])
            kept.append(of_block)
        return self.logits(self.norm(x)), kept

    @torch.inference_mode()
    def generate(self, ids: torch.Tensor, new_tokens: int, seed: int = 0) -> tuple[torch.Tensor, Past]:
        """Sample `new_tokens` tokens after `ids` [B, n], over a KV cache: [B, n + new_tokens], and the cache."""
        pick = torch.Generator().manual_seed(seed)
        logits, past = self(ids)
        for _ in range(new_tokens):
            new = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=pick)
            ids = torch.cat([ids, new], dim=1)
            logits, past = self(new, past)
        return ids, past


SCHEDULE = ((500, 32, 32), (60, 8, 256))  # steps, pieces a step, tokens a piece


def train(
    model: GPTLanguageModel,
    ids: torch.Tensor,
    schedule: Sequence[tuple[int, int, int]] = SCHEDULE,
    rate: float = 5e-3,
    seed: int = 0,
) -> list[float]:
    """Train on random pieces of a text `ids` [T]; the loss of each step (nats a token).

    Short pieces teach attention to look at its neighbours many times sooner than long ones do; they lie at random
    positions, so that all are known when long ones come.
    """
    pick = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    total = sum(steps for steps, _, _ in schedule)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    losses = []
    for steps, batch, length in schedule:
        for _ in range(steps):
            starts = torch.randint(len(ids) - length, (batch,), generator=pick)
            pieces = torch.stack([ids[start : start + length + 1] for start in starts.tolist()])
            first = int(torch.randint(model.block_size - length + 1, (), generator=pick))
            logits, _ = model(pieces[:, :-1], first=first)
            loss = functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            losses.append(loss.item())
    return losses
