# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a KV cache is, and what it costs
#
# A language model writes one token at a time, and each token depends on all before it. A KV cache spares it from
# reading the whole text anew for each of them. This notebook measures what that is worth, on a small real model, and
# what it costs.
#
# Every number below comes from the cell above it. `python examples/run_notebooks.py` runs the notebook again, on your
# machine.

# %%
import time

import notebook_helpers as book
import numpy as np
import torch
from common import load, offline_text, small_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from modules.cache.report import cache_bytes
from modules.evaluation.environment import Environment

book.start(threads=1, seed=0)
model, tokenizer = load(small_model("smollm2"), stock=True, dtype=torch.float32)
model.eval()
config = model.config
here = Environment.here(model)
book.say(
    f"SmolLM2: {config.num_hidden_layers} layers, {config.num_attention_heads} heads, "
    f"{config.num_key_value_heads} of them with keys and values of their own, "
    f"{config.head_dim} channels a head.  \n"
    f"Measured on: {here.machine}, {here.date}. {here.versions}."
)

# %% [markdown]
# Times are seconds of the processor, with one thread: on an idle machine they are what a clock on the wall says, and
# another program that takes the core for a while does not count.
#
# ## 1. A transformer is autoregressive
#
# 1. Each step makes **one new token**.
# 2. The new token depends on **all tokens before it**.
#
# $$ x_t \sim P_\theta(x_t \mid x_1, x_2, \ldots, x_{t-1}) $$
#
# Here is the plainest loop there is: at each step the model reads the whole text so far, and the likeliest token is
# appended. No cache.


