"""What every rank of a shared evaluation does: `torchrun --nproc_per_node 2 tests/evaluation_ranks.py COMMANDS`.

COMMANDS is a JSON list of command lines of `python -m modules.evaluation`, which are run one after the other.
"""

from __future__ import annotations

import json
import sys

import torch

from modules.evaluation.__main__ import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    statuses = [main(arguments) for arguments in json.loads(sys.argv[1])]
    torch.distributed.destroy_process_group()
    sys.exit(max(statuses))
