"""Tasks of lm-eval on a quantized cache, with one process or several that share the requests:

    python examples/lm_eval_kivi.py --model PATH --tasks hellaswag --k-bits 2 --v-bits 2
    accelerate launch --num_processes 2 examples/lm_eval_kivi.py --model PATH --tasks hellaswag

A name that ends in .yaml is a task of your own. Each process holds the whole model; the first one prints the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from modules import attach_kivi  # noqa: E402
from modules.cli.command import argument, check_least, group, parse  # noqa: E402
from modules.options import KIVIOptions  # noqa: E402


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    model: str = argument(help="a folder or a name on the hub")
    tasks: tuple[str, ...] = argument(help="names of lm-eval, or YAML files")
    batch_size: int = argument(4, "requests at a time")
    num_fewshot: int | None = argument(None, "examples before each question; None: the task's own")
    limit: int | None = argument(None, "questions of each task; None: all")
    dtype: str = argument("auto", "of the weights; auto: the checkpoint's")
    device: str | None = argument(None, "cpu, cuda; None: a GPU where there is one")
    prefill_chunk: int = argument(
        128, "tokens that go through the cache at once, so that a question reads its past from codes"
    )
    cache: KIVIOptions = group(KIVIOptions)

    def __post_init__(self) -> None:
        check_least(self.batch_size, 1, "--batch-size")
        check_least(self.prefill_chunk, 1, "--prefill-chunk")


def task_of(name: str) -> str | dict[str, Any]:
    """A task by its name, or from a YAML file, whose data files lie beside it."""
    path = Path(name)
    if path.suffix != ".yaml":
        return name
    config = yaml.safe_load(path.read_text())
    files = config.get("dataset_kwargs", {}).get("data_files", {})
    files.update({split: str(path.parent / file) for split, file in files.items()})
    return config


def main() -> None:
    """Evaluate and print."""
    flags = parse(Flags, description=__doc__)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    where = {} if flags.device is None else {"device": flags.device}
    lm = HFLM(pretrained=flags.model, dtype=flags.dtype, batch_size=flags.batch_size, **where)
    attach_kivi(lm.model, prefill_chunk=flags.prefill_chunk, **dataclasses.asdict(flags.cache))
    tasks = [task_of(name) for name in flags.tasks]
    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    results = simple_evaluate(
        lm, tasks=tasks, task_manager=manager, num_fewshot=flags.num_fewshot, limit=flags.limit, bootstrap_iters=0
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(results["results"], indent=2))


if __name__ == "__main__":
    main()
