"""The evaluation against what it must equal: direct formulas, one long forward, and real models."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import SMALL, make_pair, real_model_path, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_llama_kivi import load_llama_kivi
from modeling_qwen_kivi import load_qwen_kivi
from modules import evaluation
from modules.evaluation import __main__ as command
from modules.evaluation import candidates as named
from modules.evaluation import environment, passkey, plan, quality, report, results, tables, texts
from modules.kivi_cache_general import KIVICache
from modules.options import KIVIOptions

TWO = {**SMALL, "k_bits": 2, "v_bits": 2, "k_range": "minmax"}  # codes and metadata of 16: 4 bits
FULL = {**SMALL, "k_bits": 16, "v_bits": 16}


@pytest.fixture
def kivi_model():
    return make_pair("qwen2")[1]


def measure(model, length=150, chunk=16, skip=40, **caches):
    return evaluation.measure_quality(model, tokens(1, length), caches, chunk=chunk, skip=skip)


# --- quality -----------------------------------------------------------------


def test_numbers_equal_the_direct_formulas(kivi_model):
    """Logits of every step collected by hand, then torch's own KL and cross-entropy over all of them at once."""
    ids, chunk, skip = tokens(1, 150), 16, 41  # the skip ends inside a chunk, the text too
    row = evaluation.measure_quality(kivi_model, ids, {"two": TWO}, chunk=chunk, skip=skip).row("two")
    collected = []
    for cache in (DynamicCache(config=kivi_model.config), KIVICache(kivi_model.config, **TWO)):
        with torch.no_grad():
            parts = [kivi_model(part, past_key_values=cache).logits[0] for part in ids.split(chunk, dim=1)]
        collected.append(torch.cat(parts)[skip:].double().log_softmax(-1))
    p, q = collected
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    perplexity = math.exp(torch.nn.functional.nll_loss(q[:-1], ids[0, skip + 1 :]).item())
    assert kl > 1e-4
    assert row.kl == pytest.approx(kl, rel=1e-4)
    assert row.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert row.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert row.kl_error > 0 and row.seconds > 0


def test_full_precision_is_that_of_one_stock_forward():
    stock, kivi = make_pair("llama")
    ids = tokens(1, 150)
    result = evaluation.measure_quality(kivi, ids, {"sixteen": FULL}, chunk=16, skip=40)
    with torch.no_grad():
        logits = stock(ids).logits[0, 40:-1]
    expected = math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 41:]).item())
    full, sixteen = result.rows
    assert full.perplexity == pytest.approx(expected, rel=1e-5)
    assert full.kl == 0 and full.top1 == 1 and full.stored_bits == 16 == sixteen.stored_bits
    assert sixteen.perplexity == pytest.approx(expected, rel=1e-5)
    assert abs(sixteen.kl) < 1e-6 and sixteen.top1 == 1
    assert result.predictions == 110 and result.tokens == 150


def test_a_single_forward_measures_nothing_and_chunks_do(kivi_model):
    assert abs(measure(kivi_model, chunk=150, two=TWO).row("two").kl) < 1e-7
    assert measure(kivi_model, chunk=16, two=TWO).row("two").kl > 1e-4


def test_another_reference_takes_the_place_of_full_precision(kivi_model):
    four = named.kivi("four", {**TWO, "k_bits": 4, "v_bits": 4})
    ids, caches = tokens(1, 150), {"two": TWO, "four again": four.options}
    result = evaluation.measure_quality(kivi_model, ids, caches, chunk=16, skip=40, reference=four)
    assert [row.name for row in result.rows] == ["four", "two", "four again"]
    assert result.rows[0].kl == result.rows[2].kl == 0 < 1e-4 < result.rows[1].kl
    table = tables.quality_table(result)
    assert table["KL (nats)"][0] == table["change"][0] and float(table["KL (nats)"][2]) == 0


def test_more_bits_are_better(kivi_model):
    result = measure(kivi_model, **{str(bits): {**TWO, "k_bits": bits, "v_bits": bits} for bits in (2, 4, 8)})
    two, four, eight = (result.row(str(bits)) for bits in (2, 4, 8))
    assert two.kl > 10 * four.kl > 0 and four.kl > 10 * abs(eight.kl)
    assert [row.stored_bits for row in (two, four, eight)] == pytest.approx([4, 6, 10])


