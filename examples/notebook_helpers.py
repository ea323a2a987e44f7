"""What the two notebooks use beside their lesson: figures, tables, clocks, and ears inside a model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib import pyplot
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

COLOURS = {"without": "#c44e52", "with": "#4c72b0", "other": "#55a868", "grey": "#777777"}


def start(threads: int = 1, seed: int = 0) -> None:
    """A fixed seed, `threads` threads, and figures on white, so that they can be read on a dark page."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    pyplot.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.dpi": 96,
            "font.size": 10,
            "legend.frameon": False,
        }
    )


def say(text: str) -> None:
    """Show a sentence of Markdown: a conclusion with the numbers of this run."""
    display(Markdown(text))


def code(source: str) -> None:
    """Show Python source."""
    display(Markdown(f"```python\n{source}\n```"))


def table(rows: Sequence[dict[str, Any]], formats: dict[str, str] | None = None) -> pd.DataFrame:
    """Show rows as a table, columns by their `formats` ("{:.1f}"); the table as numbers."""
    frame = pd.DataFrame(rows)
    shown = frame.astype(object)
    for column, form in (formats or {}).items():
        shown[column] = ["" if pd.isna(value) else form.format(value) for value in frame[column]]
    display(_Html(shown))
    return frame


class _Html:
    """A table without the numbers of its rows."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def _repr_html_(self) -> str:
        return self.frame.to_html(index=False, border=0)

    def __repr__(self) -> str:
        return self.frame.to_string(index=False)


def figure(columns: int = 1, width: float = 5.0, height: float = 3.5, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, an array `[columns]` or `[rows, columns]`."""
    made, axes = pyplot.subplots(rows, columns, figsize=(columns * width, rows * height), layout="constrained")
    return made, np.atleast_1d(axes)


def caption(text: str) -> None:
    """Show the figure that was drawn, and its caption below."""
    pyplot.show()
    display(Markdown(f"*{text}*"))


def log_axes(axis: Any, x: str, y: str, ticks: Sequence[float] = ()) -> None:
    """Make both axes logarithmic, with labels; `ticks` of the first."""
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    if len(ticks):
        axis.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    axis.legend()


def draw_reads(axis: Any, reads: Sequence[int], total: int, title: str) -> None:
    """A row a step, a column a position of the text: dark where the step computes, light where it only looks back."""
    grid = np.full((len(reads), total), np.nan)
    for step, count in enumerate(reads):
        end = total - len(reads) + step + 1
        grid[step, :end] = 0.3
        grid[step, end - count : end] = 1.0
    axis.imshow(grid, cmap="Blues", vmin=0, vmax=1.1, aspect="auto", interpolation="nearest")
    axis.set(title=title, xlabel="position in the text", ylabel="step")
    axis.grid(False)


class AttentionClock:
    """Processor seconds that a model spends in attention: over its cache, and in putting new states into it.

    The model runs as it is; its attention function and its cache's `update` are wrapped.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.seconds = model, 0.0
        AttentionInterface.register("clocked", self._timed(sdpa_attention_forward))
        model.set_attn_implementation("clocked")

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            result = function(*arguments, **options)
            self.seconds += time.process_time() - started
            return result

        return timed

    def cache(self, tokens: int) -> DynamicCache:
        """A cache of random states of `tokens` tokens: how long a step takes does not depend on what they are."""
        config = self.model.config
        cache = DynamicCache(config=config)
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        cache.update = self._timed(cache.update)
        return cache

    def step(self, ids: torch.Tensor, cache: DynamicCache | None = None) -> tuple[float, float]:
        """Seconds of one forward of the tokens `[1, n]`, and those of them that attention took."""
        self.seconds, started = 0.0, time.process_time()
        with torch.inference_mode():
            self.model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        return time.process_time() - started, self.seconds


@contextlib.contextmanager
def tokens_read(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens go into a model, forward by forward."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counts.append(ids[0].shape[1]))
    try:
        yield counts
    finally:
        hook.remove()


@contextlib.contextmanager
def attention_inputs(model: PreTrainedModel) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Queries, keys and values `[1, heads, tokens, head_dim]` of each layer of a model under "sdpa", as attention gets them."""
    caught: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def listen(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        caught.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    AttentionInterface.register("listening", listen)
    before = model.config._attn_implementation
    model.set_attn_implementation("listening")
    try:
        yield caught
    finally:
        model.set_attn_implementation(before)


def rolling_median(values: np.ndarray, width: int = 31) -> np.ndarray:
    """Each of `values` `[n]` replaced by the median of the `width` around it: what disturbed single ones is gone."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=-1)


def heat_maps(pictures: dict[str, torch.Tensor]) -> None:
    """Heat maps of the magnitudes of states `[tokens, channels]`, side by side; the first 4 tokens do not set the colours."""
    _, axes = figure(len(pictures), width=3.0, height=3.6)
    for axis, (title, states) in zip(axes, pictures.items()):
        size = states.abs().numpy()
        image = axis.imshow(size, aspect="auto", cmap="magma", vmax=size[4:].max(), interpolation="nearest")
        axis.set(title=title, xlabel="channel", ylabel="token")
        axis.grid(False)
        axis.figure.colorbar(image, ax=axis)
