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
# # A tour of quantized KV caches, on two tracks
#
# While a model generates, it keeps the keys and values of all tokens so far: the KV cache ([the
# lesson](kv_cache_lesson.ipynb) says why). In large models and long texts it is as large as the weights. Here we
# quantize it, in a nanoGPT that can be read in five minutes and in a real Llama, first only pretending, then with
# codes that are stored.
#
# Every number below comes from the cell above it. `python examples/run_notebooks.py` runs the notebook again, on your
# machine.

# %%
import inspect
import string

import notebook_helpers as book
import numpy as np
import torch
from common import load, offline_text, small_model
from nano_gpt import GPTLanguageModel, Head, train
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from modules.cache.report import nominal_bits
from modules.codecs.grouped import dequantize_keys, dequantize_values, quantize_keys, quantize_values
from modules.evaluation.candidates import PAPER_OPTIONS
from modules.evaluation.environment import Environment
from modules.options import KIVIOptions

book.start(threads=1, seed=0)
llama, tokenizer = load(small_model("smollm2"), stock=True, dtype=torch.float32)
llama.eval()
config = llama.config
here = Environment.here(llama)
book.say(
    f"The Llama: SmolLM2, {config.num_hidden_layers} layers, {config.num_key_value_heads} KV "
    f"heads of {config.head_dim} channels.  \n"
    f"Measured on: {here.machine}, {here.date}. {here.versions}."
)

# %% [markdown]
# ## 1. The problem
#
# It is said that a model of 7B takes 14 GB in FP16, and its cache at 32k tokens as much again. By arithmetic, from the
# shapes as published:

# %%
TOKENS = 32_768
SHAPES = {
    "Llama 2 7B (a KV head for each head)": LlamaConfig(),  # transformers' defaults are its shape
    "Llama 3 8B (a KV head for 4 heads)": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256
    ),
}
rows = []
for name, shape in SHAPES.items():
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
    heads = {"num_key_value_heads": shape.num_key_value_heads, "head_dim": shape.head_dim}
    size = book.cache_bytes(TOKENS, num_hidden_layers=shape.num_hidden_layers, **heads)
    rows.append(
        {
            "model": name,
            "weights, GB": weights / 1e9,
            "cache, 16 bits, GB": size["dense"] / 1e9,
            "cache, 2 bits, GB": size["total"] / 1e9,
        }
    )
problem = book.table(rows, dict.fromkeys(list(rows[0])[1:], "{:.1f}"))
book.say(
    f"True, and rather more than as much: {rows[0]['cache, 16 bits, GB']:.1f} GB beside "
    f"{rows[0]['weights, GB']:.1f}. Models that share a KV head among several heads need "
    f"{rows[0]['cache, 16 bits, GB'] / rows[1]['cache, 16 bits, GB']:.0f} times less: with "
    "them a longer text, or a batch, brings the problem back."
)

# %% [markdown]
# ## 2. Pretending to quantize
#
# The simplest scheme is symmetric and goes **by token**: the vector of one token in one head is divided by a scale, so
# that its largest channel becomes the largest code, and rounded. Multiplied back, it is what a quantized cache would
# give; the tensor itself stays as large as it was.


# %%
def by_token(states: torch.Tensor, bits: int) -> torch.Tensor:
    """States [..., tokens, channels], rounded to `bits` bits with one scale a token."""
    largest_code = 2 ** (bits - 1) - 1
    scale = states.abs().amax(dim=-1, keepdim=True) / largest_code
    codes = (states / scale.clamp_min(1e-12)).round().clamp(-largest_code - 1, largest_code)
    return codes * scale


def relative_error(states: torch.Tensor, exact: torch.Tensor) -> float:
    return float((states - exact).norm() / exact.norm())


random_keys = torch.randn(1, 256, 64)  # B, T, head size
rounded = by_token(random_keys, bits=4)
used = {
    bits: len((by_token(random_keys, bits) / random_keys.abs().amax(-1, keepdim=True)).round(decimals=4).unique())
    for bits in (8, 4, 2)
}
book.say(
    f"Random keys {list(random_keys.shape)}: {random_keys.nbytes:,} bytes. Mean squared error "
    f"at 4 bits: {(random_keys - rounded).square().mean():.6f}, relative error "
    f"{relative_error(rounded, random_keys):.3f}. The rounded tensor has {rounded.nbytes:,} "
    "bytes too.  \n"
    "Values a code takes: "
    + ", ".join(f"{count} of {2**bits} at {bits} bits" for bits, count in used.items())
    + ". Since the scale comes from the largest magnitude, the lowest code is never used; at 2 "
    "bits that is a quarter of them."
)

