"""`kivi serve` against real clients: OpenAI's own package, and one that sends nonsense. Everything stays on 127.0.0.1."""

import asyncio
import contextlib
import functools
import gc
import http.client
import itertools
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pages
import pytest
import torch
from conftest import make_pair, real_model_path, relative_error, tokens
from test_kivi_command import TEMPLATE, run

from modules.calibration import calibrate
from modules.cli.generate import loading
from modules.cli.generate.streaming import answer, drawn, likeliest, stop_tokens
from modules.kivi_cache_general import KIVICache
from modules.serving.engine import PAUSE_TOKENS, Engine
from modules.serving.flags import Serve
from modules.serving.job import Done, Failed, Job, Piece
from modules.serving.pauses import pausing
from modules.serving.prefixes import PrefixCache
from modules.serving.run import Server, served_by
from modules.serving.stops import StopText

PAGE = pages.DOCS / "server.md"
LETTERS = "abcdefghijklmnopqrstuvwxyz "
SINKS, GROUP, RESIDUAL = 4, 16, 32  # of the small models


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@contextlib.contextmanager
def serving(model, tokenizer, **flags):
    """A server in a thread; gives its host and port, and its engine."""
    command = Serve(model="tiny", port=0, **flags)
    server = Server(served_by(command, model, tokenizer), command)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.addresses:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        yield server.addresses[0], server.served.engine
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(chat_tokenizer):
    with serving(make_pair("llama", backend="torch")[1], chat_tokenizer) as started:
        yield started


def client_of(address, **more) -> openai.OpenAI:
    host, port = address
    return openai.OpenAI(
        base_url=f"http://{host}:{port}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | more
    )


@pytest.fixture
def client(server):
    with client_of(server[0]) as client:
        yield client


def text_of(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=length))


@functools.cache
def kivi_model(**options):
    return make_pair("llama", backend="torch", **options)[1]


def alone(tokenizer, prompt: str, count: int, **options) -> str:
    """The answer of a model of its own with a cache of its own."""
    return answer_of(kivi_model(**options), tokenizer, prompt, count)


def answer_of(model, tokenizer, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    said = answer(model, ids, model.create_kivi_cache(), max_new_tokens=count, stop=stop_tokens(model, tokenizer))
    return tokenizer.decode(said.tokens)


def ask_together(address, prompts, counts, watch=lambda: None) -> list[str]:
    """The answers to prompts that are asked all at once, streamed."""

    async def ask(client, prompt, count):
        text = ""
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=count, temperature=0, stream=True
        )
        async for chunk in stream:
            watch()
            text += chunk.choices[0].text
        return text

    async def ask_all():
        host, port = address
        async with openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.wait_for(asyncio.gather(*map(ask, itertools.repeat(client), prompts, counts)), 120)

    return asyncio.run(ask_all())


