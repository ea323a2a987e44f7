"""The benchmarks: what they measure does what its name says, and the pages of docs/ are those of the results."""

import dataclasses
import pathlib

import attention_cpu
import compile_report
import decode_cpu
import drafts_cpu
import gpu_bench
import peers_cpu
import pieces_cpu
import prefill_cpu
import pytest
import ragged_cpu
import report
import torch
from conftest import make_pair, relative_error, tokens
from transformers import DynamicCache, StaticCache

from modules.cli.benchmark import run as benchmark
from modules.cli.command import parse
from modules.evaluation import decoding
from modules.evaluation.environment import Environment
from modules.evaluation.report import write_report
from modules.evaluation.results import BenchmarkResult, load_result, save_result
from modules.kernels.registry import backend
from modules.kivi_cache_general import KIVICache
from modules.options import KIVIOptions

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def states(heads: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(1, heads, count, 64, generator=torch.Generator().manual_seed(seed))


def test_a_packed_step_is_attention_and_the_same_each_time():
    """At 16 bits it is the dense step; at 2 it is not, and no call leaves anything behind."""
    token, past = (states(4, 1, 0), states(2, 1, 1), states(2, 1, 2)), (states(2, 200, 3), states(2, 200, 4))
    dense, static = attention_cpu.dynamic_step(*token, past)(), attention_cpu.static_step(*token, past)
    exact = attention_cpu.packed_step(KIVIOptions(k_bits=16, v_bits=16, backend="torch"), *token, past)
    coded = attention_cpu.packed_step(KIVIOptions(backend="torch"), *token, past)
    assert relative_error(exact(), dense) < 1e-5
    first = coded()
    assert 1e-3 < relative_error(first, dense) < 0.5
    assert torch.equal(coded(), first) and relative_error(exact(), dense) < 1e-5
    assert relative_error(static(), dense) < 1e-6 and relative_error(static(), dense) < 1e-6


def test_a_length_whose_next_step_packs_is_refused():
    token, past = (states(2, 1, 0), states(2, 1, 1), states(2, 1, 2)), (states(2, 163, 3), states(2, 163, 4))
    with pytest.raises(ValueError, match="packs a group; choose another length"):
        attention_cpu.packed_step(KIVIOptions(backend="torch"), *token, past)


def test_filled_caches_hold_the_same_tokens():
    model = make_pair("llama")[1]
    options = {"k_bits": 16, "v_bits": 16, "backend": "torch"}
    caches = {"dense": DynamicCache(), "static": StaticCache(model.config, max_cache_len=120)}
    caches |= {"exact": model.create_kivi_cache(**options), "coded": model.create_kivi_cache()}
    with torch.inference_mode():
        decoding.fill(caches, model.config, 100, torch.float32)
        assert [cache.get_seq_length() for cache in caches.values()] == [100] * 4
        dense, static, exact, coded = (model(tokens(1, 1), past_key_values=cache).logits for cache in caches.values())
    assert relative_error(static, dense) < 1e-5
    assert relative_error(exact, dense) < 1e-5 and relative_error(coded, dense) > 1e-5
    assert caches["coded"].get_cache_info()["tokens"]["packed"] == 64


@pytest.mark.parametrize(
    "chosen, bits",
    [
        (gpu_bench.LARGE_METADATA, 2 + 0.5 + 1 + 2 + 0.5),  # keys, 4 bits for a quarter, and values
        ({}, 2 + 1 + 0.75 + 2 + 0.25),
    ],
    ids=["metadata of 16 bits", "of 8 bits"],
)
def test_layers_of_the_gpu_benchmark_hold_what_they_say(monkeypatch, chosen, bits):
    """On the CPU, where its layers can be made as well."""
    monkeypatch.setattr(gpu_bench, "DEVICE", "cpu")
    layer = gpu_bench.single_layer(2, 2, 64, 300, (2, 2), **chosen)
    assert layer.lengths == [300, 300] and layer.packed == [160, 160]
    elements = 2 * 2 * 64  # of one side, a token
    full = 2 * elements * 2 * (300 - 160)  # sinks and window
    assert gpu_bench.bytes_read(layer) == full + 160 * elements * bits / 8


def test_caches_of_the_gpu_benchmark_decode(monkeypatch):
    monkeypatch.setattr(gpu_bench, "DEVICE", "cpu")
    model = make_pair("qwen3", group_size=32, residual_length=128)[1].to(gpu_bench.DTYPE)
    cache = gpu_bench.filled_cache(model, "KIVI eager", 2, 300, 64)
    assert isinstance(cache, KIVICache) and cache.ledger.lengths == [300, 300] and cache.get_seq_length() == 300
    for own in cache.layers:
        own.backend = backend("torch")
    with torch.no_grad():
        assert model(tokens(2, 1), past_key_values=cache).logits.isfinite().all()
    assert cache.get_seq_length() == 301


@pytest.mark.parametrize(
    ("flags", "contenders"),
    [
        (attention_cpu.Flags, attention_cpu.Flags.contenders),
        (decode_cpu.Flags, benchmark.contenders),
    ],
)
def test_options_that_are_given_are_what_is_measured(flags, contenders):
    assert len(contenders(parse(flags, [], description=""))) >= 4
    given = contenders(parse(flags, ["--k-bits", "4", "--v-group-size", "16"], description=""))
    ((name, options),) = given.items()
    assert "k_bits=4,v_group_size=16" in name
    assert options in ({"k_bits": 4, "v_group_size": 16}, KIVIOptions(k_bits=4, v_group_size=16))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (attention_cpu, ["--lengths", "-1"]),
        (attention_cpu, ["--seconds", "-1"]),
        (attention_cpu, ["--rounds", "0"]),
        (attention_cpu, ["--bits", "3"]),
        (decode_cpu, ["--tokens", "512", "0"]),
        (decode_cpu, ["--threads", "0"]),
        (drafts_cpu, ["--lookup", "0"]),
        (pieces_cpu, ["--rounds", "0"]),
        (prefill_cpu, ["--tokens", "1"]),
        (ragged_cpu, ["--batches", "8", "0"]),
        (prefill_cpu, ["--chunk", "0"]),
        (gpu_bench, ["--minutes", "-1"]),
        (peers_cpu, ["--only", "llama.cpp q3_0"]),
        (peers_cpu, ["--rounds", "4"]),
        (compile_report, ["--jobs", "0"]),
        (compile_report, ["--arch", "91"]),
    ],
)
def test_mistakes_are_named_before_any_work(module, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(module.Flags, arguments, description="")
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_drafts_change_no_token_and_are_counted():
    """A prompt that comes again and again: what is looked up is right now and then, what the model itself drafts always."""
    model = make_pair("llama", backend="torch")[1]
    prompt = tokens(1, 12).repeat(1, 10)
    flags = parse(drafts_cpu.Flags, ["--new-tokens", "30", "--lookup", "4"], description="")
    rows = drafts_cpu.measure(model, prompt, flags)
    rows += drafts_cpu.measure(model, prompt, flags, make_pair("llama", backend="torch")[1])
    assert [(row["cache"], row["drafts"]) for row in rows] == [
        (cache, drafts)
        for ways in (("none", "from the prompt, 4"), ("none", "by itself"))
        for cache in ("DynamicCache", "KIVI")
        for drafts in ways
    ]
    for row in rows:
        assert row["as_without"] and row["steps"] + row["accepted"] == 30 and row["tokens_a_second"] > 0
        assert row["accepted"] == 0 if row["drafts"] == "none" else row["accepted"] >= 0
    assert rows[5]["accepted"] > 10 and rows[7]["accepted"] > 10
    assert rows[0]["as_stock"] == rows[1]["as_stock"] == 30
    assert rows[0]["along_accepted"] == rows[2]["along_accepted"] == rows[0]["along_drafted"] == 0
    assert rows[1]["along_accepted"] == rows[1]["accepted"]  # it goes along its own text


def test_drafts_along_a_text_are_accepted_where_they_are_predicted():
    """A cache of 16 bits predicts what the stock model does; along a text that nobody predicts nothing is accepted."""
    model = make_pair("llama", k_bits=16, v_bits=16, backend="torch")[1]
    prompt = tokens(1, 12).repeat(1, 10)
    stock = drafts_cpu.decode(model, prompt, DynamicCache(), 30)[1]
    caches = [(DynamicCache(), stock), (model.create_kivi_cache(), stock)]
    caches += [(model.create_kivi_cache(), prompt[0, :30].tolist())]
    clocks = [drafts_cpu.go_along(model, cache, prompt, text, lookup=4) for cache, text in caches]
    assert clocks[0][0].accepted == clocks[1][0].accepted and clocks[0][1] == clocks[1][1] > 0
    assert clocks[2][0].accepted < clocks[2][1]
    for (cache, text), (clock, _) in zip(caches, clocks):
        assert sum(count for _, count in clock.steps) == 30 == len(text)
        assert cache.get_seq_length() == prompt.shape[1] + 29


def test_a_piece_is_timed_over_the_same_past(monkeypatch):
    model = make_pair("llama", backend="torch")[1]
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, ids, past_key_values, **more: (
            seen.append((int(past_key_values.get_seq_length()), ids.shape[1])),
            forward(self, input_ids=ids, past_key_values=past_key_values, **more),
        )[1],
    )
    flags = parse(pieces_cpu.Flags, ["--stored", "90", "--rounds", "2"], description="")
    rows = pieces_cpu.measure(model, flags, 40)
    assert seen == [(90, 40)] * 3 * len(rows)
    assert [row["cache"] for row in rows] == ["StaticCache", "DynamicCache", *pieces_cpu.CONTENDERS]
    assert all(row["p50_ms"] > 0 and row["piece"] == 40 for row in rows) and rows[0]["speedup"] == 1