# %% [markdown]
# A detail that is often seen: `round(x / (scale + 1e-6)) * scale`. The small number keeps from dividing by zero, and
# is harmless for states of ordinary size; for small ones it makes another scale of it than the one that is multiplied
# back.

# %%
for factor in (1.0, 1e-4):
    x = random_keys * factor
    scale = x.abs().amax(-1, keepdim=True) / 127
    added = (x / (scale + 1e-6)).round().clamp(-128, 127) * scale
    book.say(
        f"States of size {factor:g}, 8 bits: relative error {relative_error(added, x):.4f} so, "
        f"{relative_error(by_token(x, 8), x):.4f} as above."
    )

# %% [markdown]
# ## 3. Track one: a nanoGPT
#
# Random numbers are not keys. So here is a small GPT, trained on Python's own documentation for about a minute. Its
# attention head computes keys and values and hands them back, which makes the KV cache:

# %%
book.code(inspect.getsource(Head))

# %%
kept = string.ascii_letters + string.digits + " \n.,;:()'?"
text = " ".join("".join(c for c in offline_text() if c in kept).split())  # prose, without tables and markup
characters = sorted(set(text))
number_of = {character: number for number, character in enumerate(characters)}
ids = torch.tensor([number_of[character] for character in text])
held_out = ids[-20_000:]

torch.manual_seed(0)
nano = GPTLanguageModel(len(characters), layers=2)
losses = train(nano, ids[:-20_000])
nano.eval()

fig, axes = book.figure(1, height=2.6)
axes[0].plot(losses, color=book.COLOURS["with"])
axes[0].axhline(np.log(len(characters)), color=book.COLOURS["grey"], ls=":", label="a guess")
axes[0].set(xlabel="step", ylabel="nats a character")
axes[0].legend()
book.caption("The loss while it is trained: on short pieces, at the end on pieces of full length.")

prompt = held_out[None, :32]
written, past = nano.generate(prompt, 96)
with torch.inference_mode():
    at_once, past_at_once = nano(written)
book.say(
    f"{sum(p.numel() for p in nano.parameters()):,} weights, loss {np.mean(losses[-20:]):.2f}. "
    f"What it writes after “{''.join(characters[i] for i in prompt[0])}”:"
)
print("".join(characters[i] for i in written[0, 32:]))
keys, values = past[0][0]
book.say(
    f"Keys that were caught step by step, first layer, first head: {list(keys.shape)}. "
    f"Computed at once they differ by {relative_error(keys, past_at_once[0][0][0]):.0e}: the "
    "cache is right."
)

# %% [markdown]
# From a text of 256 characters, the same shape as the random keys above:

# %%
with torch.inference_mode():
    _, past = nano(held_out[None, :256])
keys, values = past[1][0]  # second layer, first head
half, codes, scale = keys.numel() * 2, keys.numel() // 2, keys.shape[1]
book.say(
    f"Keys {list(keys.shape)}: {keys.nbytes:,} bytes in float32. Mean squared error at 4 bits "
    f"{(keys - by_token(keys, 4)).square().mean():.6f}, relative error "
    f"{relative_error(by_token(keys, 4), keys):.3f}."
)
table = book.table(
    [
        {"stored as": "float32", "bytes": keys.nbytes},
        {"stored as": "float16", "bytes": half},
        {"stored as": "rounded to 4 bits, in float32 as above", "bytes": by_token(keys, 4).nbytes},
        {"stored as": "4-bit codes alone", "bytes": codes},
        {"stored as": "4-bit codes, a float16 scale a token", "bytes": codes + 2 * scale},
        {"stored as": "4-bit codes, a float32 scale a token", "bytes": codes + 4 * scale},
    ],
    {"bytes": "{:,}"},
)
book.say(
    f"*An 8-fold saving, from FP32 to 4 bits*: {keys.nbytes / codes:.1f} by the codes alone, "
    f"{keys.nbytes / (codes + 2 * scale):.2f} with a float16 scale a token, "
    f"{keys.nbytes / (codes + 4 * scale):.2f} with a float32 one; and against float16, in "
    f"which models mostly run, {half / (codes + 2 * scale):.2f}."
)

