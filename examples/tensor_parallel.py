"""One model over several GPUs, or several processes on a CPU: each holds its share of the weights, the heads and the cache.

    torchrun --nproc_per_node 2 examples/tensor_parallel.py --model PATH --prompt "The capital of France is"

transformers cuts the weights by the model's own plan (`DistributedConfig(tp_plan="auto")`); a packed cache then holds the KV
heads of its rank. `num_key_value_heads` must be a multiple of the number of processes. The first one prints.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoConfig, AutoTokenizer, TextStreamer
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from modules.cli.command import argument, check_least, group, parse  # noqa: E402
from modules.models.families import load_any  # noqa: E402
from modules.options import KIVIOptions  # noqa: E402


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str = argument(help="a folder or a name on the hub")
    prompt: str = argument("The capital of France is", "what to continue")
    max_new_tokens: int = argument(50, "how far to continue it")
    dtype: str = argument("auto", "of the weights; auto: the checkpoint's")
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        check_least(self.max_new_tokens, 1, "--max-new-tokens")


def main() -> None:
    """Generate, and print the text and the bytes of each rank's cache."""
    flags = parse(Flags, description=__doc__)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        raise SystemExit(
            "start it with torchrun and two processes or more: torchrun --nproc_per_node 2 examples/tensor_parallel.py "
            "--model PATH"
        )
    heads = AutoConfig.from_pretrained(flags.model).get_text_config(decoder=True).num_key_value_heads
    if heads % ranks:
        raise SystemExit(f"{flags.model} has {heads} KV heads, which {ranks} processes cannot share; take a divisor.")
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    options = dataclasses.asdict(flags.cache)
    model = load_any(flags.model, dtype=flags.dtype, distributed_config=DistributedConfig(tp_plan="auto"), **options)[
        0
    ].eval()
    rank = torch.distributed.get_rank()
    inputs = tokenizer(flags.prompt, return_tensors="pt").to(model.device)
    cache = model.create_kivi_cache()
    streamer = TextStreamer(tokenizer) if rank == 0 else None
    model.generate(
        **inputs, past_key_values=cache, max_new_tokens=flags.max_new_tokens, do_sample=False, streamer=streamer
    )
    shares: list[int] = [0] * ranks
    torch.distributed.all_gather_object(shares, cache.get_cache_info()["bytes"]["total"])
    if rank == 0:
        print(f"cache: {' + '.join(f'{share:,}' for share in shares)} bytes over {ranks} ranks")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
