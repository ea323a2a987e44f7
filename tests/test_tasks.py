"""Tasks with an answer: generators, judges and the counting of answers."""

import json

import pytest
from conftest import SMALL, make_pair
from test_evaluation import HERE, a_result, model_folder, run  # noqa: F401 - a fixture, and the command line

from modules import evaluation
from modules.evaluation import candidates as named
from modules.evaluation import needles, problems, report, tables, tasks
from modules.evaluation.results import FreeResult, FreeRow, TaskRow, TasksResult

HARD = {"keys": 3, "values": 2, "hops": 1, "largest": 9}
FILLER = "the hay is dry and long. " * 300


@pytest.fixture
def hay(tokenizer):
    return tokenizer(FILLER)["input_ids"]


def test_needles_are_where_and_as_often_as_they_should(tokenizer, hay):
    context = needles.haystack(tokenizer, hay, 6000, 3, needles.Difficulty(keys=10, values=3, hops=2))
    assert len(context.ids) == 6000
    text = tokenizer.decode(context.ids)
    assert text.startswith(needles.HEADER)
    by_task = {
        task: [q for q in context.questions if q.task == task]
        for task in (needles.MULTI_KEY, needles.MULTI_VALUE, needles.TRACKING)
    }
    assert [len(each) for each in by_task.values()] == [10, needles.SEVERAL, needles.CHAINS]
    for question in by_task[needles.MULTI_KEY] + by_task[needles.MULTI_VALUE]:
        key = question.text.split(" for ")[1].split(" mentioned")[0]
        values = question.expected.split(", ")
        assert all(text.count(needles.NEEDLE.format(key=key, value=value)) == 1 for value in values)
        assert text.count(f"numbers for {key} is: ") == len(values) == (1 if question.task == needles.MULTI_KEY else 3)
    for question in by_task[needles.TRACKING]:
        names = question.expected.split(", ")
        places = [text.index(f"\nVAR {name} = ") for name in names]
        assert len(names) == 3 and places == sorted(places)
        assert f"VAR {names[2]} = VAR {names[1]}\n" in text and f"VAR {names[0]} = " in text


def test_the_newest_tokens_hold_no_needle(tokenizer, hay):
    for seed in range(5):
        text = tokenizer.decode(needles.haystack(tokenizer, hay, 6000, seed).ids[-300:])
        assert "magic" not in text and "VAR" not in text


def test_needles_are_judged_by_all_values(tokenizer, hay):
    question = next(q for q in needles.haystack(tokenizer, hay, 6000, 0).questions if q.task == needles.MULTI_VALUE)
    first, second = question.expected.split(", ")
    assert question.judge(f" {second} and {first}.") and not question.judge(f" {first}") and not question.judge("")


def test_generators_are_the_same_for_the_same_seed(tokenizer):
    def made(seed):
        contexts = tasks.make_contexts(
            tokenizer, FILLER, lengths=[6000], shot_tokens=3000, haystacks=2, questions=5, seed=seed
        )
        return [(context.ids, [(q.text, q.expected) for q in context.questions]) for context in contexts]

    assert made(0) == made(0) != made(1)
    assert len(made(0)) == 4


def test_arithmetic_is_right_and_judged(tokenizer):
    context = problems.arithmetic(tokenizer, 4000, 20, seed=1)
    assert 3000 < len(context.ids) <= 4000
    text = tokenizer.decode(context.ids)
    for part in text.strip().split("\n\n") + [q.text + " " + q.expected for q in context.questions]:
        words = part.replace(".", " ").split()
        first, second = [int(word) for word in words[: words.index("Answer:")] if word.isdigit()]
        answer = first - second if "left?" in words else first + second
        assert int(words[-1]) == answer > 0
    question = context.questions[0]
    assert question.judge(f" {question.expected}\n\nQuestion") and not question.judge(f" {question.expected}1")
    assert not question.judge(" many") and not question.judge("")


def test_code_is_right_and_judged_by_running_it(tokenizer):
    context = problems.code(tokenizer, 5000, 6, seed=2)
    text = tokenizer.decode(context.ids)
    assert all(question.text not in text for question in context.questions)
    shown = {}
    exec(text.split("\n\n")[0], shown)
    assert callable(shown["f"])
    for question in context.questions[:2]:
        assert question.judge(f" {question.expected}\n\ndef g") and not question.judge(" xs.nothing")
    plus = next(p for p in problems.all_problems() if p.expression == "sum(2 * x for x in xs if x > 0)")
    judge = problems._gives(plus, [[1, -2, 3], []])
    assert judge(" 2 * sum(x for x in xs if x > 0)") and not judge(" 2 * sum(xs)") and not judge("")


def test_code_that_hangs_or_fails_is_no_answer(monkeypatch):
    monkeypatch.setattr(problems, "SECONDS", 1)
    for expression in ("1 / 0", "(", "[0] * 10**12", "sum(iter(int, 1))", "{1}"):
        assert problems.outputs(expression, [[1]]) is None
    assert problems.outputs(" sum(xs)", [[1, 2], []]) == [3, 0]