def test_ragged_sequences_pack_as_often_as_aligned_ones(monkeypatch, tmp_path):
    flags = parse(ragged_cpu.Flags, ["--tokens", "200", "--groups", "1"], description="")
    layers, filled = [], ragged_cpu.filled
    monkeypatch.setattr(ragged_cpu, "filled", lambda *args: layers.append(filled(*args)) or layers[-1])
    rows = ragged_cpu.measure("smollm2-135m", 3, flags)
    aligned, ragged = layers
    assert aligned.lengths == [233] * 3 and len(set(ragged.lengths)) == 3 and min(ragged.lengths) >= 233
    assert aligned.packed == [96] * 3 and set(ragged.packed) <= {96, 128}
    assert [row["sequences"] for row in rows] == ["aligned", "ragged"]
    assert all(0 < row["p50_ms"] <= row["max_ms"] for row in rows)
    save_result(BenchmarkResult("ragged", rows, Environment.here()), tmp_path / "ragged_cpu.json")
    report.write_page(tmp_path, tmp_path / "page.md")
    assert f"{rows[1]['mean_ms'] / rows[0]['mean_ms']:.2f} |" in (tmp_path / "page.md").read_text()


def test_the_pages_are_those_of_the_results(tmp_path):
    report.write_page(RESULTS, tmp_path / "performance.md")
    write_report(RESULTS, tmp_path / "quality.md")
    for name in ("performance.md", "quality.md"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), f"docs/{name} is to be written anew"


