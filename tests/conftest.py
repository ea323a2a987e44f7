"""Small random models of every family, and the real ones where they are on disk."""

from __future__ import annotations

import collections
import pathlib
import signal

import pytest
import torch
from layers import relative_error  # noqa: F401 - the tests take it from here
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_llama_kivi import LlamaForCausalLM_KIVI, LlamaKIVIConfig
from modeling_qwen_kivi import Qwen2ForCausalLM_KIVI, Qwen2KIVIConfig, Qwen3ForCausalLM_KIVI, Qwen3KIVIConfig
from modules.cli.folder import QWEN, SMOLLM2, VARIABLE, models_folder
from modules.kernels import registry


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N parts: side by side without pytest-xdist")


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C works in the tests and what they start, also where a shell started them in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := config.getoption("--shard"):
        number, count = map(int, shard.split("/"))
        items[:] = items[number - 1 :: count]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not tested and why, counted; nothing is skipped in silence."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    terminalreporter.section(f"not tested: {len(skipped)}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4}  {reason}")


torch.set_num_threads(1)  # small tensors, and a busy machine makes threads wait for each other

SIZES = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# flushes often; products of bytes magnify what another order of sums changes: a number that is rounded to the next byte
SMALL = {"group_size": 16, "residual_length": 32, "exact_products": True}

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaKIVIConfig, LlamaForCausalLM_KIVI, {"head_dim": 32}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, Qwen2KIVIConfig, Qwen2ForCausalLM_KIVI, {"hidden_size": 192}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, Qwen3KIVIConfig, Qwen3ForCausalLM_KIVI, {"head_dim": 64}),
}
REAL_MODELS = {"llama": SMOLLM2, "qwen2": QWEN}


def make_pair(family: str, **options):
    """A stock model of random weights and the KIVI model with the same ones."""
    config_class, stock_class, kivi_config_class, kivi_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    stock = stock_class(config_class(**{**SIZES, **extra})).eval()
    for name, parameter in stock.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # Qwen2's biases are what breaks other schemes
    kivi = kivi_class(kivi_config_class(**{**SIZES, **extra, **SMALL, **options})).eval()
    kivi.load_state_dict(stock.state_dict())
    return stock, kivi


@pytest.fixture(params=list(FAMILIES))
def each_pair(request):
    """(stock, KIVI) of one family after the other, same weights: for what a family can change."""
    return make_pair(request.param)


@pytest.fixture
def pair():
    """(stock, KIVI) with the same weights, for what all families share."""
    return make_pair("llama")


@pytest.fixture(scope="session")
def tokenizer():
    """One token a character."""
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def without_numba(monkeypatch):
    """Every new mix of bits would be compiled; torch needs no compilation."""
    entry = registry.REGISTRY["numba"]
    monkeypatch.setitem(registry.REGISTRY, "numba", entry._replace(needs="a_package_that_nobody_has"))


def real_model_path(family: str) -> pathlib.Path:
    """Folder of a real model, or a skip that says how to get it."""
    path = models_folder() / REAL_MODELS[family]
    if not path.exists():
        pytest.skip(f"no {path}; `python3 start.py test` fetches it, or set {VARIABLE}")
    return path


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`, none of them padding."""
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
