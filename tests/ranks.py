"""What every rank of a tensor-parallel run does: `torchrun --nproc_per_node 2 tests/ranks.py CHECKPOINTS RESULTS`.

Each checkpoint of the folder generates greedily, greedily from a padded batch, and with beams, from packed caches; the tokens and
the bytes of every rank's cache go into a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from modules.models.families import classes_of

OPTIONS = {"k_bits": 2, "v_bits": 2, "group_size": 16, "residual_length": 32, "backend": "torch"}
PROMPT, NEW = 100, 40  # tokens; a window of 32 fills and is packed twice while these are generated


def generated(model: PreTrainedModel) -> dict[str, Any]:
    """Tokens of three generations, and the bytes of the first one's cache."""
    ids = torch.randint(3, model.config.vocab_size, (3, PROMPT), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 40)):
        padded[row, :padding] = 0
    found = {}
    for name, mask, settings in (
        ("greedy", torch.ones_like(ids), {}),
        ("padded", padded, {}),
        ("beams", torch.ones_like(ids), {"num_beams": 3}),
    ):
        cache = model.create_kivi_cache()
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **settings
        )
        found[name] = out[:, PROMPT:].tolist()
        if name == "greedy":
            found["bytes"] = cache.get_cache_info()["bytes"]["total"]
    return found


def run(checkpoints: Path, **where: Any) -> dict[str, Any]:
    """The same of every checkpoint of a folder."""
    found = {}
    for path in sorted(checkpoints.iterdir()):
        family = classes_of(AutoConfig.from_pretrained(path).model_type)
        model = family.causal_lm.from_pretrained(path, dtype=torch.float32, **where, **OPTIONS)
        found[path.name] = generated(model.eval())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run(Path(sys.argv[1]), distributed_config=DistributedConfig(tp_plan="auto"))
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