# %%
@torch.inference_mode()
def generate_without(ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    for _ in range(new_tokens):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


prompt = tokenizer("Once upon a time, there was a", return_tensors="pt").input_ids
with book.tokens_read(model) as reads_without:
    written = generate_without(prompt, 8)

for end in range(prompt.shape[1], written.shape[1]):
    book.say(f"{tokenizer.decode(written[0, :end])} **{tokenizer.decode(written[0, end : end + 1]).strip()}**")

# %% [markdown]
# In bold what the step has made; before it what the step has read. It has read nearly all of it before.
#
# ## 2. What is computed again, and need not be
#
# In a decoder a token looks only back (the causal mask), so what a layer makes of the first tokens cannot depend on
# those that come later. The keys and values of a text, and those of the same text with a token more:

# %%
with torch.inference_mode():
    shorter = model(written[:, :-1], use_cache=True).past_key_values
    longer = model(written, use_cache=True).past_key_values

difference = max(
    float((old - new[:, :, : old.shape[2]]).norm() / old.norm())
    for a, b in zip(shorter.layers, longer.layers)
    for old, new in ((a.keys, b.keys), (a.values, b.values))
)
book.say(
    f"In all {len(longer.layers)} layers the first {written.shape[1] - 1} tokens have the same "
    f"keys and values: the largest relative difference is {difference:.0e}, where float32 "
    f"itself rounds at {torch.finfo(torch.float32).eps:.0e}."
)

# %% [markdown]
# Often one reads that the *embeddings* are computed again, and cached. What later tokens ask of earlier ones are their
# **keys** and **values**, of every layer, and nothing else: so these are what a KV cache keeps. A step then takes one
# token in, computes its own query, key and value, and attends over the stored ones.


# %%
@torch.inference_mode()
def generate_with(ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    cache, new = DynamicCache(config=config), ids
    for _ in range(new_tokens):
        logits = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        new = logits[:, -1:].argmax(-1)  # the next step reads this one token
        ids = torch.cat([ids, new], dim=1)
    return ids


with book.tokens_read(model) as reads_with:
    same = generate_with(prompt, 8)

fig, axes = book.figure(2, height=2.6)
book.draw_reads(axes[0], reads_without, same.shape[1] - 1, "without a cache")
book.draw_reads(axes[1], reads_with, same.shape[1] - 1, "with a cache")
book.caption(
    "What goes through the model in each step, counted at its first layer. Dark: computed in "
    "this step. Light: looked back at, from the cache. The first step reads the prompt either "
    "way."
)
book.say(
    f"The text is {'the same' if torch.equal(same, written) else 'NOT the same'}. Tokens that "
    f"went through the model for {len(reads_with)} new ones: {sum(reads_without)} without a "
    f"cache, {sum(reads_with)} with it."
)

# %% [markdown]
# ## 3. Generation with and without
#
# The same two loops over a longer answer.

# %%
question = tokenizer(offline_text("while"), return_tensors="pt").input_ids[:, :64]
NEW_TOKENS = 24


def seconds(function, *arguments) -> float:
    started = time.process_time()
    function(*arguments)
    return time.process_time() - started


generate_with(question, 2)  # the first calls are slower
taken = {way.__name__: seconds(way, question, NEW_TOKENS) for way in (generate_without, generate_with)}
book.say(
    f"{NEW_TOKENS} tokens after a prompt of {question.shape[1]}: "
    f"{NEW_TOKENS / taken['generate_without']:.1f} tokens/s without a cache, "
    f"{NEW_TOKENS / taken['generate_with']:.1f} with it, "
    f"{taken['generate_without'] / taken['generate_with']:.1f} times as many."
)

# %% [markdown]
# How the two grow with the length of the text is the lesson. One step, measured at growing lengths: without a cache
# the model reads all `n` tokens, with it one token over `n` stored ones. Of each step we note what **attention** takes
# (attending, and putting new keys and values into the cache) apart from **the rest** (projections, MLP, norms), which
# looks at one token at a time.

# %%
clock = book.AttentionClock(model)
LENGTHS_WITHOUT = {128: 3, 256: 3, 512: 3, 1024: 2, 2048: 2, 4096: 1}  # a length and how often it is measured
LENGTHS_WITH = {128: 15, 256: 15, 512: 15, 1024: 15, 2048: 15, 4096: 15, 8192: 15}


def step_without(n: int) -> tuple[float, float]:
    return clock.step(torch.randint(3, config.vocab_size, (1, n)))


def measure(step, lengths: dict[int, int]) -> dict[int, np.ndarray]:
    """Median seconds of a step at each length: whole, attention, the rest."""
    medians = {}
    for n, repeats in lengths.items():
        whole, attention = np.median([step(n) for _ in range(repeats)], axis=0)
        medians[n] = np.array([whole, attention, whole - attention])
    return medians


def measure_with(n: int) -> np.ndarray:
    cache, token = clock.cache(n), torch.tensor([[7]])
    return measure(lambda _: clock.step(token, cache), {n: LENGTHS_WITH[n]})[n]


without = measure(step_without, LENGTHS_WITHOUT)
with_cache = {n: measure_with(n) for n in LENGTHS_WITH}
empty_with = measure(lambda _: clock.step(torch.tensor([[7]]), clock.cache(1)), {1: 15})[1]

rows = []
for n, (step, _, _) in with_cache.items():
    slow = without[n][0] if n in without else np.nan
    rows.append(
        {
            "tokens so far": n,
            "without: s a step": slow,
            "with: s a step": step,
            "without: tokens/s": 1 / slow,
            "with: tokens/s": 1 / step,
            "times as fast": slow / step,
        }
    )
formats = ("{:,}", "{:.3f}", "{:.3f}", "{:.2f}", "{:.1f}", "{:.0f}")
table = book.table(rows, dict(zip(rows[0], formats)))

# %%
fig, axes = book.figure(2)
for name, measured in (("without", without), ("with", with_cache)):
    lengths = np.array(list(measured))
    whole, attention, rest = np.array(list(measured.values())).T
    axes[0].plot(lengths, 1 / whole, "o-", color=book.COLOURS[name], label=f"{name} a cache")
    axes[1].plot(lengths, attention, "o-", color=book.COLOURS[name], label=f"{name}: attention")
    axes[1].plot(lengths, rest, "s--", color=book.COLOURS[name], alpha=0.6, label=f"{name}: the rest")
book.log_axes(axes[0], "tokens so far", "tokens a second", list(LENGTHS_WITH))
book.log_axes(axes[1], "tokens so far", "seconds a step", list(LENGTHS_WITH))
book.caption(
    "SmolLM2. Left: speed, which falls fast without a cache and slowly with it. Right: a step "
    "in two parts, each of which becomes a straight line; its slope is the exponent."
)

# %% [markdown]
# ## 4. The exponents of one step
#
# It is said that a step costs `O(n²)` without a cache and `O(n)` with it. That is what **attention** costs: `n`
# queries over `n` keys, or one query over `n` keys. The rest costs `O(n)` without a cache and `O(1)` with it. A power
# law is a straight line between logarithms, and its exponent the slope:


# %%
def exponent(lengths, seconds) -> float:
    return float(np.polyfit(np.log(lengths), np.log(seconds), deg=1)[0])


def fitted(measured: dict[int, np.ndarray], part: int, constant: float = 0.0, least: int = 1024) -> float:
    chosen = [n for n in measured if n >= least]
    return exponent(chosen, [measured[n][part] - constant for n in chosen])


exponents = {
    "attention, with": (1, fitted(with_cache, 1, constant=empty_with[1])),
    "attention, without": (2, fitted(without, 1)),
    "the rest, with": (0, fitted(with_cache, 2)),
    "the rest, without": (1, fitted(without, 2)),
}
whole_step = {"whole step, with": fitted(with_cache, 0), "whole step, without": fitted(without, 0)}
table = book.table(
    [{"part of a step": name, "theory": power, "measured": slope} for name, (power, slope) in exponents.items()]
    + [{"part of a step": name, "theory": np.nan, "measured": slope} for name, slope in whole_step.items()],
    {"theory": "{:.0f}", "measured": "{:.2f}"},
)

# %% [markdown]
# Fitted from 1,024 tokens on; at shorter lengths the start of a call is a good part of what attention takes. From
# attention with a cache the constant is subtracted, which is what it takes over a single token: calling it once in
# each layer costs something whatever it attends over. Without a cache the exponent stays a little below 2: the kernel
# skips what the causal mask hides, but in whole blocks of up to 256 queries, so what it computes is nearer to `n·(n +
# 256)/2` than to `n²/2`.
#
# The **whole step** has another slope, and that is no mistake: it is a sum of two powers, `a + b·n` with a cache and
# `a·n + b·n²` without, and at these lengths the first term is the larger one. It is the price of reading the weights,
# or of multiplying with them. Where do the two terms meet?


# %%
def operations(config: LlamaConfig, n: int) -> tuple[float, float]:
    """Multiplications and additions of a forward over n tokens: with weights, and in (causal) attention."""
    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(config).model
    weights = sum(p.numel() for p in body.layers.parameters())
    channels = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2.0 * weights * n, 2.0 * channels * n * n  # q·k and p·v, 2 operations each, over half of the square


LLAMA_8B = LlamaConfig(  # the published shape of Llama 3 8B
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    tie_word_embeddings=False,
)
longest = max(without)
rest_a_token, attention_a_pair = without[longest][2] / longest, without[longest][1] / longest**2
meet = {}
for name, shape in (("SmolLM2", config), ("8B", LLAMA_8B)):
    with_weights, in_attention = operations(shape, 1)
    meet[name] = with_weights / in_attention
book.say(
    f"By counting operations attention catches up with the weights at {meet['SmolLM2']:,.0f} "
    f"tokens in SmolLM2 and at {meet['8B']:,.0f} in a Llama of 8B; by the times above at about "
    f"{rest_a_token / attention_a_pair:,.0f} tokens in SmolLM2. Below, a step without a cache "
    "is nearly *linear*, and one with a cache nearly *constant*. Both statements on `O(…)` "
    "are true of lengths far beyond that."
)

# %% [markdown]
# ## 5. A whole sequence: `n²` and `n³`
#
# To generate `n` tokens is to take `n` steps: the sum of `1 + 2 + … + n` grows as `n²`, that of `1 + 4 + … + n²` as
# `n³`. SmolLM2 would need far longer texts to show it (see above where its attention begins to count), so here is a
# model that is little but attention: one layer, narrow, wide in its heads. It generates for real, every step timed.
# There is no causal mask in it: the last token sees all others with or without one, and in a single layer nothing else
# depends on it.


# %%
class OneLayer(nn.Module):
    """Tokens in, logits of the next one out; `stored` [2, 1, heads, capacity, head_dim] is its KV cache."""

    def __init__(self, vocabulary: int = 64, width: int = 16, heads: int = 2, head_dim: int = 64) -> None:
        super().__init__()
        self.shape = (3, heads, head_dim)
        self.embedding = nn.Embedding(vocabulary, width)
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)
        self.logits = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor, stored: torch.Tensor | None = None, n: int = 0) -> torch.Tensor:
        x = self.embedding(ids)
        query, key, value = self.qkv(x).unflatten(-1, self.shape).permute(2, 0, 3, 1, 4)
        if stored is not None:
            stored[:, :, :, n] = torch.stack([key[:, :, 0], value[:, :, 0]])
            key, value = stored[:, :, :, : n + 1]
        attended = scaled_dot_product_attention(query, key, value)
        return self.logits((x + self.out(attended.transpose(1, 2).flatten(2)))[:, -1])


