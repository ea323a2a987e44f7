"""How many bytes a KV cache takes, by arithmetic: no weights are loaded and no GPU is needed.

Nominal is the usual figure, codes and window alone. Stored is every tensor of the cache: scales, minima, sinks, the window's
whole ring and room for growth, to the byte what get_cache_info() counts in a cache that holds as much.

Examples:
  kivi memory llama-3-8b
  kivi memory llama-3-8b --tokens 8k 32k 100000 --batch 8
  kivi memory path/to/model --tokens 32k --pairs 2,2 4,4 16,16
  kivi memory llama-2-7b --tokens 32k --gpu-memory 24GB --plot memory.svg
  kivi memory path/to/config.json --k-bits 4 --json

MODEL is a name below, a config.json, a checkpoint's folder, a .gguf file or a name on the hub (owner/name).
"""

from __future__ import annotations

import dataclasses

from modules.cli.command import argument, check_least, group
from modules.cli.presets import PRESETS
from modules.cli.sizes import parse_bytes, parse_tokens
from modules.options import KIVIOptions

DTYPES = ("float16", "bfloat16", "float32")
LENGTHS = ("256", "512", "1024", "2048", "4096", "8192", "32768")
DESCRIPTION = f"{(__doc__ or '').strip()}\n\nNames: {', '.join(PRESETS)}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """The command line."""

    model: str = argument(help="a name of the list above, a config.json, a folder, …", positional=True)
    tokens: tuple[str, ...] = argument(LENGTHS, "tokens of each sequence; 32k is 32768")
    batch: int = argument(1, "sequences")
    pairs: tuple[str, ...] = argument(
        (), "bits of keys and values to set side by side, as 2,2 4,2 8,8; none: --k-bits and --v-bits"
    )
    dtype: str = argument("float16", "of the model: sinks and window are kept in it", DTYPES)
    chunk: int | None = argument(None, "tokens that come at once (1: as in decoding); None: all")
    reserve: bool = argument(False, "room is made for all tokens at once, as generate() does on a GPU")
    gpu_memory: str | None = argument(None, "such as 24GB or 80GiB: the longest context and largest batch that fit")
    weights: str | None = argument(None, "size of the weights, such as 5GB; None: by the config, in --dtype")
    overhead: str = argument("1GB", "of --gpu-memory that activations and the CUDA context take")
    plot: str | None = argument(None, "write bytes against tokens as a plot here (.svg, .png or .pdf)")
    json: bool = argument(False, "print JSON and nothing else")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        check_least(self.batch, 1, "--batch")
        if self.chunk is not None:
            check_least(self.chunk, 1, "--chunk")
        if not self.tokens:
            raise ValueError("--tokens must name at least one length.")
        _ = self.lengths, self.contenders, self.budget

    @property
    def lengths(self) -> list[int]:
        """`tokens` as numbers."""
        return [parse_tokens(text, "--tokens") for text in self.tokens]

    @property
    def contenders(self) -> list[KIVIOptions]:
        """The options of the caches that are compared."""
        return [self._with_bits(pair) for pair in self.pairs] or [self.cache]

    def _with_bits(self, pair: str) -> KIVIOptions:
        parts = pair.split(",")
        if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"--pairs must be bits of keys and of values, such as 2,2 or 4,2; got {pair!r}.")
        return dataclasses.replace(self.cache, k_bits=int(parts[0]), v_bits=int(parts[1]))

    @property
    def budget(self) -> int | None:
        """Bytes of the GPU less the overhead; None where no GPU is given."""
        overhead = parse_bytes(self.overhead, "--overhead")
        if self.weights is not None:
            parse_bytes(self.weights, "--weights")
        return None if self.gpu_memory is None else parse_bytes(self.gpu_memory, "--gpu-memory") - overhead


COMMAND = Memory