def test_stored_bits_count_a_full_precision_side(kivi_model):
    result = measure(kivi_model, mixed={**TWO, "v_bits": 16})
    assert result.row("mixed").stored_bits == pytest.approx((4 + 16) / 2)


def test_a_stock_model_takes_the_same_cache():
    stock, kivi = make_pair("llama")
    assert measure(stock, two=TWO).row("two").kl == pytest.approx(measure(kivi, two=TWO).row("two").kl, rel=1e-3)


def test_factories_and_missing_packages(kivi_model):
    def missing(config):
        raise ImportError("You need\n to install it.")

    result = measure(kivi_model, stock=lambda config: DynamicCache(config=config), gone=missing)
    assert result.row("stock").kl == 0
    gone = result.row("gone")
    assert gone.note == "skipped: You need to install it." and gone.kl is None
    assert tables.quality_table(result).iloc[-1]["perplexity"] == gone.note


@pytest.mark.parametrize(("package", "backend"), [("optimum.quanto", "quanto"), ("hqq", "hqq")])
def test_peers_are_measured(package, backend):
    """transformers' own quantized caches run beside ours; 4 bits lose less than 2."""
    pytest.importorskip(package)
    model = make_pair("qwen3")[1]
    two, four = (peer for peer in named.peers() if peer.options["backend"] == backend)
    result = evaluation.measure_quality(model, tokens(1, 300), [two, four], chunk=32, skip=150)
    rows = [result.row(peer.name) for peer in (two, four)]
    assert [row.note for row in rows] == ["", ""] and [row.stored_bits for row in rows] == [2.5, 4.5]
    assert rows[0].kl > 2 * rows[1].kl > 0


def test_progress_counts_every_chunk(kivi_model):
    seen = []
    evaluation.measure_quality(
        kivi_model, tokens(1, 50), {"two": TWO}, chunk=16, skip=0, progress=lambda name: seen.append(name)
    )
    assert seen == [named.FULL, "two"] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: measure(model, length=41, two=TWO), "41 tokens"),
        (lambda model: measure(model, chunk=0, two=TWO), "chunk must be"),
        (lambda model: measure(model, skip=-1, two=TWO), "skip must be"),
        (lambda model: measure(model, two={"k_bit": 2}), "did you mean 'k_bits'"),
        (lambda model: measure(model, two=2), "'two' must be a dict"),
        (lambda model: evaluation.measure_quality(model, tokens(2, 600), {}), r"\[1, tokens\]; got \(2, 600\)"),
        (lambda model: measure(model).row("nothing"), "no candidate 'nothing'"),
        (lambda model: named.as_candidates([named.kivi("a", {}), named.kivi("a", {})]), "two candidates"),
    ],
)
def test_mistakes_are_named(kivi_model, call, message):
    with pytest.raises(ValueError, match=message):
        call(kivi_model)


# --- candidates and texts ----------------------------------------------------


def test_options_of_flags_are_written_as_they_are_read():
    options = KIVIOptions(k_bits=[2, 4], v_rotation=True, wide_channels=0.5, k_range="minmax")
    changed = named.changes(options)
    assert changed == {"k_bits": [2, 4], "v_rotation": True, "wide_channels": 0.5, "k_range": "minmax"}
    assert evaluation.parse_options(named.written(changed)).options == changed
    shares = named.changes(KIVIOptions(wide_channels=[0, 0.25, 1.0]))
    assert shares == {"wide_channels": [0, 0.25, 1.0]} == evaluation.parse_options(named.written(shares)).options
    assert named.changes(KIVIOptions()) == {}


def test_candidate_sets_are_distinct_and_allowed():
    for make in (*named.CANDIDATE_SETS.values(), named.peers):
        assert len(named.as_candidates(make())) == len(make())
    bits = {(c.options.get("k_bits", 2), c.options.get("v_bits", 2)) for c in named.grid_candidates()}
    assert len(bits) == 15  # every pair of 2, 4, 8, 16 but full precision