@torch.inference_mode()
def seconds_of_steps(model: OneLayer, tokens: int, cached: bool) -> np.ndarray:
    """Generate `tokens` tokens; the seconds of every step."""
    _, heads, head_dim = model.shape
    stored = torch.zeros(2, 1, heads, tokens, head_dim) if cached else None
    ids, steps = torch.zeros(1, 1, dtype=torch.long), []
    for n in range(tokens):
        started = time.process_time()
        logits = model(ids[:, -1:], stored, n) if cached else model(ids)
        steps.append(time.process_time() - started)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return book.rolling_median(np.array(steps))


one_layer = OneLayer()
seconds_of_steps(one_layer, 64, cached=True)  # the first calls are slower
runs = {
    "with": np.median([seconds_of_steps(one_layer, 8192, cached=True) for _ in range(3)], axis=0),
    "without": seconds_of_steps(one_layer, 1792, cached=False),
}
FIT_FROM = {"with": 2048, "without": 768}
THEORY = {"with": (1, 2), "without": (2, 3)}

# %% [markdown]
# The constant of a step, the same for both (the calls of Python and PyTorch, with nothing to attend over yet), is what
# the first steps take. It is subtracted, and the rest fitted from where attention outweighs it.

# %%
fig, axes = book.figure(2)
for name, steps in runs.items():
    lengths = np.arange(1, len(steps) + 1)
    own = steps - runs["with"][:16].min()
    late = lengths >= FIT_FROM[name]
    of_step = exponent(lengths[late], own[late])
    of_all = exponent(lengths[late], np.cumsum(own)[late])
    exponents[f"one layer: a step, {name}"] = (THEORY[name][0], of_step)
    exponents[f"one layer: n tokens, {name}"] = (THEORY[name][1], of_all)
    axes[0].plot(
        lengths[30:],
        steps[30:] * 1e3,
        color=book.COLOURS[name],
        label=f"{name}: fits n^{of_step:.2f}, theory {THEORY[name][0]}",
    )
    axes[1].plot(
        lengths[30:],
        np.cumsum(steps)[30:],
        color=book.COLOURS[name],
        label=f"{name}: fits n^{of_all:.2f}, theory {THEORY[name][1]}",
    )