def post(address, body, path="/v1/chat/completions", method="POST", **headers) -> tuple[int, dict]:
    """Status and JSON of a request as it is given; headers with _ for -."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, data, {k: v for k, v in named.items() if v is not None})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def chat(**more) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3} | more


def until(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# --- answers -------------------------------------------------------------------


def test_both_kinds_of_answers_streamed_and_whole(client, chat_tokenizer):
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 20}
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    expected = alone(chat_tokenizer, "<system>be|<user>hi|<assistant>", 20)
    whole = client.chat.completions.create(messages=messages, **asked)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (31, 20, 51)
    chunks = list(
        client.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **asked)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 20 and len({chunk.id for chunk in chunks}) == 1

    expected = alone(chat_tokenizer, "abc", 20)
    assert client.completions.create(prompt="abc", **asked).choices[0].text == expected
    assert client.completions.create(prompt=[97, 98, 99], **asked).choices[0].text == expected
    assert "".join(c.choices[0].text for c in client.completions.create(prompt="abc", stream=True, **asked)) == expected
    assert client.completions.create(model="tiny", prompt="abc").usage.completion_tokens == 16


def test_32_streams_get_what_each_gets_alone(server, chat_tokenizer):
    """Of prompts of 3 to 400 tokens and answers of 5 to 98, eight at a time: sequences come, go and flush at different times."""
    prompts = [text_of(seed, 3 + 128 * seed // 10) for seed in range(32)]
    counts = [5 + 3 * (7 * seed % 32) for seed in range(32)]
    running: list[int] = []
    answers = ask_together(server[0], prompts, counts, watch=lambda: running.append(server[1].running))
    assert max(running) > 4
    for prompt, count, text in zip(prompts, counts, answers):
        assert text == alone(chat_tokenizer, prompt, count)


def test_static_int8_is_served_together_and_from_kept_caches(chat_tokenizer, tmp_path):
    """By the file that the config names. Static codes are the past of every token alike, so kept caches change nothing."""
    stock, model = make_pair("llama", backend="torch")
    spec = [{"type": "dynamic_cache", "qconfig": {}}]
    calibrate(stock, spec, [tokens(4, 99, seed=1)], progress=False).save(tmp_path / "int8.safetensors")
    model.static = str(tmp_path / "int8.safetensors")
    prompts = [text_of(seed, 40 + 25 * seed) for seed in range(6)]
    with serving(model, chat_tokenizer) as (address, engine):
        running: list[int] = []
        answers = ask_together(address, prompts, [30] * 6, watch=lambda: running.append(engine.running))
        assert max(running) > 2 and until(lambda: len(engine.prefixes) == 6)
        assert answers == [answer_of(model, chat_tokenizer, prompt, 30) for prompt in prompts]
        longer = [*(f"{prompt}{said} and?" for prompt, said in zip(prompts, answers)), prompts[5][:100] + "or?"]
        assert ask_together(address, longer, [20] * 7) == [
            answer_of(model, chat_tokenizer, prompt, 20) for prompt in longer
        ]


def job_of(tokenizer, prompt: str, emit, count: int, choose=likeliest) -> Job:
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return Job(ids, tokenizer, emit, max_tokens=count, choose=choose, ends=set(), seconds=600)


def text_in(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


@contextlib.contextmanager
def started(model, **more):
    engine = Engine(model, **{"max_batch": 4, "max_waiting": 9, "cache_memory": 10**7} | more)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def over(*of_jobs: list) -> bool:
    return until(lambda: all(events and not isinstance(events[-1], Piece) for events in of_jobs), 300)


@pytest.mark.parametrize("good", [0, 3])
def test_logits_that_nothing_can_be_drawn_from_end_one_answer_alone(chat_tokenizer, caplog, good):
    """At its first token or in the middle; nothing of it is kept, and those beside it are what they are alone."""
    draw, drawn_so_far = drawn(1.0, seed=0), itertools.count()

    def breaking(logits):
        return draw(logits if next(drawn_so_far) < good else logits * float("nan"))

    prompts, events = [text_of(seed, 70) for seed in range(3)], [[], [], []]
    with started(kivi_model()) as engine, caplog.at_level(logging.CRITICAL, "kivi.serve"):
        for prompt, its, choose in zip(prompts, events, (likeliest, breaking, likeliest)):
            engine.submit(job_of(chat_tokenizer, prompt, its.append, 40, choose))
        assert over(*events) and until(lambda: len(engine.prefixes) == 2)
        assert engine.prefixes.find(chat_tokenizer(prompts[1] + "abc").input_ids) is None
    broken = events[1][-1]
    assert isinstance(broken, Failed) and broken.error.status == 500 and len(text_in(events[1])) == good
    for number in (0, 2):
        assert events[number][-1] == Done("length")
        assert text_in(events[number]) == alone(chat_tokenizer, prompts[number], 40)


@pytest.mark.parametrize("gone", [False, True])
def test_answers_go_on_while_a_prompt_is_fed(chat_tokenizer, gone):
    """Between its layers, and both are what they are alone. A prompt that nobody waits for any more is not fed to its end."""
    model = make_pair("llama", backend="torch")[1]
    forwards: list[int] = []
    prompt = text_of(1, 1500)
    assert 1500 / len(model.model.layers) > PAUSE_TOKENS
    first, second = [], []
    late = job_of(chat_tokenizer, prompt, second.append, 5)

    def begins(_, __, inputs):
        forwards.append(inputs["input_ids"].shape[1])
        late.cancelled = gone and forwards[-1] == 1500

    model.register_forward_pre_hook(begins, with_kwargs=True)
    model.register_forward_hook(
        lambda _, __, inputs, ___: forwards.append(-inputs["input_ids"].shape[1]), with_kwargs=True
    )
    with started(model) as engine:

        def emit(event):
            if not first:
                engine.submit(late)
            first.append(event)

        engine.submit(job_of(chat_tokenizer, "abc", emit, 40))
        assert over(first) and (gone or over(second))
    if gone:
        assert -1500 not in forwards and not second
    else:
        meanwhile = forwards[forwards.index(1500) + 1 : forwards.index(-1500)]
        assert meanwhile == [1, -1] * (len(model.model.layers) - 1)
        assert text_in(second) == alone(chat_tokenizer, prompt, 5)
    assert text_in(first) == alone(chat_tokenizer, "abc", 40)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


@torch.no_grad()
def test_pauses_come_by_the_work_that_is_done():
    model, paused = make_pair("llama", backend="torch")[1], []
    for length, every, expected in ((30, 31, 0), (30, 20, 1), (30, 10, 2), (30, 1, 2)):
        paused.clear()
        with pausing(model, every, lambda: paused.append(model(tokens(1, 5)).logits)):
            model(tokens(1, length), past_key_values=model.create_kivi_cache())
        assert len(paused) == expected, (length, every)


def test_each_of_a_batch_is_drawn_its_own_way(client):
    """A seed gives the same answer whatever runs beside it; another one gives another."""
    settings = [{"temperature": 0}, *({"temperature": 1.5, "top_p": 0.9, "seed": seed} for seed in (1, 2, 1))]

    def ask(more):
        return client.completions.create(model="tiny", prompt="abc", max_tokens=40, **more).choices[0].text

    one_by_one = [ask(more) for more in settings]
    together: list[str] = [""] * 4
    threads = [
        threading.Thread(target=lambda i=i, more=more: together.__setitem__(i, ask(more)))
        for i, more in enumerate(settings)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == one_by_one and together[1] == together[3] and len(set(together)) == 3


def test_texts_that_end_an_answer(client, chat_tokenizer):
    whole = alone(chat_tokenizer, "abc", 60)
    stop = whole[20:23]
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 60, "temperature": 0}
    given = client.completions.create(stop=["never there", stop], **asked).choices[0]
    assert given.text == whole[: whole.index(stop)] and given.finish_reason == "stop"
    pieces = [c.choices[0] for c in client.completions.create(stop=stop, stream=True, **asked)]
    assert "".join(piece.text for piece in pieces) == given.text and pieces[-1].finish_reason == "stop"


def test_a_text_that_may_begin_a_stop_is_held_back():
    for pieces, stops, expected, found in (
        (["a", "b", "c"], [], ["a", "b", "c"], False),
        (["xa", "b", "y"], ["abc"], ["x", "aby"], False),
        (["xa", "b", "cz"], ["abc"], ["x"], True),
        (["aab", "c"], ["ab"], ["a"], True),
        (["a"], ["ab"], ["a"], False),
    ):
        written: list[str] = []
        text = StopText(stops, written.append)
        for piece in pieces:
            text.put(piece)
        text.end()
        assert (written, text.found) == (expected, found)


# --- kept caches ---------------------------------------------------------------


def test_turns_over_kept_caches_are_those_of_the_whole_history(chat_tokenizer):
    """At 16 bits exactly: the next turn, an earlier one asked anew, and two that go on from the same history at once."""
    model = make_pair("llama", backend="torch", k_bits=16, v_bits=16)[1]
    with serving(model, chat_tokenizer) as (address, engine), client_of(address) as client:
        messages = [{"role": "user", "content": text_of(1, 300)}]

        def ask(messages, count=30):
            reply = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=count)
            prompt = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            text = reply.choices[0].message.content
            assert text == alone(chat_tokenizer, prompt, count, k_bits=16, v_bits=16)
            return text, reply.usage

        def turn(text, said):
            return [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": text}]

        said, usage = ask(messages)
        assert usage.prompt_tokens_details.cached_tokens == 0
        _, usage = ask(turn("and then?", said))
        history = len(f"<user>{messages[0]['content']}|<assistant>{said}")
        assert usage.prompt_tokens_details.cached_tokens == history - 1  # the last token was never fed
        assert len(engine.prefixes) == 1  # the longer one took its place
        _, usage = ask(turn("or rather?", said))
        shared = history + len("|<user>")  # and no group of the first answer is cut
        assert usage.prompt_tokens_details.cached_tokens == SINKS + (shared - SINKS - RESIDUAL) // GROUP * GROUP
        assert len(engine.prefixes) == 2
        _, usage = ask([{"role": "user", "content": text_of(2, 300)}])
        assert usage.prompt_tokens_details.cached_tokens == 0 and len(engine.prefixes) == 3


def test_a_kept_cache_is_found_by_its_tokens_and_stays_as_it_is():
    model = make_pair("llama", backend="torch")[1]

    def cache_of(tokens):
        cache = model.create_kivi_cache()
        with torch.no_grad():
            model(torch.tensor([tokens]), past_key_values=cache)
        return cache

    one, other = [5] * 110, [5] * 60 + [6] * 50
    caches = [cache_of(one), cache_of(other)]
    size = caches[0].get_cache_info()["bytes"]["total"]
    kept = PrefixCache(2 * size, worth=36)
    for held, cache in zip((one, other), caches):
        kept.keep(held, cache)
    assert len(kept) == 2 and kept.size == 2 * size
    assert kept.find([5] * 35 + [7] * 9) is None  # too little
    assert kept.find([*other[:104], 7]).get_seq_length() == 104
    assert kept.find(one).get_seq_length() == 109  # one token is left to be fed
    found = kept.find([*one, 7])
    with torch.no_grad():
        model(torch.tensor([[7, 8]]), past_key_values=found)
    assert found.get_seq_length() == 112 and caches[0].get_seq_length() == 110
    kept.keep([9] * 110, cache_of([9] * 110))  # `other` was used least lately
    assert len(kept) == 2 and kept.find([*other[:90], 7]) is None and kept.size == 2 * size
    kept.keep([9] * 60, cache_of([9] * 60))
    assert len(kept) == 2  # it is the beginning of one that is there
    PrefixCache(0, 1).keep(one, caches[0])


@pytest.mark.parametrize("kept_length", [300, 317])
@torch.no_grad()
def test_a_cut_conversation_is_as_one_that_was_never_longer(kept_length):
    """Cut at every token: at the ends of sinks, groups and window. Without wide channels, which are chosen by what was fed first.

    What stays packed is what would be packed alone, and no token in full precision was ever packed. Where all that is shared
    is kept, the tokens that follow get the logits that they get alone. Up to codes at whose edges floats of larger matrices lie.
    """
    model = make_pair("llama", backend="torch", k_bits=4, v_bits=2, wide_channels=0)[1]
    ids, new = tokens(1, kept_length), tokens(1, 40, seed=7)
    cache = model.create_kivi_cache()
    model(ids, past_key_values=cache)
    kept = PrefixCache(10**9, worth=SINKS + RESIDUAL + GROUP)
    kept.keep(ids[0].tolist(), cache)
    lengths = set()
    for shared in range(SINKS + 1, kept_length + 1):
        found = kept.find([*ids[0, :shared].tolist(), *new[0].tolist()])
        alone_packed = max(0, (shared - SINKS - RESIDUAL) // GROUP * GROUP)
        in_window = alone_packed > kept_length - SINKS - RESIDUAL - GROUP
        expected = shared if in_window else SINKS + alone_packed
        if expected < kept.worth:
            assert found is None
            continue
        assert found.get_seq_length() == expected and found.ledger.packed == [alone_packed]
        lengths.add(expected)
        if shared % 5 and shared % GROUP not in (SINKS, SINKS + 1, SINKS - 1):
            continue
        alone_cache = model.create_kivi_cache()
        model(ids[:, :shared], past_key_values=alone_cache)
        assert alone_cache.ledger.packed == [alone_packed]
        for mine, its in zip(found.kivi_layers, alone_cache.kivi_layers):
            for side in range(2):
                states, expected_states = (
                    layer.dense(layer.store.sides[side])[:, :, :expected] for layer in (mine, its)
                )
                assert relative_error(states, expected_states) < 1e-3
        if in_window:
            for each in (found, alone_cache):
                model(new[:, :5], past_key_values=each)
            for token in new[0, 5:]:
                logits, alone_logits = (model(token.view(1, 1), past_key_values=c).logits for c in (found, alone_cache))
                assert relative_error(logits, alone_logits) < 1e-3
        elif expected < shared:
            model(ids[:, expected:shared], past_key_values=found)
            assert found.ledger.packed == alone_cache.ledger.packed and found.ledger.lengths == [shared]
    assert len(lengths) > 20


def test_cut_conversations_and_second_turns_are_those_of_the_whole_history(chat_tokenizer):
    """At 16 bits exactly, at and beside each end of sinks, groups and window."""
    model = make_pair("llama", backend="torch", k_bits=16, v_bits=16)[1]
    with serving(model, chat_tokenizer) as (address, _), client_of(address) as client:

        def ask(prompt, count):
            reply = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=count)
            assert reply.choices[0].text == alone(chat_tokenizer, prompt, count, k_bits=16, v_bits=16)
            return reply.choices[0].text, reply.usage.prompt_tokens_details.cached_tokens

        whole = text_of(3, 260)
        said, cached = ask(whole, 20)
        assert cached == 0
        ends = {SINKS, SINKS + RESIDUAL, *(SINKS + RESIDUAL + GROUP * n for n in range(1, 15))}
        found = 0
        for number, length in enumerate(sorted(end + by for end in ends for by in (-1, 0, 1))):
            prompt = (whole + said)[:length] + text_of(100 + number, 3)
            text, cached = ask(prompt, 4)
            assert cached <= length + 3
            found += cached > 0
            if number % 6 == 0:
                _, cached = ask(prompt + text + "?", 4)
                assert cached == 0 or cached >= length
        assert found > 20


def caches_alive() -> list[KIVICache]:
    """By their own class: what other objects say theirs is may have gone."""
    return [each for each in gc.get_objects() if issubclass(type(each), KIVICache)]


def test_memory_stays_within_the_limit_over_500_conversations(chat_tokenizer):
    """The bytes are those of the caches that are alive, counted anew; nothing else holds on to one."""
    model = make_pair("llama", backend="torch")[1]
    limit = 2_000_000
    engine = Engine(model, max_batch=8, max_waiting=500, cache_memory=limit)
    before = caches_alive()  # of other tests; held, so that none goes and leaves its address to a new one
    engine.start()
    ended = threading.Semaphore(0)
    sizes, failed = [], []

    def emit(event):
        if isinstance(event, Done | Failed):
            failed.extend([event] if isinstance(event, Failed) else [])
            sizes.append(engine.prefixes.size)
            ended.release()

    for number in range(500):
        prompt = chat_tokenizer(text_of(number, 55 + number % 40)).input_ids
        job = Job(prompt, chat_tokenizer, emit, max_tokens=2, choose=likeliest, ends=set(), seconds=300)
        engine.submit(job)
    for _ in range(500):
        assert ended.acquire(timeout=120)
    assert until(lambda: not engine.running)
    engine.close()
    assert not failed and max(sizes) <= limit and min(sizes[-100:]) > limit // 2
    gc.collect()
    new = {id(cache) for cache in caches_alive()} - {id(cache) for cache in before}
    assert len(new) == len(engine.prefixes) < 500
    kept = [cache for _, cache, _ in engine.prefixes._kept.values()]
    assert sum(cache.get_cache_info()["bytes"]["total"] for cache in kept) == engine.prefixes.size <= limit


# --- what is refused -----------------------------------------------------------


def said(**more) -> dict:
    return {"role": "assistant", "content": "x"} | more


def test_an_answer_can_be_sent_back_as_the_client_has_it(client):
    """With all fields of OpenAI's client, and as others write what is not there."""
    asked = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    messages = [{"role": "user", "content": "hello"}]
    message = client.chat.completions.create(messages=messages, **asked).choices[0].message
    assert "tool_calls" in message.model_dump()
    follows = {"role": "user", "content": "and?"}

    def texts(back):
        return client.chat.completions.create(messages=[*messages, back, follows], **asked).choices[0].message.content

    plain = texts({"role": "assistant", "content": message.content})
    for back in (
        message,
        message.model_dump(),
        message.model_dump() | {"tool_calls": [], "annotations": [], "refusal": "", "name": None, "function_call": {}},
    ):
        assert texts(back) == plain


