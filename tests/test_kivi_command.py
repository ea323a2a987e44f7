"""The command `kivi`: its figures are those of real caches and of the documents, and its conversations those of a model."""

import importlib.util
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pages
import pytest
import torch
from conftest import make_pair, real_model_path
from transformers import LlamaConfig, MistralConfig

from modules.cache.plan import planned_cache
from modules.cli import __main__ as kivi
from modules.cli.generate import loading, streaming
from modules.cli.generate.conversation import Conversation, turn_text
from modules.cli.memory.figures import Plan, model_config, weight_bytes
from modules.cli.presets import PRESETS
from modules.cli.sizes import parse_bytes, parse_tokens
from modules.cli.status import UserError
from modules.kivi_cache_general import KIVICache
from modules.options import KIVIOptions

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = pages.DOCS / "command.md"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(*arguments) -> int:
    """The exit status."""
    try:
        return kivi.main([str(argument) for argument in arguments])
    except SystemExit as mistake:  # in the flags
        return mistake.code


def figures(capsys, *arguments) -> dict:
    """What `kivi memory --json` prints: that and nothing else."""
    assert run("memory", *arguments, "--json") == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


# --- the command ---------------------------------------------------------------


def test_help_needs_no_torch():
    code = (
        "import sys; from modules.cli.__main__ import main\n"
        "for arguments in (['--help'], ['memory', '--help'], ['generate', '--help'], ['benchmark', '--help']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'transformers', 'numba'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in kivi.COMMANDS) and "--gpu-memory" in done.stdout


@pytest.mark.parametrize("name", kivi.COMMANDS)
def test_every_command_answers_help(name, capsys):
    entry = kivi.COMMANDS[name]
    if importlib.util.find_spec(entry.run.rsplit(".", 1)[0]) is None:
        pytest.skip(f"no {entry.run} yet")
    assert run(name, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: kivi {name}" in out and f"kivi {name} " in out.split("Examples:")[1]


def test_mistakes(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for arguments, status, message in (
        ([], 2, ""),
        (["memroy"], 2, "did you mean 'memory'?"),
        (["memory"], 2, "MODEL"),
        (["memory", "llama-3-8b", "--tokens", "many"], 2, "--tokens must be a number of tokens"),
        (["memory", "llama-3-8b", "--gpu-memory", "24"], 2, "--gpu-memory must be a size with its unit"),
        (["memory", "llama-3-8b", "--pairs", "2"], 2, "--pairs must be bits of keys and of values"),
        (["memory", "llama-3-8b", "--k-bits", "3"], 2, "'3'"),
        (["memory", "llama-3-8b", "--batch", "0"], 2, "--batch must be 1 or more"),
        (["memory", "llama-9-8b"], 1, "there is no file or folder llama-9-8b"),
        (["memory", tmp_path / "nothing.json"], 1, "there is no file or folder"),
        (["memory", tmp_path / "config.json"], 1, "model_type"),
        (
            ["memory", "llama-3-8b", "--group-size", "40", "--residual-length", "80"],
            1,
            "group_size must divide head_dim",
        ),
        (["memory", "llama-3-8b", "--plot", "x.doc"], 1, "--plot must end in .svg"),
        (["memory", "llama-2-70b", "--gpu-memory", "24GB"], 1, "nothing is left for a cache"),
        (["generate", "m", "--json", "--chat"], 2, "--json is for --prompt"),
        (["generate", "m", "--prompt", "x", "--top-p", "0"], 2, "--top-p must be above 0"),
        (["generate", "m", "--prompt", "x", "--save-cache", "nowhere/c"], 2, "there is no folder nowhere"),
        (["generate", "nothing", "--prompt", "x"], 1, "there is no file or folder nothing"),
        (["generate", tmp_path, "--prompt", "x"], 1, "model_type"),
        (["generate", tmp_path, "--gguf-file", "a.gguf", "--prompt", "x"], 1, "there is no file a.gguf"),
        (["benchmark", "nothing"], 1, "there is no file or folder nothing"),
    ):
        assert run(*arguments) == status, arguments
        error = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert message in error and "Traceback" not in error, (arguments, error)


def test_sizes_as_people_write_them():
    assert [parse_tokens(text, "") for text in ("4096", "32k", "1.5K", "4_096", "1m")] == [
        4096,
        32768,
        1536,
        4096,
        1 << 20,
    ]
    assert [parse_bytes(text, "") for text in ("24GB", "1.5 kB", "2GiB", "7B")] == [24 * 10**9, 1500, 2 << 30, 7]
    for text in ("", "k", "-1", "0", "1.0001k", "3x"):
        with pytest.raises(ValueError, match="--tokens"):
            parse_tokens(text, "--tokens")


# --- memory --------------------------------------------------------------------


def test_ten_planned_caches_take_what_real_ones_do():
    """To the byte, in all that is counted: batches, odd lengths, 16 bits on a side, pieces, reserved room, sliding layers."""
    draw = random.Random(13)
    for case in range(10):
        bits = draw.choice([(2, 2), (4, 2), (16, 2), (8, 16), (16, 16), (4, 8)])
        group = draw.choice([16, 32])
        head_dim, heads, layers, batch = (
            draw.choice([64, 128]),
            draw.choice([1, 2]),
            draw.choice([1, 3]),
            draw.choice([1, 2, 5]),
        )
        tokens, chunk, reserve = draw.randint(1, 1500), draw.choice([None, 1, 7, 100]), draw.random() < 0.3
        dtype = draw.choice([torch.float16, torch.float32])
        options = KIVIOptions(
            *bits, group_size=group, residual_length=group * draw.choice([0, 1, 4]), sink_length=draw.choice([0, 4]),
            k_range=draw.choice(["lsq", "minmax"]), backend="torch",
        )  # fmt: skip
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
        config = LlamaConfig(hidden_size=heads * head_dim, **sizes)
        if case == 9:
            config = MistralConfig(hidden_size=heads * head_dim, sliding_window=50, **sizes)
        real = KIVICache(config, options, max_length=tokens if reserve else None)
        with torch.no_grad():
            for length in real.ledger.pieces(tokens, chunk):
                states = torch.randn(batch, heads, length, head_dim).to(dtype)
                for layer in range(layers):
                    real.update(states, states, layer)
        planned = planned_cache(
            config, tokens, batch_size=batch, options=options, dtype=dtype, chunk=chunk, reserve=reserve
        )
        assert planned.get_cache_info() == real.get_cache_info()


def test_planning_takes_no_memory_and_refuses_what_a_cache_refuses():
    config = model_config("llama-3.1-70b")
    info = planned_cache(config, 1 << 20, batch_size=64).get_cache_info()
    assert info["bytes"]["total"] > 1e12
    for arguments, message in (
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": 1, "batch_size": 0}, "batch_size must be 1 or more"),
        ({"tokens": 1, "chunk": 0}, "chunk must be"),
        ({"tokens": 1, "options": KIVIOptions(k_bits=[2, 4])}, "2 entries for 80 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            planned_cache(config, **arguments)


def test_the_table_of_the_documents(capsys):
    """Average bits, compression and memory of 2 bits, window 128, as `kivi memory` has them by default."""
    rows = figures(capsys, "llama-3.1-8b")["rows"]
    found = [
        (row["tokens"], row["nominal"]["bits"], row["nominal"]["ratio"], 100 / row["nominal"]["ratio"]) for row in rows
    ]
    expected = [
        (256, 9.00, 1.78, 56.2), (512, 5.50, 2.91, 34.4), (1024, 3.75, 4.27, 23.4), (2048, 2.88, 5.57, 18.0),
        (4096, 2.44, 6.56, 15.3), (8192, 2.22, 7.21, 13.9), (32768, 2.06, 7.78, 12.9),
    ]  # fmt: skip
    assert [row[0] for row in found] == [row[0] for row in expected]
    for (_, bits, ratio, share), (_, *rounded) in zip(found, expected):
        assert bits == pytest.approx(rounded[0], abs=0.006)  # the last row was rounded up
        assert ratio == pytest.approx(rounded[1], abs=0.008)
        assert share == pytest.approx(rounded[2], abs=0.1)


def test_figures_of_the_documents(capsys):
    (row,) = figures(capsys, "llama-3-8b", "--tokens", "100000")["rows"]
    assert round(row["float16_bytes"] / 1e9, 1) == 13.1
    (row,) = figures(capsys, "llama-2-7b", "--tokens", "32k")["rows"]
    assert row["float16_bytes"] == 16 << 30


def test_layers_of_their_own_bits_add_up(capsys):
    mixed, two, four = (
        figures(capsys, "smollm2-135m", "--tokens", "4k", "--k-bits", *bits)["rows"][0]
        for bits in ([2, 4, 4] * 10, [2], [4])
    )
    for what in ("nominal", "stored"):
        assert mixed[what]["bytes"] == pytest.approx((two[what]["bytes"] + 2 * four[what]["bytes"]) / 3)


def test_what_fits_is_the_most_that_fits(capsys):
    result = figures(
        capsys,
        "llama-3-8b",
        "--tokens",
        "8k",
        "--batch",
        3,
        "--pairs",
        "2,2",
        "4,8",
        "--gpu-memory",
        "24GB",
        "--chunk",
        64,
    )
    room = 23 * 10**9 - result["gpu"]["weights_bytes"]
    assert result["gpu"]["room_bytes"] == room
    for fit, bits in zip([*result["gpu"]["fits"], result["gpu"]["float16"]], [(2, 2), (4, 8), None]):

        def size(tokens, batch, bits=bits):
            row = Plan(model_config("llama-3-8b")).row(KIVIOptions(*bits or (2, 2)), tokens, batch)
            return row["stored"]["bytes"] if bits else row["float16_bytes"]

        longest, largest = fit["longest_context"], fit["largest_batch"]["8192"]
        assert size(longest, 3) <= room < size(longest + 1, 3)
        assert size(8192, largest) <= room < size(8192, largest + 1)
    given = figures(
        capsys, "llama-3-8b", "--tokens", "1k", "--gpu-memory", "24GB", "--weights", "5GB", "--overhead", "0B"
    )["gpu"]
    assert given["room_bytes"] == 19 * 10**9


def test_presets_have_the_parameters_their_models_are_published_with():
    published = {
        "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400,
        "mistral-7b-v0.3": 7_248_023_552, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-32b": 32_763_876_352, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360,
        "smollm2-135m": 134_515_008, "smollm2-1.7b": 1_711_376_384,
    }  # fmt: skip
    for name, count in published.items():
        assert (
            0 <= weight_bytes(model_config(name), torch.float16) - 2 * count < 4096
        )  # beside them, the rotary buffers
    for name in PRESETS:
        assert planned_cache(model_config(name), 1000).get_cache_info()["bytes"]["ratio"] > 1


def test_a_plot_and_a_config_file(capsys, tmp_path):
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    for suffix in (".svg", ".png"):
        plot = tmp_path / f"memory{suffix}"
        assert (
            run("memory", tmp_path / "config.json", "--plot", plot, "--gpu-memory", "80GB", "--tokens", "1k", "4k") == 0
        )
        assert plot.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "2 layers, 32 KV heads of 128" in " ".join(out.split()) and "largest batch at 4,096" in out


# --- generate ------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, chat_tokenizer):
    """A small stock Llama with a tokenizer of characters and a chat template, on disk."""
    folder = tmp_path_factory.mktemp("model")
    make_pair("llama")[0].save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def conversation(chat_tokenizer):
    """At 16 bits: what it says is what the stock model says."""
    model = make_pair("llama")[1]
    return Conversation(model, chat_tokenizer, model.create_kivi_cache(k_bits=16, v_bits=16, backend="torch"))


def said_by_the_stock_model(conversation, text: str, count: int) -> list[int]:
    """The likeliest tokens after a text, by full forwards."""
    stock, _ = make_pair("llama")
    ids = conversation.tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, stock(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, start:].tolist()


def test_turns_go_on_from_what_was_said(conversation):
    """The tokens of each answer are those of the stock model after the whole conversation, as the template writes it."""
    text = ""
    for turn, question in enumerate(("one", "two", "three")):
        text += f"{'|' if turn else ''}<user>{question}|<assistant>"
        expected = said_by_the_stock_model(conversation, text, 9)
        answer_text, result = conversation.ask(question, max_new_tokens=9)
        assert result.tokens == expected and not result.interrupted
        assert conversation.tokens[-9:] == expected
        assert conversation.cache.get_seq_length() == len(conversation.tokens) - 1  # the last one is not fed yet
        text += conversation.tokenizer.decode(expected)
        assert answer_text == conversation.tokenizer.decode(expected)


def test_a_stop_token_is_of_no_turn(conversation):
    """The template writes what ends an answer; whatever token ended it is not in the history."""
    expected = said_by_the_stock_model(conversation, "<user>one|<assistant>", 9)
    stop = next(token for i, token in enumerate(expected) if i > 0 and token not in expected[:i])
    conversation.model.generation_config.eos_token_id = stop
    _, result = conversation.ask("one", max_new_tokens=9)
    assert result.tokens == expected[: expected.index(stop) + 1]
    assert stop not in conversation.tokens[-len(result.tokens) + 1 :]
    assert conversation.cache.get_seq_length() == len(conversation.tokens)
    conversation.model.generation_config.eos_token_id = None


def test_ctrl_c_in_an_answer_keeps_it(conversation):
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    text, result = conversation.ask("one", max_new_tokens=30, write=write)
    assert result.interrupted and 4 <= len(result.tokens) < 30 and text == "".join(pieces)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    expected = said_by_the_stock_model(conversation, f"<user>one|<assistant>{text}|<user>two|<assistant>", 6)
    assert conversation.ask("two", max_new_tokens=6)[1].tokens == expected


def test_ctrl_c_in_a_prompt_drops_the_turn(conversation, monkeypatch):
    conversation.ask("one", max_new_tokens=3)
    before = list(conversation.tokens)
    layer = conversation.model.model.layers[-1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT))
        text, result = conversation.ask("two", max_new_tokens=5)
    assert (text, result.tokens, result.interrupted) == ("", [], True)
    assert (
        conversation.tokens[: len(before) - 1] == before[:-1] and conversation.cache.get_seq_length() == len(before) - 1
    )
    assert len(conversation.ask("two", max_new_tokens=5)[1].tokens) == 5


def test_a_turn_beyond_the_context_changes_nothing(conversation):
    conversation.ask("one", max_new_tokens=3)
    before = list(conversation.tokens)
    with pytest.raises(UserError, match="the model's limit is 2048"):
        conversation.ask("x" * 2040, max_new_tokens=10)
    assert conversation.tokens == before


def test_templates_without_earlier_answers_are_refused(chat_tokenizer):
    tokenizer = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    assert turn_text(tokenizer, "x", first=True) == "x"
    with pytest.raises(UserError, match="leaves out earlier answers"):
        turn_text(tokenizer, "x", first=False)


def test_draws():
    logits = torch.tensor([[0.0, 2.0, 1.0, -3.0]])
    assert streaming.drawn(0)(logits).item() == 1
    one, other = (streaming.drawn(1.5, seed=3) for _ in range(2))
    first, second = ([choose(logits).item() for _ in range(40)] for choose in (one, other))
    assert first == second and len(set(first)) > 1
    assert {streaming.drawn(1.0, top_p=0.8, seed=0)(logits).item() for _ in range(20)} <= {1, 2}


def test_generate_prints_answers_alone(model_folder, capsys):
    assert run("generate", model_folder, "--prompt", "one", "--max-new-tokens", 5, "--backend", "torch") == 0
    out, err = capsys.readouterr()
    assert "tokens a second" in err and "in float16" in err and "tokens" not in out
    assert run("generate", model_folder, "--prompt", "one", "--max-new-tokens", 5, "--backend", "torch", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["turns"][0]["text"] + "\n" == out and printed["turns"][0]["new_tokens"] == 5
    assert printed["cache"]["bytes"] > 0 and printed["cache"]["backend"] == "torch"


def test_generate_reads_stdin(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    common = ["--max-new-tokens", 5, "--backend", "torch"]
    assert run("generate", model_folder, *common) == 0
    piped = capsys.readouterr().out
    assert run("generate", model_folder, *common, "--prompt", "one") == 0
    assert capsys.readouterr().out == piped
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run("generate", model_folder) == 2
    assert "stdin is empty" in capsys.readouterr().err
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"one\n\n/stats\n/nothing\n{'x' * 2048}\n/reset\none\n/exit\nnever\n")
    )
    assert run("generate", model_folder, *common, "--chat") == 0
    out, err = capsys.readouterr()
    assert out.count(f"> one\n{piped}") == 2 and "never" not in out
    assert "There is no /nothing" in err and "the model's limit" in " ".join(err.split())


def test_generate_stops_with_130(model_folder, capsys, monkeypatch, tmp_path):
    def answer(*args, on_token, **kwargs):
        result = streaming.Answer([70, 71], 0.1, [0.1], interrupted=True)
        on_token(70)
        return result

    monkeypatch.setattr("modules.cli.generate.conversation.answer", answer)
    saved = tmp_path / "saved.kivi"
    arguments = ["--prompt", "one", "two", "--backend", "torch", "--save-cache", saved]
    assert run("generate", model_folder, *arguments) == 130
    out, err = capsys.readouterr()
    assert "> two" not in out and "F" in out and err.endswith("Stopped.\n") and not saved.exists()


def test_a_saved_conversation_goes_on(model_folder, capsys, tmp_path):
    saved = tmp_path / "saved.kivi"
    common = ["--max-new-tokens", 20, "--backend", "torch", "--residual-length", 32, "--json"]
    long = "what is said here is long enough to be packed, at the length that the window has in this test. " * 2
    assert run("generate", model_folder, *common, "--prompt", long, "two") == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["cache"]["tokens"]["packed"] > 0
    assert run("generate", model_folder, *common, "--prompt", long, "--save-cache", saved) == 0
    capsys.readouterr()
    assert run("generate", model_folder, *common, "--load-cache", saved, "--prompt", "two") == 0
    assert json.loads(capsys.readouterr().out)["turns"][0]["text"] == expected["turns"][1]["text"]
    assert run("generate", model_folder, *common, "--load-cache", saved, "--prompt", "two", "--k-bits", 4) == 1
    assert "k_bits is 2 in the file and 4 here" in capsys.readouterr().err


# --- the page and real models --------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """The commands of the page, one each, and the text that the page says they print, if it does."""
    return [(line, block.output) for block in pages.blocks(PAGE, "bash") for line in block.commands]


def test_the_commands_of_the_page_run(model_folder, without_numba, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    pathlib.Path("report.txt").write_text("What is said here is not much. " * 10)
    assert len(commands()) > 10
    for line, output in commands():
        assert pages.run_kivi(line, model_folder, monkeypatch) == 0, line
        out = capsys.readouterr().out
        if output:
            assert [text.rstrip() for text in out.splitlines()] == [text.rstrip() for text in output.splitlines()], line
    assert pathlib.Path("memory.svg").exists() and pathlib.Path("report.kivi").exists()


@pytest.mark.real_model
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_chat_of_three_turns(family):
    """At 16 bits each token is the stock model's likeliest after those before it; turns are as the template writes them."""
    path = real_model_path(family)
    model, tokenizer = loading.load(path, dtype=torch.float32, k_bits=16, v_bits=16, backend="torch")
    conversation = Conversation(model, tokenizer, model.create_kivi_cache())
    spans = []
    for question in ("My name is Ada. Say hello.", "Name one colour.", "What is my name?"):
        text, result = conversation.ask(question, max_new_tokens=8)
        said = [token for token in result.tokens if token not in streaming.stop_tokens(model, tokenizer)]
        end = len(conversation.tokens)
        spans.append(range(end - len(said), end))
        assert conversation.tokens[end - len(said) :] == said and text == tokenizer.decode(said)
    stock, _ = loading.load(path, stock=True, dtype=torch.float32)
    with torch.no_grad():
        likeliest = stock(torch.tensor([conversation.tokens])).logits[0].argmax(-1).tolist()
    for place in (place for span in spans for place in span):
        assert conversation.tokens[place] == likeliest[place - 1]
    rendered = tokenizer.decode(conversation.tokens)
    assert rendered.count("<|im_start|>user\n") == 3 and rendered.count("<|im_end|>\n<|im_start|>user\n") == 3