book.log_axes(axes[0], "tokens so far", "milliseconds of a step")
book.log_axes(axes[1], "tokens n", "seconds for all n tokens")
book.caption(
    "The one-layer model, generating. Left: each step. Right: all steps so far. Straight at "
    "the end, where attention is all."
)

table = book.table(
    [
        {"what": name, "theory": power, "measured": slope}
        for name, (power, slope) in exponents.items()
        if "layer" in name
    ],
    {"measured": "{:.2f}"},
)

# %% [markdown]
# ## 6. Quiz
#
# **Generating not one token but a sequence of `n` tokens *with* a KV cache: what is the complexity in computation?**
# `O(1)`, `O(n)`, `O(n²)` or `O(n³)`?
#
# **And *without* a KV cache?** `O(n)`, `O(n²)`, `O(n³)` or `O(n⁴)`?
#
# The answers, chosen by the measured slopes:

# %%
CHOICES = {"with": ("O(1)", "O(n)", "O(n²)", "O(n³)"), "without": (None, "O(n)", "O(n²)", "O(n³)", "O(n⁴)")}
for name, choices in CHOICES.items():
    power, slope = exponents[f"one layer: n tokens, {name}"]
    step_power = exponents[f"one layer: a step, {name}"][0]
    answer = choices[round(slope)]
    verdict = "as theory has it" if round(slope) == power else f"theory says {choices[power]}: measure again"
    book.say(
        f"{name.capitalize()} a cache: **{answer}** (slope {slope:.2f}), {verdict}. If a token "
        f"costs {choices[step_power]}, then n tokens cost n times as much, up to a factor."
    )

