"""Ten model types of transformers, from the matrix of docs/models.md; the whole of it: `python -m modules.evaluation.decoders`."""

from __future__ import annotations

import pytest

from modules import attach_kivi
from modules.evaluation import decoders, hybrids
from modules.evaluation.decoders import NOT_BUILT, OVER_CODES, REBUILT, REFUSED

EXPECTED = {
    "cohere2": (OVER_CODES, "packed"),
    "exaone4": (OVER_CODES, "packed"),
    "glm4": (OVER_CODES, "packed"),
    "granitemoehybrid": (OVER_CODES, "2 LinearAttention, 2 packed"),
    "llama4_text": (OVER_CODES, "2 SlidingWindow, 2 packed"),
    "olmo3": (OVER_CODES, "SlidingWindow"),
    "starcoder2": (OVER_CODES, "packed"),
    "gpt_oss": (REBUILT, "attention sinks as logits"),
    "jetmoe": (REBUILT, "changes keys or values after they are stored"),
    "mamba": (REFUSED, "takes no past_key_values"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_ten_model_types(name):
    verdict = decoders.examine(name)
    outcome, what = EXPECTED[name]
    assert verdict.outcome == outcome and what in (verdict.layers or verdict.why)
    assert outcome == REFUSED or verdict.error < 1e-4


def test_a_model_type_that_crashes_or_hangs_is_one_row(monkeypatch):
    def crash(name):
        raise SystemExit(1)

    monkeypatch.setattr(decoders, "examine", crash)
    assert decoders.examine_apart("llama", timeout=60).outcome == NOT_BUILT
    monkeypatch.setattr(decoders, "examine", lambda name: decoders.multiprocessing.Event().wait())
    assert "longer than 1 s" in decoders.examine_apart("llama", timeout=1).why


def test_bytes_of_a_hybrid_are_those_of_the_arithmetic():
    model = attach_kivi(decoders.build("qwen3_5_text").bfloat16(), backend="torch")
    counted, computed = hybrids.counted(model, 500), hybrids.parts(model.config, 500)
    assert (counted.recurrent, counted.window, counted.dense) == (computed.recurrent, computed.window, computed.dense)
    assert counted.packed == computed.packed
    assert hybrids.counted(model, 1000).recurrent == counted.recurrent


def test_the_command_names_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        decoders.main(["--only", "lama"])
    assert "has no decoder 'lama'" in " ".join(capsys.readouterr().err.replace("│", " ").split())
