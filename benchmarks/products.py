"""What rounding queries and weights to bytes changes in a model's predictions: KL to exact products over the same codes.

    python benchmarks/products.py --model ~/.cache/kivi-models/smollm2-135m-instruct --tokens 3072

A text goes through a cache of exact products in chunks. From `--skip` tokens on, each chunk goes through a copy of the cache
as well, whose codes are the same and meet bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from pathlib import Path

import paths  # noqa: F401 - which puts the project's folder on the path
import torch
from transformers import PreTrainedModel

from modules.cli.command import argument, check_least, group, parse
from modules.evaluation.loading import DTYPES, load_model
from modules.evaluation.streaming import CHUNK, chunks, forward
from modules.evaluation.texts import TEXT_HELP, encode, load_text
from modules.kivi_cache_general import KIVICache
from modules.options import KIVIOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str = argument(help="folder of the model")
    text: str = argument("prose", TEXT_HELP)
    tokens: int = argument(3072, "of the text")
    skip: int = argument(512, "tokens before the first measured prediction, a multiple of the chunks' 128")
    dtype: str = argument("float32", "of the weights", DTYPES)
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        check_least(self.skip, 0, "--skip")
        check_least(self.tokens, self.skip + 1, "--tokens (with --skip)")


@torch.inference_mode()
def measure(model: PreTrainedModel, ids: torch.Tensor, options: KIVIOptions, skip: int) -> tuple[float, float]:
    """Mean KL (nats) and top-1 agreement of the predictions after each of the tokens `[1, T]` from `skip` on."""
    cache = KIVICache(model.config, dataclasses.replace(options, exact_products=True))
    kl: list[float] = []
    equal: list[float] = []
    for start, piece in chunks(ids, CHUNK):
        twin = copy.deepcopy(cache)
        log_p = forward(model, piece, cache).log_softmax(-1)
        if start >= skip:
            for layer in twin.kivi_layers:
                layer.stored[0].exact_products = False
            log_q = forward(model, piece, twin).log_softmax(-1)
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
            equal += (log_p.argmax(-1) == log_q.argmax(-1)).double().tolist()
    return statistics.fmean(kl), statistics.fmean(equal)


def main() -> None:
    """Measure and print."""
    flags = parse(Flags, description=__doc__)
    model, tokenizer = load_model(flags.model, flags.dtype, "cpu")
    ids = encode(tokenizer, load_text(flags.text), flags.tokens, flags.text)
    kl, equal = measure(model, ids, flags.cache, flags.skip)
    print(f"{Path(flags.model).name}, {flags.text}, {flags.tokens} tokens: KL {kl:.2e} nats, top-1 {equal:.4f}")


if __name__ == "__main__":
    main()