def test_errors_say_what_is_wrong(server):
    for body, status, param, message in (
        (chat(model="other"), 404, "model", "there is no model 'other'"),
        (chat(n=2), 400, "n", "one answer a request"),
        (chat(logprobs=True), 400, "logprobs", "not supported"),
        (chat(tools=[]), 400, "tools", "no such field"),
        (chat(temperature="1"), 400, "temperature", "number"),
        (chat(temperature=1e-9), 400, "temperature", "must be 0"),
        (chat(temperature=3), 400, "temperature", "less than or equal to 2"),
        (chat(top_p=0), 400, "top_p", "greater than 0"),
        (chat(stop=["a"] * 5), 400, "stop", "at most 4"),
        (chat(messages=[]), 400, "messages", "at least 1"),
        (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role", "'system', 'user' or 'assistant'"),
        (chat(messages=[{"role": "user", "content": "x", "name": "Ada"}]), 400, "messages.0.name", "no names"),
        (chat(messages=[said(tool_calls=[{"id": "1"}])]), 400, "messages.0.tool_calls", "tools are not supported"),
        (
            chat(messages=[said(function_call={"name": "f"})]),
            400,
            "messages.0.function_call",
            "tools are not supported",
        ),
        (chat(messages=[said(refusal="no")]), 400, "messages.0.refusal", "null or empty"),
        (chat(messages=[said(audio={"id": "1"})]), 400, "messages.0.audio", "null or empty"),
        (chat(messages=[said(annotations=[{}])]), 400, "messages.0.annotations", "null or empty"),
        (chat(messages=[said(content=None)]), 400, "messages.0.content", "string"),
        (chat(max_tokens=2000), 400, "max_tokens", "at most 1024"),
        (chat(max_tokens=2**40), 400, "messages", "the context has 2048 tokens"),
        (chat(messages=[{"role": "user", "content": "x" * 3000}]), 400, "messages", "the prompt has 3018"),
        ({"model": "tiny"}, 400, "messages", "required"),
        (b"{", 400, None, "no JSON"),
        (b"[" * 100_000, 400, None, ""),
        (b"\xff\xfe", 400, None, ""),
    ):
        got, reply = post(server[0], body)
        assert got == status and reply["error"]["param"] == param, reply
        assert message in reply["error"]["message"] and reply["error"]["type"] == "invalid_request_error", reply
    completion = {"model": "tiny", "prompt": [1, 500]}
    assert "got 500" in post(server[0], completion, "/v1/completions")[1]["error"]["message"]
    assert post(server[0], chat(), "/v1/nothing")[0] == 404
    assert post(server[0], chat(), Content_Type="text/plain")[0] == 415
    assert post(server[0], chat(), Host="evil.example")[0] == 403
    assert post(server[0], b" " * 4_000_001)[0] == 413
    assert post(server[0], b"", "/v1/chat/completions", "GET")[0] == 405


def nonsense(draw: random.Random):
    """A request that is wrong in some way."""
    junk = [None, True, -1, 2**70, 1e308, float("nan"), "", "x", "\ud800", [], {}, [[]], {"a": 1}, ["x"] * 50]
    fields = [
        "model",
        "messages",
        "temperature",
        "top_p",
        "stop",
        "max_tokens",
        "n",
        "seed",
        "stream",
        "stream_options",
    ]
    kind = draw.randrange(6)
    if kind == 0:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(1, 200)))
    data = json.dumps(chat()).encode()
    if kind == 1:
        return data[: draw.randrange(len(data))]
    if kind == 2:
        return chat(**{text_of(draw.randrange(10**6), 8).replace(" ", "_") or "x": draw.choice(junk)})
    if kind == 3:
        return draw.choice([b"[" * 5000, b"1" * 5000, b"null", b"[]", b'"x"', b'{"model":' + b'{"a":' * 3000])
    if kind == 4:
        return chat(messages=[{"role": draw.choice(["user", "x", 1]), "content": draw.choice(junk[:6])}])
    return chat(**{draw.choice(fields): draw.choice([*junk[2:6], [[]], {"a": 1}])} | {"never": 1})