def test_all_problems_differ():
    made = problems.all_problems()
    assert len({problem.words for problem in made}) == len({problem.expression for problem in made}) == len(made) == 140


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["chess"]}, "no task 'chess'"),
        ({"haystacks": 0}, "haystacks must be"),
        ({"lengths": [200]}, "no room for"),
        ({"lengths": [200_000]}, "the filler has"),
        ({"largest": 1}, "largest must be"),
        ({"shot_tokens": 100}, "do not make a context of 100 tokens"),
        ({"shot_tokens": 90_000}, "do not make a context of 90000 tokens"),
    ],
)
def test_mistakes_are_named(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        tasks.make_contexts(tokenizer, FILLER, **{"lengths": [6000], "questions": 3, "shot_tokens": 3000, **change})


def test_answers_go_on_from_copies_of_one_cache(tokenizer, without_numba, monkeypatch):
    """Every question sees the context and no other question; answers are those of the whole prompt at once."""
    model = make_pair("llama")[1]
    contexts = tasks.make_contexts(tokenizer, FILLER, tasks=["arithmetic"], shot_tokens=600, questions=2)
    result = tasks.measure_tasks(model, tokenizer, contexts, {"two": SMALL}, chunk=64)
    assert result.names == [named.FULL, "two"] and result.tasks == [("arithmetic", 600)]
    assert [row.question for row in result.rows] == [0, 1, 0, 1]
    for row, question in zip(result.rows, contexts[0].questions):
        ids = tokenizer(tokenizer.decode(contexts[0].ids) + question.text, return_tensors="pt")["input_ids"]
        cache = named.full_precision().make(model.config)
        assert row.answer == tokenizer.decode(evaluation.greedy(model, ids, cache, len(row.answer), 64))


def test_table_compares_pair_by_pair(tmp_path):
    right = {named.FULL: [1, 1, 1, 0], "ours": [1, 0, 0, 0]}
    rows = [
        TaskRow(name, "kivi", "code", 1500, number, "x", "y", bool(value))
        for name, values in right.items()
        for number, value in enumerate(values)
    ]
    result = TasksResult("m", 128, 0, rows, {}, HERE)
    full, ours = tables.tasks_table(result).values.tolist()
    assert full == ["code", "1,500", named.FULL, "3 of 4", "0.75", "0.30 to 0.95", "–", "–", "–"]
    assert ours[3:] == ["1 of 4", "0.25", "0.05 to 0.70", "2", "0", "0.50"]
    evaluation.save_result(result, tmp_path / "tasks.json")
    assert evaluation.load_result(tmp_path / "tasks.json") == result


def test_page_has_both(tmp_path):
    """And says so where there is none."""
    evaluation.save_result(a_result(), tmp_path / "quality-a.json")
    page = report.write_report(tmp_path, tmp_path / "quality.md")[0]
    assert "`python -m modules.evaluation free --model MODEL`" in page.read_text()
    numbers = {"kl_own": 0.5, "kl_own_error": 0.1, "kl_quarters": [0.4, 0.6], "log_p": -2.0, "sequence_kl": 0.7}
    rows = [FreeRow(named.DEFAULTS, "kivi", stored_bits=3.0, **numbers)]
    evaluation.save_result(
        FreeResult("m", "prose", "abc", 4, 1024, 400, 3, 128, rows, HERE), tmp_path / "quality-f.json"
    )
    rows = [TaskRow(name, "kivi", "code", 1500, 0, "x", "y", True) for name in (named.FULL, named.DEFAULTS)]
    evaluation.save_result(TasksResult("m", 128, 0, rows, {}, HERE, HARD), tmp_path / "quality-t.json")
    text = " ".join(report.write_report(tmp_path, page)[0].read_text().replace("**", "").split())
    assert "m: 4 prompts of 1,024 tokens, 400 new tokens, 3 samples each" in text
    assert "| defaults | 3.00 | 0.5000 | 0.1000 | 0.4000 to 0.6000 |" in text
    assert "3 keys of one value, keys of 2 values, chains of 2 variables; arithmetic of numbers up to 9" in text
    assert "| code | 1,500 | defaults | 1 of 1 | 1.00 | 0.21 to 1.00 | 0 | 0 | 1.00 |" in text
    assert "Not measured yet: `python -m modules.evaluation free" not in text


def test_commands(model_folder, tmp_path, capsys, without_numba):  # noqa: F811
    (tmp_path / "hay.txt").write_text(FILLER)
    common = ["--model", model_folder, "--options", "k_bits=2", "--device", "cpu", "--output", tmp_path / "r.json"]
    few = ["--questions", 1, "--haystacks", 1, "--shot-tokens", 600, "--tasks", "arithmetic"]
    assert run("tasks", *common, *few, "--filler", tmp_path / "hay.txt") == 0
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["kind"] == "tasks" and saved["settings"] == {"keys": 8, "values": 2, "hops": 1, "largest": 50}
    few = ["--prompts", 2, "--prompt-tokens", 200, "--new-tokens", 4, "--seeds", 2]
    assert run("free", *common, *few) == 0
    assert [row.name for row in evaluation.load_result(tmp_path / "r.json").rows][2:] == ["k_bits=2"]
    assert "right answers" in capsys.readouterr().out
    for arguments, message in (
        (["tasks", "--model", "m", "--tasks", "chess"], "--tasks must be some of needles, arithmetic, code; got chess"),
        (["tasks", "--model", "m", "--keys", 0], "keys must be a whole number from 1 to 80; got 0"),
        (["tasks", "--model", "m", "--questions", 0], "--questions must be 1 or more"),
        (["free", "--model", "m", "--seeds", 1], "--seeds must be 2 or more"),
    ):
        assert run(*arguments) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
