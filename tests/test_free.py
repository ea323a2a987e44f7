"""Texts of a model's own: the measures against direct formulas, and what must be zero."""

import math

import pytest
import torch
from conftest import SMALL, make_pair, tokens
from transformers import DynamicCache

from modules import evaluation
from modules.evaluation import candidates as named
from modules.evaluation import free, statistics, tables
from modules.evaluation.results import FreeRow
from modules.kivi_cache_general import KIVICache

TWO = {**SMALL, "k_bits": 2, "v_bits": 2, "k_range": "minmax"}


@pytest.fixture
def model(without_numba):
    return make_pair("qwen2")[1]


def measure(model, new_tokens=40, seeds=2, prompts=2, **caches):
    return free.measure_free(model, tokens(prompts, 90), caches, new_tokens=new_tokens, seeds=seeds, chunk=32)


def rows(result):
    return {row.name: row for row in result.rows}


# --- formulas ----------------------------------------------------------------


def test_wilson_and_mcnemar_of_known_numbers():
    assert statistics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert statistics.wilson(0, 20)[0] == 0 and statistics.wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert statistics.wilson(20, 20)[1] == 1 and statistics.wilson(0, 0) == (0, 1)
    assert statistics.mcnemar(0, 0) == 1 and statistics.mcnemar(3, 3) == 1
    assert statistics.mcnemar(0, 6) == statistics.mcnemar(6, 0) == 2 / 2**6
    assert statistics.mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)


def test_mean_and_interval():
    mean, half = statistics.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(1.96 / math.sqrt(3), rel=1e-4)
    assert math.isnan(statistics.mean_and_interval([1.0])[1])


def test_first_difference():
    ours = torch.tensor([[1, 2, 3], [1, 2, 3], [9, 2, 3]])
    theirs = torch.tensor([[1, 2, 4], [1, 2, 3], [1, 2, 3]])
    assert free._first_difference(ours, theirs) == [2, 3, 0]


# --- the measures ------------------------------------------------------------


def test_greedy_text_and_its_kl_are_those_of_generate_and_one_forward(model):
    """The two-bit model's greedy text by hand, its distributions token by token, and full precision in one forward."""
    prompt, new = tokens(1, 90), 40
    cache = KIVICache(model.config, **TWO)
    with torch.no_grad():
        logits = evaluation.prefill(model, prompt, cache, 32)
        text, own = [], []
        for _ in range(new):
            own.append(logits.double().log_softmax(-1))
            text.append(int(logits.argmax()))
            logits = model(torch.tensor([text[-1:]]), past_key_values=cache).logits[0, -1]
        whole = torch.cat([prompt, torch.tensor([text])], 1)
        full = model(whole, past_key_values=DynamicCache(config=model.config)).logits[0, 89:-1].double().log_softmax(-1)
        expected = (full.exp() * (full - torch.stack(own))).sum(-1)
        writer = free._Writer(model, prompt, new, 32, None)
        written, _ = writer.write(named.kivi("two", TWO), free._Ways(1, 2, 0, forced=False))
    assert written.tokens[0].tolist() == text
    assert expected.mean() > 1e-4
    torch.testing.assert_close(written.forward[0], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        written.log_p[0], full.gather(1, torch.tensor(text)[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )


def test_no_quantization_is_no_difference(model):
    found = rows(measure(model, sixteen={**SMALL, "k_bits": 16, "v_bits": 16}))
    full, others, sixteen = found[named.FULL], found[free.OTHER_SEEDS], found["sixteen"]
    assert full.kl_own == 0 == others.kl_own and full.log_p_change is None
    assert abs(sixteen.kl_own) < 1e-6 and abs(sixteen.sequence_kl) < 1e-6 and abs(sixteen.kl_forced) < 1e-6
    assert sixteen.diverged_greedy == [40, 40] and sixteen.diverged_sampled == [40] * 4
    assert sixteen.log_p == pytest.approx(full.log_p, rel=1e-6) and sixteen.log_p_change == pytest.approx(0, abs=1e-6)
    assert others.log_p != full.log_p and max(others.diverged_sampled) < 40


def test_more_bits_drift_less(model):
    found = rows(measure(model, two=TWO, four={**TWO, "k_bits": 4, "v_bits": 4}))
    two, four = found["two"], found["four"]
    for name in ("kl_own", "kl_forced", "sequence_kl"):
        assert getattr(two, name) > 5 * getattr(four, name) > 0
    assert sum(two.diverged_greedy + two.diverged_sampled) < sum(four.diverged_greedy + four.diverged_sampled)
    assert len(two.kl_quarters) == 4 and sum(two.kl_quarters) / 4 == pytest.approx(two.kl_own, rel=1e-6)
    assert two.log_p_error > 0 and two.stored_bits == pytest.approx(4)


def test_samples_are_the_same_for_the_same_seed(model):
    first, second = (rows(measure(model, two=TWO))["two"] for _ in range(2))
    assert first == second


def test_samples_follow_the_distribution():
    ways = free._Ways(prompts=1, seeds=4, first_seed=0, forced=False)
    noise = free._Noise(ways, torch.zeros(5, 3))
    log_q = torch.tensor([0.6, 0.3, 0.1]).log()
    counts = torch.bincount(torch.cat([(log_q + noise.next()).argmax(-1) for _ in range(2000)]), minlength=3)
    torch.testing.assert_close(counts / counts.sum(), log_q.exp(), rtol=0, atol=0.02)


def test_caches_that_cannot_repeat_themselves_are_filled_row_by_row(model):
    pytest.importorskip("hqq")
    peer = next(peer for peer in named.peers() if peer.name == "transformers hqq, 4 bits")
    result = free.measure_free(model, tokens(2, 90), [peer], new_tokens=12, seeds=2, chunk=32)
    assert result.rows[2].kl_own > 0 and result.rows[2].stored_bits == 4.5


def test_table_and_json(model, tmp_path):
    def missing(config):
        raise ImportError("not here")

    result = measure(model, new_tokens=8, two=TWO, gone=missing)
    evaluation.save_result(result, tmp_path / "free.json")
    assert evaluation.load_result(tmp_path / "free.json") == result
    table = tables.free_table(result)
    assert table["cache"].tolist() == [named.FULL, free.OTHER_SEEDS, "two", "gone"]
    assert table["KL, own text"].tolist()[3] == "skipped: not here"
    row = FreeRow("a", "kivi", {}, 3.0, 0.01, 0.002, [0.01, 0, 0, 0.04], 0.02, 0.03, -2.0, 0.1, 0.05, 0.2, [4, 9], [7])
    cells = tables._free_cells(row)
    assert cells == [
        "a",
        "3.00",
        "0.0100",
        "0.0020",
        "0.0100 to 0.0400",
        "0.0200",
        "0.0300",
        "-2.000",
        "+0.050",
        "0.200",
        "6",
        "7",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seeds": 1}, "seeds must be"), ({"new_tokens": 3}, "new_tokens must be"), ({"chunk": 0}, "chunk must be")],
)
def test_mistakes_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        free.measure_free(model, tokens(1, 20), {}, **change)
    with pytest.raises(ValueError, match=r"\[prompts, tokens\]; got a shape of \(5,\)"):
        free.measure_free(model, torch.arange(5), {})