# %% [markdown]
# ## 7. How many times slower without, and where is it a hundred, a thousand?
#
# Both steps of SmolLM2 as sums of their parts, fitted to what was measured: `a·n + b·n²` without a cache, `c + d·n`
# with it.


# %%
def fit(measured: dict[int, np.ndarray], powers: tuple[int, int]) -> np.ndarray:
    """The factors of two powers of n, by least squares of the relative error of the whole step."""
    n, whole = np.array(list(measured), dtype=float), np.array([m[0] for m in measured.values()])
    return np.linalg.lstsq(np.stack([n**p for p in powers], 1) / whole[:, None], np.ones(len(n)), rcond=None)[0]


a, b = fit(without, (1, 2))
c, d = fit(with_cache, (0, 1))


def times_slower(n):
    return (a * n + b * n**2) / (c + d * n)


def how_known(n: float) -> str:
    if min(without) <= n <= max(without):
        return "fitted between lengths that were measured"
    context = config.max_position_embeddings
    return "extrapolated" + (f"; beyond the model's context of {context:,}" if n > context else "")


ratios = {n: without[n][0] / with_cache[n][0] for n in without}
grid = np.geomspace(min(without), 200_000, 4000)
inside, beyond = grid[grid <= max(without)], grid[grid >= max(without)]
reached = {times: grid[np.argmax(times_slower(grid) >= times)] for times in (10, 100, 1000)}

fig, axes = book.figure(1, width=7)
axes[0].plot(list(ratios), list(ratios.values()), "o", color=book.COLOURS["without"], label="measured")
axes[0].plot(inside, times_slower(inside), color=book.COLOURS["grey"], label="fitted")
axes[0].plot(beyond, times_slower(beyond), ":", color=book.COLOURS["grey"], label="extrapolated")
book.log_axes(axes[0], "tokens so far", "times slower without a cache", (128, 1024, 8192, 65536))
book.caption("SmolLM2, one step: seconds without a cache over seconds with it.")

table = book.table(
    [{"times slower": t, "from tokens": n, "how it is known": how_known(n)} for t, n in reached.items()],
    {"times slower": "{:,}", "from tokens": "{:,.0f}"},
)
longest = max(ratios)
book.say(
    f"At {longest:,} tokens, the longest that was measured both ways, a token without a cache "
    f"takes {ratios[longest]:.0f} times as long."
)

# %% [markdown]
# Two to three orders of magnitude, as is often said: the length decides which.
#
# ## 8. Memory against computation
#
# The cache buys this with memory: two states (a key, a value) of each KV head, in each layer, for each token. By
# arithmetic, and counted from the tensors of a real cache:

# %%
DTYPE_BYTES = 4  # float32, as this model runs here


def bytes_a_token(config: LlamaConfig, element_bytes: int) -> int:
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element_bytes


