"""lm-eval over a KIVI model: log-likelihoods of a quantized past, alone and in padded batches."""

import functools
import json
import pathlib

import pytest
import torch
from conftest import real_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_llama_kivi import load_llama_kivi

pytest.importorskip("lm_eval", reason="lm-eval is not installed: `pip install lm-eval`")

import yaml  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

pytestmark = pytest.mark.real_model

DATA = pathlib.Path(__file__).parent / "data"
CHUNK = {"residual_length": 32, "prefill_chunk": 32}  # short, so that most of a passage is read from codes


@pytest.fixture(scope="module")
def task():
    """The task of the data folder, with the path of its data file made absolute."""
    config = yaml.safe_load((DATA / "long_passages.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    files["test"] = str(DATA / files["test"])
    return config


@pytest.fixture(scope="module")
def score(task, tmp_path_factory):
    """A function: log-likelihoods of every answer of the task, `[documents, answers]`, by cache and batch size."""
    path = str(real_model_path("llama"))
    manager = TaskManager(include_defaults=False)  # reading the thousands of lm-eval's own takes a minute
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))

    @functools.cache
    def evaluate(bits: int, batch_size: int = 1, use_kivi_cache: bool = True) -> torch.Tensor:
        model, tokenizer = load_llama_kivi(path, dtype=torch.float32, k_bits=bits, v_bits=bits, **CHUNK)
        model.use_kivi_cache = use_kivi_cache
        lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        results = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, random_seed=0)
        assert results["results"]["long_passages"]["acc,none"] is not None
        samples = sorted(results["samples"]["long_passages"], key=lambda sample: sample["doc_id"])
        return torch.tensor([[answer[0] for answer in sample["filtered_resps"]] for sample in samples])

    yield evaluate
    patch.undo()


@pytest.fixture(scope="module")
def stock(score):
    """Full precision's: the KIVI cache is off, which makes it the stock model."""
    return score(2, use_kivi_cache=False)


def test_sixteen_bits_give_the_stock_log_likelihoods(score, stock):
    assert stock.shape == (6, 2) and bool((stock < 0).all())
    torch.testing.assert_close(score(16), stock, atol=1e-4, rtol=0)


def test_two_bits_differ_a_little(score, stock):
    difference = (score(2) - stock).abs()
    assert difference.max() > 0.01  # else the forward would not read codes
    assert difference.mean() < 0.5


def test_four_bits_are_nearer(score, stock):
    """By the square root of what they are nearer in KL divergence, which is about a sixth."""
    two, four = ((score(bits) - stock).abs().mean() for bits in (2, 4))
    assert four < 0.1 and four < 0.5 * two


def test_a_padded_batch_scores_as_single_documents_do(score):
    torch.testing.assert_close(score(2, batch_size=4), score(2), atol=0.05, rtol=0)  # a tie may move a scale by a step


def test_stock_flag_is_the_stock_class(stock):
    """`use_kivi_cache=False` against transformers' own class."""
    path = real_model_path("llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    document = json.loads((DATA / "long_passages.jsonl").read_text().splitlines()[0])
    context = f"{document['passage']}\nQuestion: {document['question']}\nAnswer:"
    for choice, expected in zip(document["choices"], stock[0]):
        ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            log_probs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        total = log_probs.gather(1, ids[0, start:].unsqueeze(1)).sum()
        assert total.item() == pytest.approx(expected.item(), abs=1e-3)


def test_the_script_evaluates_a_stock_model_with_a_cache_attached(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(DATA.parents[1] / "examples"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    import lm_eval_kivi

    flags = f"--model {real_model_path('llama')} --tasks {DATA / 'long_passages.yaml'} --device cpu --dtype float32"
    flags += " --backend torch --residual-length 32 --prefill-chunk 32 --limit 2"
    monkeypatch.setattr("sys.argv", ["lm_eval_kivi.py", *flags.split()])
    lm_eval_kivi.main()
    printed = capsys.readouterr().out
    results = json.loads(printed[printed.index("{\n") :])
    assert results["long_passages"]["sample_len"] == 2 and 0 <= results["long_passages"]["acc,none"] <= 1
