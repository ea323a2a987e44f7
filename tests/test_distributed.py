"""Tensor parallelism by transformers' own plans: ranks on the CPU, over gloo, give the tokens of one process."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import ranks
import torch
from conftest import FAMILIES, SIZES
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED_OUT = {"hidden_size": 128, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 128}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> pathlib.Path:
    """A small stock checkpoint of every family, with heads for four ranks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (config_class, *_) in FAMILIES.items():
        torch.manual_seed(0)
        config = config_class(**{**SIZES, **SHARED_OUT, "num_hidden_layers": 2})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoints):
    """What one process generates."""
    return ranks.run(checkpoints)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_give_the_tokens_of_one_process_and_share_the_bytes(count, checkpoints, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(count),
        "--master_port",
        str(port),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "ranks.py"), str(checkpoints), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    for name, expected in alone.items():
        for result in results:
            found = result[name]
            assert found.pop("bytes") * count == expected["bytes"]
            assert found == {what: tokens for what, tokens in expected.items() if what != "bytes"}