def test_a_page_says_what_was_not_measured_and_what_was(tmp_path):
    report.write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.count("Not measured yet.") == 6 and "Not compiled yet." in page and "not run on a GPU" in page
    row = gpu_bench.Row("end-to-end", "Llama-3.1-8B", "KIVI graph", 8, 32768, microseconds=12345.6)
    here = Environment("2026-01-02T03:04Z", "a GPU", 1, "", "3.12.0", {"torch": "2"})
    result = BenchmarkResult("gpu", [dataclasses.asdict(row)], here, {"copy_gigabytes_per_second": 2000})
    save_result(result, tmp_path / "gpu_bench.json")
    assert load_result(tmp_path / "gpu_bench.json") == result
    report.write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "KIVI graph" in page and "12346" in page and "a GPU, 1 thread, Python 3.12.0, torch 2" in page


def peer_row(cache: str, tokens: int, time: float) -> dict:
    return {"cache": cache, "tokens": tokens, "p20_ms": time, "p50_ms": time, "p80_ms": time, "with": "an engine 1.0"}


def test_rows_of_other_engines_are_measured_one_by_one_and_shown_together(tmp_path, monkeypatch):
    """Each run adds its rows in the order of the page; an engine that is not installed leaves what was measured of it."""
    times = {"KIVI 2 bits": 20.0, "ik_llama.cpp q8_0": 5.0, "llama.cpp f16": 6.0}

    def contender(name: str, most_tokens: int = 30000) -> peers_cpu.Contender:
        def sample(flags, tokens):
            if times[name] is None:
                raise ModuleNotFoundError("no such package")
            return [times[name] + tokens / 1000] * 5

        return peers_cpu.Contender(sample, lambda: "an engine 1.0", most_tokens)

    made = {name: contender(name) for name in ("KIVI 2 bits", "ik_llama.cpp q8_0")}
    made = {"KIVI 2 bits": made["KIVI 2 bits"], "llama.cpp f16": contender("llama.cpp f16", 8000), **made}
    monkeypatch.setattr(peers_cpu, "contenders", lambda: made)
    output = tmp_path / "peers_cpu.json"
    assert peers_cpu.measure(peers_cpu.Flags(only=("ik_llama.cpp q8_0", "llama.cpp f16"), output=output)) == []
    times.update({"ik_llama.cpp q8_0": None, "llama.cpp f16": 7.0})
    missing = peers_cpu.measure(peers_cpu.Flags(output=output))
    assert missing == ["ik_llama.cpp q8_0: no such package"]
    assert load_result(output).rows == [
        *(peer_row("KIVI 2 bits", tokens, 20 + tokens / 1000) for tokens in (512, 8000, 30000)),
        *(peer_row("llama.cpp f16", tokens, 7 + tokens / 1000) for tokens in (512, 8000)),
        *(peer_row("ik_llama.cpp q8_0", tokens, 5 + tokens / 1000) for tokens in (512, 8000, 30000)),
    ]
    report.write_page(tmp_path, tmp_path / "page.md")
    lines = [line.strip("|").split("|") for line in (tmp_path / "page.md").read_text().splitlines()]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines if len(line) == 5}
    assert cells["KIVI 2 bits"] == ["20.5", "28.0", "50.0", "29.5"]
    assert cells["llama.cpp f16"] == ["7.5", "15.0", report.MISSING, report.MISSING]


def test_ours_are_timed_at_the_tokens_they_say(monkeypatch):
    """A small model in the place of the real one: the cache that is stepped holds the context, then a token a step."""
    model, held = make_pair("llama")[1], []
    monkeypatch.setattr(peers_cpu, "our_model", lambda folder: model)
    monkeypatch.setattr(
        peers_cpu,
        "timed",
        lambda step, rounds: [step() and held.append(step.keywords["past_key_values"].get_seq_length())],
    )
    for name in ("StaticCache", "DynamicCache", "KIVI 2 bits"):
        with torch.inference_mode():
            peers_cpu.our_samples(name, peers_cpu.Flags(threads=1), 200)
    assert held == [201] * 3


def test_what_an_engine_was_built_for_is_read_from_its_line():
    line = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 0 | LLAMAFILE = 1 | "
    assert peers_cpu.peer_ik_llama.vectors(line) == ", built for AVX, AVX2"
    assert peers_cpu.peer_ik_llama.vectors("NEON = 1 | ") == ""