# %% [markdown]
# ## 4. Track two: a Llama's cache, caught in generation
#
# transformers hands the cache out. It was a tuple of tuples once, and `past_key_values[0][0]` the keys of the first
# layer; now it is a `DynamicCache` with layers.

# %%
question = tokenizer("The quick brown fox", return_tensors="pt")
output = llama.generate(**question, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
caught = output.past_key_values
first = caught.layers[0].keys.half()
codes, scales = first.numel(), first.numel() // first.shape[-1]
print(tokenizer.decode(output.sequences[0]))
book.say(
    f"A `{type(caught).__name__}` of {len(caught.layers)} layers; keys of the first: "
    f"{list(first.shape)} (sequences, KV heads, tokens, channels). There are "
    f"{output.sequences.shape[1]} tokens, and the newest is not in the cache yet.  \n"
    f"In FP16 these keys take {first.nbytes / 1024:.1f} KiB, in 8 bits {codes / 1024:.1f} KiB, "
    f"and {(codes + 2 * scales) / 1024:.1f} KiB with a float16 scale for each token and head. "
    "The layer's cache is keys *and* values, so twice that."
)

# %% [markdown]
# Both tracks continue with longer texts. A **past**, which we quantize, and **new** tokens whose predictions we watch:
# 512 and 128 tokens of two texts for the Llama, 192 and 64 characters of 16 texts for the nanoGPT. Texts are from
# Python's documentation, for the nanoGPT from the part that it has not been trained on.

# %%
PAST, NEW = 512, 128
TOPICS = ("compound", "execmodel")
texts = torch.cat([tokenizer(offline_text(topic), return_tensors="pt").input_ids[:, : PAST + NEW] for topic in TOPICS])
with torch.inference_mode(), book.attention_inputs(llama) as caught:
    llama_exact = llama(texts, use_cache=False).logits[:, PAST:]
llama_states = caught  # of each layer: queries, keys, values

NANO_PAST, NANO_NEW = 192, 64
nano_texts = held_out[: 16 * 256].view(16, 256)
queries: list[torch.Tensor] = []
hooks = [
    head.query.register_forward_hook(lambda _, __, out: queries.append(out))
    for b in nano.blocks
    for head in b.attention.heads
]
with torch.inference_mode():
    nano_exact, nano_past = nano(nano_texts)
for hook in hooks:
    hook.remove()
nano_exact = nano_exact[:, NANO_PAST:]
nano_states = [(query[:, None], *(t[:, None] for t in kept)) for query, kept in zip(queries, sum(nano_past, []))]

# %% [markdown]
# ## 5. What keys and values look like

# %%
LAYER = 10
pictures = {
    "nanoGPT, keys": nano_states[2][1][0, 0],
    "nanoGPT, values": nano_states[2][2][0, 0],
    "Llama, keys": llama_states[LAYER][1][0, 0, :256],
    "Llama, values": llama_states[LAYER][2][0, 0, :256],
}
book.heat_maps(pictures)
book.caption(
    f"Magnitudes of one head: nanoGPT's second layer, the Llama's layer {LAYER}. A row is a "
    "token, a column a channel; each picture has a scale of its own. The Llama's keys have a "
    "few channels that are large in every token: the outlier channels of the KIVI paper."
)


def channel_outlier(states: torch.Tensor) -> float:
    """The largest channel over the median one, by mean magnitude without the first 4 tokens."""
    size = states[..., 4:, :].abs().mean(dim=(0, 2))
    return float((size.amax(-1) / size.median(-1).values).mean())


outliers = {
    f"{name}, {side}": float(np.mean([channel_outlier(layer[number]) for layer in states]))
    for name, states in (("nanoGPT", nano_states), ("Llama", llama_states))
    for number, side in ((1, "keys"), (2, "values"))
}
table = book.table(
    [{"states": name, "largest channel / median channel": ratio} for name, ratio in outliers.items()],
    {"largest channel / median channel": "{:.1f}"},
)

# %% [markdown]
# By token, one large channel sets the scale for all others, and at few bits the others are rounded away. KIVI ([arXiv
# 2402.02750](https://arxiv.org/abs/2402.02750)) cuts the other way: keys **by channel**, over groups of 32 tokens, so
# that an outlier has a scale of its own; values by token, in groups of 32 channels. Both with a minimum beside the
# scale, so that all codes are used.


# %%
def rounded_groups(groups: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return ((groups - low) / scale).round() * scale + low


def kivi_keys(keys: torch.Tensor, bits: int, group: int = 32) -> torch.Tensor:
    return rounded_groups(keys.unflatten(-2, (-1, group)), -2, bits).flatten(-3, -2)


def kivi_values(values: torch.Tensor, bits: int, group: int = 32) -> torch.Tensor:
    return rounded_groups(values.unflatten(-1, (-1, group)), -1, bits).flatten(-2)


SCHEMES = {"by token, symmetric": (by_token, by_token), "KIVI": (kivi_keys, kivi_values)}
TRACKS = {"nanoGPT": (nano_states, NANO_PAST), "Llama": (llama_states, PAST)}
BITS = (8, 4, 2)

keys = llama_states[LAYER][1][:, :, :PAST]
stored = dequantize_keys(quantize_keys(keys, 2, 32, "minmax"), 2, 32)
book.say(
    "These ten lines against the project's codec, 2-bit keys: relative difference "
    f"{relative_error(kivi_keys(keys, 2), stored):.4f}, since the codec keeps scale and "
    "minimum in float16."
)

# %% [markdown]
# ## 6. What is lost: keys and values, attention, the next token
#
# Three questions, each nearer to what matters. How far off are the states? How far off is what attention makes of
# them, $\mathrm{softmax}(q k^\top / \sqrt{d})\, v$, for the new tokens' real queries? And how far off is the
# prediction of the next token: its KL divergence from full precision, and how often the likeliest token is the same
# (top-1)?


# %%
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, new: int) -> torch.Tensor:
    """What the last `new` queries get."""
    seen = torch.ones(new, key.shape[2], dtype=torch.bool).tril(key.shape[2] - new)
    return scaled_dot_product_attention(query[:, :, -new:], key, value, attn_mask=seen, enable_gqa=True)


def errors_of(states, past: int, scheme, bits: int) -> dict[str, float]:
    """Relative errors, the mean over layers."""
    rows = []
    for query, key, value in states:
        rounded = [torch.cat([f(t[:, :, :past], bits), t[:, :, past:]], dim=2) for f, t in zip(scheme, (key, value))]
        new = query.shape[2] - past
        rows.append(
            (
                relative_error(rounded[0][:, :, :past], key[:, :, :past]),
                relative_error(rounded[1][:, :, :past], value[:, :, :past]),
                relative_error(attention(query, *rounded, new), attention(query, key, value, new)),
            )
        )
    return dict(zip(("keys", "values", "attention"), np.mean(rows, axis=0).tolist()))


def difference_of(logits: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """KL(exact || logits) in nats, the mean over predictions, and the share of equal likeliest tokens."""
    p, q = exact.log_softmax(-1), logits.log_softmax(-1)
    return {
        "KL": float((p.exp() * (p - q)).sum(-1).mean()),
        "top-1": float((logits.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


@torch.inference_mode()
def predict_llama(scheme, bits: int) -> torch.Tensor:
    cache = DynamicCache(config=config)
    for layer, (_, key, value) in enumerate(llama_states):
        cache.update(scheme[0](key[:, :, :PAST], bits), scheme[1](value[:, :, :PAST], bits), layer)
    return llama(texts[:, PAST:], past_key_values=cache).logits


@torch.inference_mode()
def predict_nano(scheme, bits: int) -> torch.Tensor:
    past = [[tuple(f(t[:, :NANO_PAST], bits) for f, t in zip(scheme, head)) for head in layer] for layer in nano_past]
    return nano(nano_texts[:, NANO_PAST:], past)[0]


def overhead(name: str) -> float:
    """Bits an element for metadata, at 64 channels: a float16 scale a token, or a scale and a minimum a group of 32."""
    return 16 / 64 if name.startswith("by token") else 32 / 32


PREDICT = {"nanoGPT": (predict_nano, nano_exact), "Llama": (predict_llama, llama_exact)}
TRIED = {"by token, symmetric": (8, 4, 3, 2), "KIVI": BITS}
results = [
    {
        "model": track,
        "scheme": name,
        "bits": bits,
        "bits with metadata": bits + overhead(name),
        **errors_of(*TRACKS[track], SCHEMES[name], bits),
        **difference_of(PREDICT[track][0](SCHEMES[name], bits), PREDICT[track][1]),
    }
    for track in TRACKS
    for name in SCHEMES
    for bits in TRIED[name]
]
errors = book.table(
    results,
    dict.fromkeys(("keys", "values", "attention"), "{:.4f}")
    | {"bits with metadata": "{:.2f}", "KL": "{:.5f}", "top-1": "{:.1%}"},
)

# %%
fig, axes = book.figure(4, width=3.4, height=3.2)
for axis, what in zip(axes, ("keys", "values", "attention", "KL")):
    for track, style in (("nanoGPT", "--"), ("Llama", "-")):
        for name, colour in zip(SCHEMES, (book.COLOURS["without"], book.COLOURS["with"])):
            chosen = errors[(errors["model"] == track) & (errors["scheme"] == name)]
            axis.plot(chosen["bits with metadata"], chosen[what], f"o{style}", color=colour, label=f"{track}, {name}")
    axis.set(yscale="log", title=what if what == "KL" else f"error of {what}", xlabel="bits an element")
axes[0].legend(fontsize=8)
book.caption("Error against bits, metadata included. Left to right: nearer to what matters.")

# %%
at = {(row["model"], row["scheme"], row["bits"]): row for row in results}


def gain(track: str, what: str, bits: int) -> float:
    return at[track, "by token, symmetric", bits][what] / at[track, "KIVI", bits][what]


for track in TRACKS:
    book.say(
        f"**{track}**, KIVI against by token at 2 bits: the error of the keys is "
        f"{gain(track, 'keys', 2):.1f} times smaller, that of attention "
        f"{gain(track, 'attention', 2):.1f} times, KL {gain(track, 'KL', 2):.1f} times. At 4 "
        f"bits: {gain(track, 'keys', 4):.1f}, {gain(track, 'attention', 4):.1f} and "
        f"{gain(track, 'KL', 4):.1f}; at 8 bits both have a KL of at most "
        f"{max(at[track, name, 8]['KL'] for name in SCHEMES):.1e}."
    )
nearly_equal = {track: (at[track, "by token, symmetric", 3], at[track, "KIVI", 2]) for track in TRACKS}
three, two = nearly_equal["Llama"]
book.say(
    f"A part of that is paid with metadata: KIVI's 2 bits are {two['bits with metadata']:.2f} here. "
    f"By token one has 3-bit codes for that ({three['bits with metadata']:.2f} bits). KL, by token and KIVI: "
    + "; ".join(f"{track} {a['KL']:.4f} and {b['KL']:.4f}" for track, (a, b) in nearly_equal.items())
    + ". What cutting the keys by channel is good for are outlier channels, and the nanoGPT has none."
)

# %% [markdown]
# ## 7. The same with stored codes
#
# So far nothing has become smaller. The project's codec makes bytes of it: 2-bit codes, four to a byte, with scale and
# minimum in float16. For the nanoGPT, head by head:


# %%
def store(states: torch.Tensor, side: str, bits: int):
    """Codes, and the states that they give back."""
    quantize, dequantize = (quantize_keys, dequantize_keys) if side == "keys" else (quantize_values, dequantize_values)
    packed = quantize(states, bits, 32, "minmax")
    return packed, dequantize(packed, bits, 32)


@torch.inference_mode()
def nano_with_codes(bits: int) -> dict[str, float]:
    exact = stored = 0
    past = []
    for layer in nano_past:
        heads = []
        for head in layer:
            back = []
            for side, states in zip(("keys", "values"), head):
                packed, given_back = store(states[:, :NANO_PAST], side, bits)
                exact += given_back.numel() * 4
                stored += packed.codes.nbytes + sum(t.nbytes for t in packed.metadata)
                back.append(given_back)
            heads.append(tuple(back))
        past.append(heads)
    logits = nano(nano_texts[:, NANO_PAST:], past)[0]
    sizes = {"float32 bytes": exact, "stored bytes": stored, "times smaller": exact / stored}
    return {
        "bits": bits,
        **sizes,
        **difference_of(logits, nano_exact),
        "KL, pretending": at["nanoGPT", "KIVI", bits]["KL"],
    }


NANO_FORMATS = {
    "float32 bytes": "{:,}",
    "stored bytes": "{:,}",
    "times smaller": "{:.2f}",
    "KL": "{:.5f}",
    "KL, pretending": "{:.5f}",
    "top-1": "{:.1%}",
}
nano_stored = book.table([nano_with_codes(bits) for bits in BITS], NANO_FORMATS)

# %% [markdown]
# For the Llama it is `KIVICache`, which transformers takes as `past_key_values`. Attention runs over the codes. Three
# settings: the *bare* scheme from above; the *paper's*, with the newest 128 tokens in full precision; and the
# project's *defaults*, which also keep the first 4 tokens (they draw much of the attention), fit each key group by
# least squares, give some key channels two bits more, and at 2 bits rotate values.

# %%
kivi, _ = load(small_model("smollm2"), dtype=torch.float32, backend="torch")
kivi.eval()
SETTINGS = {
    "bare": {**PAPER_OPTIONS, "residual_length": 0},
    "paper": PAPER_OPTIONS,
    "defaults": {},
}


@torch.inference_mode()
def llama_with_codes(name: str, bits: int) -> dict[str, float]:
    cache = kivi.create_kivi_cache(**{**SETTINGS[name], "k_bits": bits, "v_bits": bits})
    kivi(texts[:, :PAST], past_key_values=cache, logits_to_keep=1)  # the past is packed here
    info = cache.get_cache_info()
    logits = kivi(texts[:, PAST:], past_key_values=cache).logits
    return {
        "setting": name,
        "bits": bits,
        "packed tokens": info["tokens"]["packed"],
        "bits, packed": info["bits"]["packed"],
        "bits, all": info["bits"]["stored"],
        "MB": info["bytes"]["total"] / 1e6,
        "times smaller": info["bytes"]["ratio"],
        **difference_of(logits, llama_exact),
    }


RUNS = [*(("bare", bits) for bits in BITS), ("paper", 2), *(("defaults", bits) for bits in BITS)]
STORED_FORMATS = {
    "bits, packed": "{:.2f}",
    "bits, all": "{:.2f}",
    "MB": "{:.2f}",
    "times smaller": "{:.2f}",
    "KL": "{:.5f}",
    "top-1": "{:.1%}",
}
stored = book.table([llama_with_codes(name, bits) for name, bits in RUNS], STORED_FORMATS)
bare = stored[stored["setting"] == "bare"].set_index("bits")["KL"]
book.say(
    "The bare setting has the KL of the pretended one, so the codes say what they should: "
    + ", ".join(f"{bare[bits]:.5f} and {at['Llama', 'KIVI', bits]['KL']:.5f} at {bits} bits" for bits in BITS)
    + ". *Times smaller* is against float32, in which this model runs; the full-precision "
    f"tokens of a cache are float32 too, and with {PAST} tokens they are a large part of it. "
    "Long texts are the next picture."
)

# %%
two = stored[stored["bits"] == 2].set_index("setting")
book.say(
    f"At 2 bits KL falls from {two['KL']['bare']:.3f} (bare) to {two['KL']['paper']:.3f} with "
    f"the window and {two['KL']['defaults']:.3f} with the defaults, which store "
    f"{two['bits, packed']['defaults']:.2f} bits a packed element like the paper's "
    f"{two['bits, packed']['paper']:.2f}."
)

# %% [markdown]
# ## 8. Where eight-fold is true, and where metadata takes some back
#
# Two bits instead of 16, or 4 instead of 32: eight times less. What is stored beside the codes, for a Llama 3 8B:

# %%
HEAD_DIM = 128
rows = [
    {"scheme": "by token, float16 scale, 4 bits from float32", "from": 32, "promised": 4, "stored": 4 + 16 / HEAD_DIM},
    {
        "scheme": "KIVI, 4 bits from float32",
        "from": 32,
        "promised": 4,
        "stored": np.mean(KIVIOptions(k_bits=4, v_bits=4).stored_bits(4, 4, HEAD_DIM)),
    },
    {
        "scheme": "KIVI, 4 bits from float16",
        "from": 16,
        "promised": 4,
        "stored": np.mean(KIVIOptions(k_bits=4, v_bits=4).stored_bits(4, 4, HEAD_DIM)),
    },
    {
        "scheme": "KIVI, 2 bits from float16",
        "from": 16,
        "promised": 2,
        "stored": np.mean(KIVIOptions().stored_bits(2, 2, HEAD_DIM)),
    },
]
table = book.table(
    [
        {
            "scheme": r["scheme"],
            "bits promised": r["promised"],
            "bits stored": r["stored"],
            "saving promised": r["from"] / r["promised"],
            "saving": r["from"] / r["stored"],
        }
        for r in rows
    ],
    {"bits stored": "{:.2f}", "saving promised": "{:.1f}", "saving": "{:.2f}"},
)

LENGTHS = np.unique(np.geomspace(128, 131_072, 60).astype(int))
EIGHT_B = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": HEAD_DIM}
fig, axes = book.figure(1, width=7)
for bits, colour in ((2, book.COLOURS["with"]), (4, book.COLOURS["other"]), (8, book.COLOURS["without"])):
    promised = [16 / nominal_bits(int(n), bits, 128) for n in LENGTHS]
    real = [book.cache_bytes(int(n), **EIGHT_B, k_bits=bits, v_bits=bits)["ratio"] for n in LENGTHS]
    axes[0].plot(LENGTHS, promised, ":", color=colour, label=f"{bits} bits: codes and window")
    axes[0].plot(LENGTHS, real, color=colour, label=f"{bits} bits: as stored")
axes[0].axhline(1, color=book.COLOURS["grey"], lw=0.8)
book.log_axes(axes[0], "tokens", "times smaller than 16 bits", (128, 512, 2048, 8192, 32768, 131072))
axes[0].set_yticks([0.5, 1, 2, 4, 8], ["½", "1", "2", "4", "8"])
book.caption(
    "Llama 3 8B, by arithmetic. Dotted: without metadata, the figure that is usually given; "
    "it comes near 8 in long texts. Solid: with scales and minima. Below a few hundred tokens "
    "the window is nearly all there is, and nothing is saved."
)
longest = int(LENGTHS[-1])
ratio = {bits: book.cache_bytes(longest, **EIGHT_B, k_bits=bits, v_bits=bits)["ratio"] for bits in (2, 4, 8)}
even = next(int(n) for n in range(1, 4096) if book.cache_bytes(n, **EIGHT_B)["ratio"] >= 1)
book.say(
    f"At {longest:,} tokens 2 bits promise {16 / nominal_bits(longest, 2, 128):.2f} and store "
    f"{ratio[2]:.2f} times less, 4 bits {ratio[4]:.2f}, 8 bits {ratio[8]:.2f}. From {even} "
    "tokens on a 2-bit cache is smaller than a full one."
)

# %% [markdown]
# ## What to take along

# %%
tokens_per_gb = {
    bits: 1e9 / (book.cache_bytes(100_000, **EIGHT_B, k_bits=bits, v_bits=bits)["total"] / 100_000)
    for bits in (16, 4, 2)
}
book.say(
    f"- A GB of cache holds {tokens_per_gb[16]:,.0f} tokens of Llama 3 8B at 16 bits, "
    f"{tokens_per_gb[4]:,.0f} at 4 and {tokens_per_gb[2]:,.0f} at 2: long dialogues on small "
    "machines, as promised.\n"
    "- By token and symmetric, 8 bits are safe (KL "
    f"{at['Llama', 'by token, symmetric', 8]['KL']:.5f}) and 2 are not "
    f"({at['Llama', 'by token, symmetric', 2]['KL']:.2f}). By channel for keys, 2 bits come to "
    f"{at['Llama', 'KIVI', 2]['KL']:.2f} bare, and to {two['KL']['defaults']:.3f} with the "
    "defaults of this project.\n"
    f"- The reason is in the picture of the keys: a channel {outliers['Llama, keys']:.0f} "
    "times as large as the median one. KIVI makes the error of its 2-bit keys "
    f"{gain('Llama', 'keys', 2):.1f} times smaller, and {gain('nanoGPT', 'keys', 2):.1f} times "
    f"in the nanoGPT, whose largest channel is {outliers['nanoGPT, keys']:.1f} times the "
    "median.\n"
    f"- Count the metadata: 8 times less on paper is {ratio[2]:.1f} in memory."
)