def test_options_of_the_command_line():
    candidate = evaluation.parse_options(
        "mine: k_bits=4, v_bits=2,k_range=minmax,use_kivi=True,wide_channels=0.5,v_rotation=None"
    )
    assert candidate.name == "mine"
    assert candidate.options == {
        "k_bits": 4,
        "v_bits": 2,
        "k_range": "minmax",
        "use_kivi": True,
        "wide_channels": 0.5,
        "v_rotation": None,
    }
    assert evaluation.parse_options("k_bits=4").name == "k_bits=4"
    assert evaluation.parse_options("").name == named.DEFAULTS
    for text, message in (("k_bits", "name=value"), ("k_bits=3", "k_bits must be"), ("bits=3", "no option 'bits'")):
        with pytest.raises(ValueError, match=message):
            evaluation.parse_options(text)


def test_texts(tmp_path, tokenizer, monkeypatch):
    assert len(evaluation.load_text("prose")) > 100_000 and "def " in evaluation.load_text("code")
    assert evaluation.load_text("prose@100") == evaluation.load_text("prose")[100:]
    file = tmp_path / "text.txt"
    file.write_text("grün", encoding="utf-8")
    assert evaluation.load_text(str(file)) == "grün"
    assert evaluation.encode(tokenizer, "abc", 2).tolist() == [[97, 98]]
    assert texts.digest(torch.tensor([[1]])) != texts.digest(torch.tensor([[2]]))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for source, message in (
        ("nothing", "no text 'nothing'"),
        ("hub:some/set", "some/set.*could not be loaded"),
        (f"{file}@x", "number of characters"),
        (f"{file}@9", "4 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.load_text(source)
    with pytest.raises(ValueError, match="3 tokens; 5 are wanted"):
        evaluation.encode(tokenizer, "abc", 5)
    with pytest.raises(ValueError, match="tokens must be a whole number of tokens, 1 or more; got -1"):
        evaluation.encode(tokenizer, "abc", -1)


# --- passkey -----------------------------------------------------------------


def test_prompt_has_the_needle_at_its_depth(tokenizer):
    filler = tokenizer("x" * 2000)["input_ids"]
    for depth in (0, 0.1, 0.5, 1):
        prompt = evaluation.passkey_prompt(tokenizer, filler, 800, depth, "48151")
        assert prompt.shape == (1, 800)
        text = tokenizer.decode(prompt[0])
        assert text.startswith(passkey.HEADER) and text.endswith(passkey.QUESTION)
        before, _, after = text.partition(passkey.NEEDLE.format(key="48151"))
        room = before.count("x") - passkey.HEADER.count("x") + after.count("x") - passkey.QUESTION.count("x")
        assert (before.count("x") - passkey.HEADER.count("x")) / room == pytest.approx(depth, abs=0.01)
    assert passkey.depths_of(5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_prompt_mistakes(tokenizer):
    for length, depth, message in ((100, 0.5, "no room"), (800, 1.5, "depth must be"), (5000, 0.5, "filler has 9")):
        with pytest.raises(ValueError, match=message):
            evaluation.passkey_prompt(tokenizer, [5] * 9, length, depth, "48151")


def test_a_length_that_does_not_fit_costs_no_work(kivi_model, tokenizer, monkeypatch):
    monkeypatch.setattr(passkey, "greedy", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(ValueError, match="no room for the needle"):
        evaluation.measure_passkey(kivi_model, tokenizer, "x" * 999, {}, lengths=[400, 50])


def test_answers_are_judged_by_the_key(kivi_model, tokenizer, monkeypatch):
    def answer(model, ids, cache, *rest):
        key = "".join(letter for letter in tokenizer.decode(ids[0]) if letter.isdigit())[:5]
        return tokenizer(f" {key}." if isinstance(cache, DynamicCache) else " 1234.")["input_ids"]

    def missing(config):
        raise ImportError("not here")

    monkeypatch.setattr(passkey, "greedy", answer)
    result = evaluation.measure_passkey(
        kivi_model, tokenizer, "x" * 999, {"two": TWO, "gone": missing}, lengths=[400, 500], depths=3
    )
    assert result.lengths == [400, 500] and result.names == [named.FULL, "two"]
    assert result.found(named.FULL, 400) == (3, 3) and result.found("two", 500) == (0, 3)
    assert result.notes == {"gone": "skipped: not here"}
    assert len({row.key for row in result.rows}) == 6
    assert tables.passkey_table([result]).values.tolist() == [
        [named.FULL, "3 of 3", "3 of 3"],
        ["two", "0 of 3", "0 of 3"],
    ]


def test_greedy_is_that_of_generate(kivi_model):
    ids = tokens(1, 70)
    expected = kivi_model.generate(ids, max_new_tokens=8, do_sample=False)[0, 70:].tolist()
    assert evaluation.greedy(kivi_model, ids, DynamicCache(config=kivi_model.config), 8, chunk=16) == expected


def test_prefill_is_that_of_prefill_chunk(kivi_model):
    ids = tokens(1, 90)
    with torch.no_grad():
        ours = evaluation.prefill(kivi_model, ids, KIVICache(kivi_model.config, **TWO), chunk=16)
        kivi_model.prefill_chunk = 16
        theirs = kivi_model(ids, past_key_values=KIVICache(kivi_model.config, **TWO)).logits[0, -1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- results and report ------------------------------------------------------

HERE = environment.Environment("2026-01-02T03:04Z", "a processor", 1, "float32", "3.12.0", {"torch": "2"})


def a_result(model="m", text="prose", **changes):
    rows = [
        results.QualityRow(named.FULL, "full", {}, 16.0, 10.0, 0.0, 0.0, 1.0, 1.0),
        results.QualityRow(named.DEFAULTS, "kivi", {}, 3.0, 10.1, 0.025, 0.001, 0.91, 1.0),
        results.QualityRow(named.SMALL, "kivi", named.PRESETS["small"], 3.1, 10.1, 0.02, 0.001, 0.92, 1.0),
        results.QualityRow(named.PAPER, "paper", named.PAPER_OPTIONS, 3.0, 13.0, 0.3, 0.01, 0.7, 1.0),
        results.QualityRow(named.FOUR_BITS, "kivi", {"k_bits": 4, "v_bits": 4}, 5.0, 10.0, 0.001, 0.0001, 0.98, 1.0),
        results.QualityRow("peer", "transformers", {"backend": "quanto"}, 2.5, 900.0, 3.0, 0.1, 0.1, 1.0),
        results.QualityRow("gone", "transformers", note="skipped: not installed"),
    ]
    return dataclasses.replace(results.QualityResult(model, text, "abc", 3072, 128, 512, 2560, rows, HERE), **changes)


def test_results_come_back_from_json(tmp_path):
    passkeys = results.PasskeyResult(
        "m", "prose", 128, [results.PasskeyRow("a", "kivi", 9, 0.5, "1", "1", True)], {}, HERE
    )
    speed = results.BenchmarkResult("decode", [{"tokens": 512, "p50_ms": 1.5}], HERE, {"model": "m"})
    for result in (a_result(), passkeys, speed):
        evaluation.save_result(result, tmp_path / "new" / "r.json")
        assert evaluation.load_result(tmp_path / "new" / "r.json") == result
    broken = dataclasses.replace(a_result().rows[1], kl=math.nan, perplexity=math.inf)
    evaluation.save_result(a_result(rows=[broken]), tmp_path / "r.json")
    row = evaluation.load_result(tmp_path / "r.json").rows[0]
    assert row.kl is None and row.perplexity is None
    for text in ("[]", "{}", "no", json.dumps({"format": 2, "kind": "quality"})):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match="holds no result"):
            evaluation.load_result(tmp_path / "r.json")


def test_peers_are_kept_only_where_nothing_changed():
    earlier, now = a_result(), a_result(rows=a_result().rows[:2])
    kept = quality.keep_peers(now, earlier)
    assert [row.name for row in kept.rows[2:]] == ["peer"] and kept.rows[2].date == HERE.date
    tomorrow = dataclasses.replace(HERE, date="2026-01-03T00:00Z")
    later = quality.keep_peers(dataclasses.replace(now, environment=tomorrow), earlier)
    assert kept.day_of(kept.rows[2]) is None and later.day_of(later.rows[2]) == "2026-01-02"
    ours = dataclasses.replace(HERE, packages={**HERE.packages, "numba": "9"})  # which peers do not depend on
    assert quality.keep_peers(now, dataclasses.replace(earlier, environment=ours)).rows[2:]
    for change in ({"digest": "x"}, {"chunk": 64}, {"environment": dataclasses.replace(HERE, packages={})}):
        assert quality.keep_peers(now, a_result(**change)) == now
    assert quality.keep_peers(now, None) == now
    assert quality.keep_peers(earlier, earlier) == earlier


def test_report_says_what_was_measured(tmp_path):
    for name, text in (("a", "prose"), ("b", "code")):
        evaluation.save_result(a_result(text=text), tmp_path / f"quality-{name}.json")
    rows = [results.PasskeyRow(named.FULL, "full", 2000, 0.5, "12345", "12345", True)]
    evaluation.save_result(results.PasskeyResult("m", "prose", 128, rows, {}, HERE), tmp_path / "quality-passkey.json")
    written = report.write_report(tmp_path, tmp_path / "docs" / "quality.md")
    page = written[0].read_text()
    cells = " ".join(page.split())
    for part in (
        "| m, code | 0.0250 | +1.0 % | 0.910 | 0.0200 | +1.0 % | 0.3000 | 12.0 | 0.0010 |",
        "skipped: not installed",
    ):
        assert part in cells
    assert "1 of 1" in page and "a processor, 1 thread, float32" in page and "](quality.svg)" in page
    assert "{{" not in page and "{%" not in page
    first = [path.read_bytes() for path in written]
    assert first[1].startswith(b"<?xml")
    assert [path.read_bytes() for path in report.write_report(tmp_path, tmp_path / "docs" / "quality.md")] == first


def test_plan_names():
    assert plan.steps(["all"]) == plan.PLAN and plan.steps(["qwen-code"])[0].text == "code"
    with pytest.raises(ValueError, match="no measurement 'x'"):
        plan.steps(["x"])
    with pytest.raises(ValueError, match="no folder of models"):
        plan.existing_models("/nowhere/at/all")


# --- command line ------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    """A small stock Llama with a tokenizer, on disk, where the plan looks for a model."""
    folder = tmp_path_factory.mktemp("models") / plan.SMOLLM2
    make_pair("llama")[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments):
    try:
        return command.main([str(argument) for argument in arguments])
    except SystemExit as mistake:  # in the flags
        return mistake.code


def test_quality_and_passkey_commands(model_folder, tmp_path, capsys):
    output = tmp_path / "quality.json"
    common = ["--model", model_folder, "--options", "k_bits=2", "--no-peers", "--chunk", 64, "--device", "cpu"]
    assert run("quality", *common, "--tokens", 320, "--skip", 64, "--output", output) == 0
    result = evaluation.load_result(output)
    assert [row.name for row in result.rows] == [named.FULL, "k_bits=2"] and result.rows[1].kl > 0
    assert run("passkey", *common, "--lengths", 400, "--depths", 2, "--output", output) == 0
    assert evaluation.load_result(output).found("k_bits=2", 400)[1] == 2
    assert "k_bits=2" in capsys.readouterr().out


def test_report_command_measures_and_writes(model_folder, tmp_path, monkeypatch, without_numba):
    step = plan.Step("small", plan.SMOLLM2, tokens=600, peers=False, calibration="code")
    monkeypatch.setattr(plan, "PLAN", [step, plan.Step("keys", plan.SMOLLM2, kind="passkey", lengths=(400,))])
    monkeypatch.setattr(command, "short_candidates", lambda: [named.kivi(named.DEFAULTS, {})])
    monkeypatch.setattr(command, "BUDGETS", (3.25,))  # heads of 32 channels take 2.6 bits and more
    places = ["--results", tmp_path, "--output", tmp_path / "quality.md"]
    assert run("report", "--measure", "all", "--models", model_folder.parent, "--device", "cpu", *places) == 0
    page = (tmp_path / "quality.md").read_text()
    assert f"### {plan.SMOLLM2}, prose" in page and "400 tokens" in page and "bits by layer, 3.25, by code" in page
    chosen = evaluation.load_result(tmp_path / f"layers-{plan.SMOLLM2}-code-3.25.json")
    row = evaluation.load_result(tmp_path / "quality-small.json").row("bits by layer, 3.25, by code")
    assert row.options == chosen.settings["options"] and row.kl > 0
    assert row.stored_bits == pytest.approx(chosen.settings["bits"]) and row.stored_bits <= 3.25


def test_command_mistakes(model_folder, tmp_path, capsys):
    for arguments, message in (
        (["quality", "--model", model_folder, "--options", "k_bits=3"], "k_bits must be one of"),
        (["quality", "--model", tmp_path / "nothing"], "no model could be loaded"),
        (["quality", "--model", model_folder, "--text", "nothing"], "no text 'nothing'"),
        (["report", "--results", tmp_path], "measure first"),
        (["passkey", "--model", "m", "--lengths", -5], "--lengths must be 1 or more; got -5"),
        (["passkey", "--model", "m", "--lengths", 2000, 0], "--lengths must be 1 or more; got 0"),
        (["passkey", "--model", "m", "--depths", 0], "--depths must be 1 or more; got 0"),
        (["quality", "--model", "m", "--tokens", -5], "must be 514 or more; got -5"),
        (["quality", "--model", "m", "--skip", -1], "--skip must be 0 or more; got -1"),
        (["quality", "--model", "m", "--chunk", 0], "--chunk must be 1 or more; got 0"),
        (["layers", "--model", "m", "--tokens", -3], "--tokens must be 3 or more; got -3"),
        (["layers", "--model", "m", "--bits", "nan"], "--bits must be 2 or more; got nan"),
        (["layers", "--model", "m", "--bits", 3, 4, "--output", "x.json"], "--output must be a name with {bits} in it"),
        (["layers", "--model", "m", "--v-bits", 4, "--group-size", 64], "leave v_bits and group_size out"),
        (["report", "--measure", "nothing"], "no measurement 'nothing'"),
    ):
        status = run(*arguments)
        assert status == (2 if "must be" in message and "k_bits" not in message else 1)
        error = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert message in error and "━" not in error  # no bar was drawn


# --- real models -------------------------------------------------------------


@pytest.mark.real_model
def test_qwen_with_tenfold_key_biases():
    """Keys with a constant far larger than their spread, as larger Qwen2 models have them."""
    model, tokenizer = load_qwen_kivi(str(real_model_path("qwen2")), dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.mul_(10)
    ids = evaluation.encode(tokenizer, evaluation.load_text("code"), 384)
    result = evaluation.measure_quality(model.eval(), ids, named.short_candidates(), skip=192)
    assert all(row.kl is not None and math.isfinite(row.kl) for row in result.rows)
    assert 0 < result.row(named.FOUR_BITS).kl < 5e-3


@pytest.mark.real_model
def test_qwen_finds_the_keys_that_full_precision_finds():
    model, tokenizer = load_qwen_kivi(str(real_model_path("qwen2")), dtype=torch.float32)
    filler = evaluation.load_text("prose")
    result = evaluation.measure_passkey(
        model.eval(), tokenizer, filler, {"two bits": {}}, lengths=[700], depths=[0.1, 0.5]
    )
    assert result.found(named.FULL, 700) == (2, 2) == result.found("two bits", 700)


@pytest.mark.real_model
def test_stock_checkpoint_of_another_class_is_measured_too():
    """A stock model from transformers' own loader, with the cache's dequantized states."""
    path = str(real_model_path("llama"))
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    kivi, tokenizer = load_llama_kivi(path, dtype=torch.float32)
    ids = evaluation.encode(tokenizer, evaluation.load_text("prose"), 448)
    rows = [
        evaluation.measure_quality(model, ids, {"ours": {"wide_channels": 0}}, skip=256).row("ours")
        for model in (stock, kivi.eval())
    ]  # a stock model shows the cache no queries to choose wide channels by
    assert rows[0].kl == pytest.approx(rows[1].kl, rel=0.02)


def test_ablations_command(model_folder, tmp_path, capsys):
    """From start to end: states are recorded, a table is shown, and the file is read again for the report."""
    output = tmp_path / "ablations-small.json"
    assert run("ablations", "--model", model_folder, "--tokens", 640, "--layers", 1, "--output", output) == 0
    (result,) = report.read_ablations(tmp_path)
    assert len(result.settings["layers"]) == 1 and {row["side"] for row in result.rows} == {"keys", "values"}
    assert all(row["error"] > 0 for row in result.rows)
    assert result.rows[0]["variant"] in tables.ablation_table(result).to_string()
    assert run("ablations", "--model", model_folder, "--tokens", 500) != 0
    assert "tokens must be at least" in "".join(capsys.readouterr())
