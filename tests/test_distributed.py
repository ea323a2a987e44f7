"""Several processes on the CPU, over gloo, give what one gives: tensor parallelism by transformers' own plans, and an evaluation
whose cases are shared out."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import ranks
import torch
from conftest import FAMILIES, SIZES, make_pair
from transformers import AutoModelForCausalLM

from modules.evaluation.__main__ import main as evaluate
from modules.evaluation.processes import Processes
from modules.evaluation.results import load_result

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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(*command: object) -> None:
    """A command of the project's Python, on the CPU."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_give_the_tokens_of_one_process_and_share_the_bytes(count, checkpoints, alone, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", count, "--master_port", free_port()]
    run(*launcher, ROOT / "tests" / "ranks.py", checkpoints, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    for name, expected in alone.items():
        for result in results:
            found = result[name]
            assert found.pop("bytes") * count == expected["bytes"]
            assert found == {what: tokens for what, tokens in expected.items() if what != "bytes"}


def test_cases_are_shared_out_and_come_back_in_order(monkeypatch):
    """More processes than cases, fewer, and as many; what one process gathers is all of it."""
    for count, cases in ((1, 5), (2, 5), (3, 3), (4, 2), (2, 0)):
        teams = [Processes(rank, count) for rank in range(count)]
        shares = [team.share(list(range(cases))) for team in teams]
        assert sorted(case for share in shares for case in share) == list(range(cases))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        sent: list = []
        monkeypatch.setattr(
            "modules.evaluation.processes.gather_object", lambda mine, sent=sent: sent.extend(mine) or sent
        )
        gathered = [team.gather(f"result {case}" for case in share) for team, share in zip(teams[::-1], shares[::-1])]
        assert gathered[-1] == [f"result {case}" for case in range(cases)]
    Processes().refuse("this")
    with pytest.raises(ValueError, match="this runs in one process; got 2"):
        Processes(1, 2).refuse("this")


def test_two_ranks_measure_what_one_process_does(tokenizer, tmp_path):
    """Caches of `quality` and questions of `passkey` shared by two processes: an odd number of both."""
    model = tmp_path / "model"
    make_pair("llama")[0].save_pretrained(model)
    tokenizer.save_pretrained(model)
    options = [f"{bits},backend=torch" for bits in ("k_bits=2", "k_bits=4", "v_bits=4")]  # nothing is compiled
    caches = [part for text in options for part in ("--options", text)]
    common = ["--model", str(model), *caches, "--no-peers", "--chunk", "64", "--device", "cpu", "--output"]
    measures = {
        "quality": ["quality", "--tokens", "300", "--skip", "64", *common],
        "passkey": ["passkey", "--lengths", "300", "--depths", "3", *common],
    }
    for name, arguments in measures.items():
        assert evaluate([*arguments, str(tmp_path / f"{name}-one.json")]) == 0
    shared = json.dumps([[*arguments, str(tmp_path / f"{name}-two.json")] for name, arguments in measures.items()])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    run(*launcher, ROOT / "tests" / "evaluation_ranks.py", shared)

    one, two = (load_result(tmp_path / f"passkey-{count}.json").rows for count in ("one", "two"))
    assert len(one) == 3 * (1 + len(options)) and two == one
    one, two = (load_result(tmp_path / f"quality-{count}.json").rows for count in ("one", "two"))
    assert [row.name for row in two] == [row.name for row in one] and len(one) == 1 + len(options)
    for shared_out, alone in zip(two, one):
        for figure in ("perplexity", "kl", "kl_error", "top1", "stored_bits"):
            expected = getattr(alone, figure)
            assert getattr(shared_out, figure) == pytest.approx(expected, rel=1e-6, abs=1e-9), (alone.name, figure)
    assert two[1].kl > 1e-6  # it did quantize