def test_200_bad_requests_leave_it_serving(server, client):
    def good():
        return client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0).choices[0].text

    expected, draw = good(), random.Random(0)
    for _ in range(200):
        body = nonsense(draw)
        status, reply = post(server[0], body, draw.choice(["/v1/chat/completions", "/v1/completions"]))
        assert 400 <= status < 500, (body, status, reply)
        assert set(reply["error"]) == {"message", "type", "param", "code"} and reply["error"]["message"]
    assert good() == expected and until(lambda: not server[1].running)


def test_broken_connections_leave_it_serving(server, client):
    for data in (
        b"\x00" * 100,
        b"GET",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\n" * 9,
    ):
        with socket.create_connection(server[0], timeout=10) as connection:
            connection.sendall(data)
    assert client.models.list()


def test_a_key(chat_tokenizer, monkeypatch):
    monkeypatch.setenv("KIVI_API_KEY", "sécret")
    model = make_pair("llama", backend="torch")[1]
    with serving(model, chat_tokenizer, max_body="2kB") as (address, _):
        for given in (None, "Bearer wrong", "Bearer ", "sécret".encode(), b"Bearer \xff"):
            status, reply = post(address, chat(), Authorization=given)
            assert status == 401 and reply["error"]["code"] == "invalid_api_key"
        assert post(address, chat(), Authorization="Bearer sécret".encode())[0] == 200
        assert post(address, b"", "/health", "GET") == (200, {"status": "ok"})
        assert post(address, b"", "/v1/models", "GET")[0] == 401
        assert post(address, b" " * 3000)[0] == 401  # a stranger's body is not read
        assert post(address, b" " * 3000, Authorization="Bearer sécret".encode())[0] == 413