counted = sum(t.nbytes for layer in longer.layers for t in (layer.keys, layer.values))
book.say(
    f"SmolLM2 in float32: {bytes_a_token(config, DTYPE_BYTES):,} bytes a token. For "
    f"{written.shape[1]} tokens that makes "
    f"{bytes_a_token(config, DTYPE_BYTES) * written.shape[1]:,} bytes; the cache above has "
    f"{counted:,}."
)

fig, axes = book.figure(1, width=7)
for name, cached, measured in (("without", 0, without), ("with", 1, with_cache)):
    megabytes = [cached * bytes_a_token(config, DTYPE_BYTES) * n / 1e6 for n in measured]
    milliseconds = [m[0] * 1e3 for m in measured.values()]
    axes[0].plot(megabytes, milliseconds, "o-", color=book.COLOURS[name], label=f"{name} a cache")
    for n, x, y in list(zip(measured, megabytes, milliseconds))[cached * 3 :]:
        axes[0].annotate(f"{n:,}", (x, y), textcoords="offset points", xytext=(7, 5), fontsize=8)
axes[0].set(yscale="log", xlabel="megabytes of cache", ylabel="milliseconds a step")
axes[0].legend()
book.caption("SmolLM2, the trade: memory on one axis, time on the other; beside each point the tokens so far.")

# %% [markdown]
# ### The example of 8 billion parameters
#
# A Llama 3 of 8B at 100,000 tokens, 16 bits an element, and the same cache at 2 bits as this project stores it (keys
# per channel, values per token; the newest 128 tokens and the first 4 in full precision).

# %%
TOKENS = 100_000
SHAPE = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}
with torch.device("meta"):
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(LLAMA_8B).parameters())
sizes = {bits: cache_bytes(TOKENS, **SHAPE, k_bits=bits, v_bits=bits) for bits in (8, 4, 2)}
dense = sizes[2]["dense"]
table = book.table(
    [{"what": "weights, 16 bits", "GB": 2 * parameters / 1e9, "GiB": 2 * parameters / 2**30, "times smaller": np.nan}]
    + [{"what": "cache, 16 bits", "GB": dense / 1e9, "GiB": dense / 2**30, "times smaller": 1.0}]
    + [
        {"what": f"cache, {bits} bits", "GB": s["total"] / 1e9, "GiB": s["total"] / 2**30, "times smaller": s["ratio"]}
        for bits, s in sizes.items()
    ],
    {"GB": "{:.2f}", "GiB": "{:.2f}", "times smaller": "{:.2f}"},
)
prose = offline_text("while", "for", "with", "try")
characters = len(prose) / len(tokenizer(prose).input_ids)
book.say(
    f"{dense / 1e9:.1f} GB, beside weights of {2 * parameters / 1e9:.1f} GB: that is the *13 "
    f"GB* of this well-known example, and 2 bits make {sizes[2]['total'] / 1e9:.2f} GB of it. "
    f"Not an eighth, as 16 : 2 suggests, but 1 : {sizes[2]['ratio']:.1f}: each group of codes "
    "has a scale and a minimum. How long is such a text? With SmolLM2's tokenizer a token of "
    f"plain English has {characters:.1f} characters, so {TOKENS:,} tokens are about "
    f"{TOKENS * characters / 3000:.0f} pages of 3,000 characters."
)

# %% [markdown]
# And how many times slower would *this* model be without a cache? Not measured: estimated from peak figures of an H100
# (NVIDIA's data sheet: 989 TFLOP/s in bfloat16, 3.35 TB/s). Without a cache a step is bound by its operations, with
# one by the bytes it reads, weights and cache. Real kernels reach less than either peak.