def test_where_it_listens(capsys, monkeypatch):
    monkeypatch.delenv("KIVI_API_KEY", raising=False)
    for arguments, message in (
        (["--host", "0.0.0.0"], "can be reached from other machines: set KIVI_API_KEY"),
        (["--host", "::"], "can be reached from other machines"),
        (["--host", "my.name"], "can be reached from other machines"),
        (["--api-key", ""], "must not be empty"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--cache-memory", "many"], "--cache-memory must be a size"),
        (["--max-batch", "0"], "--max-batch must be 1 or more"),
        (["--grace-seconds", "-1"], "--grace-seconds must be 0 or above"),
    ):
        assert run("serve", "m", *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert Serve(model="m").host == "127.0.0.1"
    for host in ("localhost", "127.0.0.9", "::1"):
        Serve(model="m", host=host)
    Serve(model="m", host="0.0.0.0", api_key="k")


# --- clients and time ----------------------------------------------------------


def test_a_client_that_goes_away_frees_its_place(chat_tokenizer):
    """In the middle of a stream, before the first token, and while it waits for its turn."""
    model = make_pair("llama", backend="torch")[1]
    with serving(model, chat_tokenizer, max_batch=1) as (address, engine), client_of(address) as client:
        asked = {"model": "tiny", "prompt": "abc", "max_tokens": 1000, "temperature": 0}
        stream = client.completions.create(stream=True, **asked)
        next(iter(stream))
        assert until(lambda: engine.running == 1)
        waiting = socket.create_connection(address)
        body = json.dumps(asked).encode()
        waiting.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        assert until(lambda: len(engine._waiting) == 1)
        waiting.close()
        assert until(lambda: not engine._waiting) and engine.running == 1
        stream.close()
        start = time.monotonic()
        assert client.completions.create(**asked | {"max_tokens": 3}).usage.completion_tokens == 3
        assert time.monotonic() - start < 5 and until(lambda: not engine.running)


def test_time_and_places_are_limited(chat_tokenizer):
    model = make_pair("llama", backend="torch")[1]
    with (
        serving(model, chat_tokenizer, max_batch=1, max_waiting=1, max_seconds=1.0) as (address, engine),
        client_of(address) as client,
    ):
        slow = {"model": "tiny", "prompt": "abc", "max_tokens": 1024, "temperature": 0}
        model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
        with pytest.raises(openai.APIError, match="not complete after 1 s"):
            list(client.completions.create(stream=True, **slow))
        stream = client.completions.create(stream=True, **slow)
        next(iter(stream))
        second = threading.Thread(target=lambda: post(address, slow, "/v1/completions"))
        second.start()
        assert until(lambda: len(engine._waiting) == 1)
        with pytest.raises(openai.InternalServerError, match="1 requests are waiting"):
            client.completions.create(**slow)
        stream.close()
        second.join(30)
        submit, asked = engine.submit, []
        engine.submit = lambda job: (asked.append(job), submit(job))
        with client_of(address, max_retries=2) as patient, pytest.raises(openai.InternalServerError) as late:
            patient.completions.create(**slow)
        assert late.value.status_code == 504 and late.value.response.headers["x-should-retry"] == "false"
        assert len(asked) == 1
        assert client.completions.create(**slow | {"max_tokens": 3}).usage.completion_tokens == 3
        late = socket.create_connection(address, timeout=10)  # of a body that does not come
        late.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        )
        answered = late.recv(1000)
        assert b" 504 " in answered and b"x-should-retry: false" in answered
        late.close()


def test_a_failure_of_the_model_is_its_requests_own(chat_tokenizer, caplog):
    model = make_pair("llama", backend="torch")[1]
    with serving(model, chat_tokenizer) as (address, _):
        broken = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with caplog.at_level(logging.CRITICAL, "kivi.serve"):
            status, reply = post(address, chat())
        assert status == 500 and reply["error"]["type"] == "server_error" and "memory" not in reply["error"]["message"]
        broken.remove()
        assert post(address, chat())[0] == 200


@contextlib.contextmanager
def process(folder, tokenizer, *flags):
    """`kivi serve` in a process of its own; gives it and its address."""
    make_pair("llama")[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-m", "modules.cli", "serve", folder, "--port", "0", "--backend", "torch"]
    command += ["--threads", "1", "--group-size", "16", "--residual-length", "32", *flags]
    with subprocess.Popen(command, cwd=pages.ROOT, stderr=subprocess.PIPE, text=True) as running:
        try:
            line = next(line for line in running.stderr if "listening" in line)
            yield running, ("127.0.0.1", int(re.search(r":(\d+)/v1", line)[1]))
        finally:
            running.kill()


def test_the_command_listens_logs_and_ends(tmp_path, chat_tokenizer):
    """On Ctrl-C the answer that is being made is sent to its end; a line of the log has no word of a prompt."""
    with process(tmp_path, chat_tokenizer, "--grace-seconds", "60") as (running, address):
        with client_of(address) as client:
            stream = iter(
                client.completions.create(model=tmp_path.name, prompt="wordofaprompt", max_tokens=300, stream=True)
            )
            next(stream)
            running.send_signal(signal.SIGINT)
            *_, last = stream
            assert last.choices[0].finish_reason == "length"
        _, log = running.communicate(timeout=30)
    assert running.returncode == 130, log
    assert "wordofaprompt" not in log and "Traceback" not in log
    assert re.search(r"POST /v1/completions 200 prompt=13 cached=0 new=300 first=\S+s whole=True total=\S+s", log), log


def test_answers_that_outlast_the_grace_end_with_an_error(tmp_path, chat_tokenizer):
    """On SIGTERM: a stream by an event, a whole answer by its status; the process ends as asked and leaves its port."""
    flags = ("--grace-seconds", "0.3", "--max-new-tokens", "2000")
    with process(tmp_path, chat_tokenizer, *flags) as (running, address):
        asked = {"model": tmp_path.name, "prompt": "abc", "max_tokens": 2000, "temperature": 0}
        whole: list[tuple[int, dict]] = []
        waiting = threading.Thread(target=lambda: whole.append(post(address, asked, "/v1/completions")))
        with client_of(address) as client:
            stream = iter(client.completions.create(stream=True, **asked))
            next(stream)
            waiting.start()
            next(stream)
            time.sleep(0.2)  # for the other request to come in
            start = time.monotonic()
            running.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="the server is going down") as ended:
                list(stream)
            assert ended.value.code == "unavailable" and time.monotonic() - start < 5
        waiting.join(30)
        _, log = running.communicate(timeout=30)
    assert running.returncode == 0, log
    assert whole[0][0] == 503 and whole[0][1]["error"]["code"] == "unavailable"
    assert "Traceback" not in log and "Cancel" not in log, log
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended linger
        again.bind(address)
        again.listen()


# --- the page and a real model -------------------------------------------------


def test_the_snippets_of_the_page_run(server, chat_tokenizer, capsys):
    host, port = server[0]
    blocks = pages.blocks(PAGE, "python")
    assert blocks
    names: dict = {}
    for block in blocks:
        pages.run_python(block, names, {r"127\.0\.0\.1:8000": f"{host}:{port}", r'"smollm2[\w.-]*"': '"tiny"'})
    assert capsys.readouterr().out.strip()
    for block in pages.blocks(PAGE, "bash"):
        for line in block.commands:
            assert line.startswith(
                ("pip install", "kivi serve ", "KIVI_API_KEY=", "curl ", "python benchmarks/serving_cpu.py")
            )


@pytest.mark.real_model
def test_a_real_conversation():
    """SmolLM2's answers are those of the same model without a server; the second turn goes on from the first one's cache."""
    path = real_model_path("llama")
    model, tokenizer = loading.load(path, dtype=torch.float32, backend="torch")
    messages = [
        {"role": "user", "content": "Here are some words: " + "red, green, blue, " * 60 + "Which colours were there?"}
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    cache, stop = model.create_kivi_cache(), stop_tokens(model, tokenizer)
    said = answer(model, ids, cache, max_new_tokens=16, stop=stop).tokens
    with serving(model, tokenizer) as (address, _), client_of(address) as client:
        asked = {"model": "tiny", "temperature": 0, "max_tokens": 16}
        first = client.chat.completions.create(messages=messages, **asked)
        text = first.choices[0].message.content
        assert text == tokenizer.decode(said, skip_special_tokens=True)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And which was the last?"}]
        second = client.chat.completions.create(messages=messages, **asked)
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert cached >= ids.shape[1] and second.choices[0].message.content