# %%
FLOPS, BANDWIDTH = 989e12, 3.35e12
read = 2 * (parameters - LLAMA_8B.vocab_size * LLAMA_8B.hidden_size)  # one row of the embedding is read, not all
table = book.table(
    [
        {
            "tokens": n,
            "without a cache: s": sum(operations(LLAMA_8B, n)) / FLOPS,
            "16-bit cache: ms": (read + cache_bytes(n, **SHAPE)["dense"]) / BANDWIDTH * 1e3,
            "2-bit cache: ms": (read + cache_bytes(n, **SHAPE)["total"]) / BANDWIDTH * 1e3,
        }
        for n in (1_000, 10_000, 100_000)
    ],
    {"tokens": "{:,}", "without a cache: s": "{:.3f}", "16-bit cache: ms": "{:.2f}", "2-bit cache: ms": "{:.2f}"},
)
slower = table["without a cache: s"] / table["16-bit cache: ms"] * 1e3
book.say(
    "Times slower without a cache, estimated: "
    + ", ".join(f"{times:.0f} at {n:,} tokens" for n, times in zip(table["tokens"], slower))
    + ". *Two to three orders of magnitude* is right for long texts, and too much for short ones."
)

# %% [markdown]
# ## 9. Does a KV cache make training faster?
#
# In short: no. In training the text is there from the start. One forward predicts every next token of it at once, each
# from the tokens before it (teacher forcing): nothing is computed twice, so there is nothing to spare. With a cache
# the same predictions would come one after another. Second, each update changes the weights, and keys and values of
# the old weights are then wrong. Both measured:

# %%
lesson = tokenizer(prose, return_tensors="pt").input_ids[:, :48]


@torch.inference_mode()
def all_at_once() -> torch.Tensor:
    return model(lesson, use_cache=False).logits


@torch.inference_mode()
def one_after_another() -> torch.Tensor:
    cache = DynamicCache(config=config)
    steps = [model(token, past_key_values=cache, use_cache=True).logits for token in lesson.split(1, dim=1)]
    return torch.cat(steps, dim=1)


logits, one_by_one = all_at_once(), one_after_another()
at_once, in_turn = (np.median([seconds(way) for _ in range(3)]) for way in (all_at_once, one_after_another))
book.say(
    f"All {lesson.shape[1]} predictions are the same (relative difference "
    f"{float((logits - one_by_one).norm() / logits.norm()):.0e}). Processor time: "
    f"{at_once:.2f} s at once, {in_turn:.2f} s one after another with a cache, "
    f"{in_turn / at_once:.1f} times as much."
)

# %%
with torch.inference_mode():
    old = model(lesson, use_cache=True).past_key_values.layers[-1].keys.clone()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)  # a usual rate where a model is fine-tuned
loss = model(lesson, labels=lesson, use_cache=False).loss
loss.backward()
optimizer.step()
with torch.inference_mode():
    new = model(lesson, use_cache=True).past_key_values.layers[-1].keys
stale = float((new - old).norm() / new.norm())
book.say(
    "One step of AdamW later the last layer's keys of the same text have moved by "
    f"{stale:.2%}, and they go on moving with every step."
)

# %% [markdown]
# Where training itself *generates*, as reinforcement learning does, that part uses a cache as any generation does.
#
# ## What to take along

# %%
worst = max(abs(slope - power) for power, slope in exponents.values())
book.say(
    f"- A step's attention grows as n^{exponents['attention, with'][1]:.2f} with a cache and "
    f"n^{exponents['attention, without'][1]:.2f} without; n tokens as "
    f"n^{exponents['one layer: n tokens, with'][1]:.2f} and "
    f"n^{exponents['one layer: n tokens, without'][1]:.2f}. The largest distance of a fitted "
    f"exponent from theory is {worst:.2f}.\n"
    f"- SmolLM2 is 100 times slower without a cache at {reached[100]:,.0f} tokens, 1,000 times "
    f"at {reached[1000]:,.0f} (extrapolated).\n"
    f"- The price is memory: {bytes_a_token(LLAMA_8B, 2) / 1024:.0f} KiB a token for Llama 3 "
    f"8B, {dense / 1e9:.1f} GB at {TOKENS:,} tokens, {sizes[2]['total'] / 1e9:.2f} GB at 2 "
    "bits.\n"
    "- How two bits can be enough is the subject of [the tour](quantized_cache_tour.ipynb)."
)
