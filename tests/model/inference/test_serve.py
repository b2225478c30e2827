"""The server on loopback: OpenAI's own client, bad input, clients that leave, back-pressure, load, shutdown."""

from __future__ import annotations

import gc
import json
import logging
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer

from model.inference.answer import Choice, Completion
from model.inference.app import build_app
from model.inference.connection import guarded
from model.inference.cost import Prices
from model.inference.engine import Engine
from model.inference.protocol import CompletionRequest, Limits
from model.inference.sampling import SamplingParams
from model.inference.scheduler import Request
from model.inference.serve import model_name
from model.inference.text import TextStream
from model.inference.worker import EngineThread
from tests.helpers.tiny import tiny_model, tiny_tokenizer

HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


LIMITS = Limits(body=20_000, choices=4, stop_length=50, scores=2000)


@contextmanager
def serving(engine: Engine, tokenizer: Tokenizer, limits: Limits | None = None, key: str | None = None, template=None):
    """A server of the model `tiny` on a free port; its address."""
    limits = limits or Limits()
    app = build_app(engine, tokenizer, "tiny", limits, hosts=["allowed.example"], key=key, template=template)
    config = uvicorn.Config(
        app, port=0, log_level="warning", timeout_graceful_shutdown=5, http=guarded(limits), ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def running(limits: Limits = LIMITS, key: str | None = None, **sizes):
    """A server of a tiny routed model: (address, engine)."""
    engine = Engine(tiny_model("expert-recursion_wise", 1), **({"max_batch": 8, "kv_tokens": 1200} | sizes))
    with serving(engine, tiny_tokenizer(), limits, key) as address:
        yield address, engine


@pytest.fixture(scope="module")
def server():
    with running() as address_and_engine:
        yield address_and_engine


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60)


def expected(prompt: str, **fields) -> str:
    """The answer of an engine that serves nothing else."""
    params = SamplingParams(**({"max_tokens": 8} | fields), stop=[[0]])
    request = Engine(tiny_model("expert-recursion_wise", 1)).generate([tiny_tokenizer().encode(prompt).ids], params)[0]
    return tiny_tokenizer().decode(request.tokens)


def request_head(length: int, host: str = "127.0.0.1", kind: str = "application/json") -> bytes:
    """The head of a completion's request, of a body of so many bytes."""
    fields = f"Host: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    return f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n".encode()


def raw(address: str, data: bytes) -> bytes:
    """What a connection that sends `data`, and no more, gets until the server closes it."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def wait_until_idle(engine: Engine) -> None:
    until = time.monotonic() + 20
    while not engine.idle and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.idle and engine.everyone.free_pages() == engine.everyone.pages


def test_openai_client_whole_and_streamed(client):
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected("hello")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens == 8
    stream = client.completions.create(
        model="tiny", prompt="hello", max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len(chunks) > 4 and chunks[-1].usage.total_tokens == 13
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected("hello")
    assert [m.id for m in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("variant", ["mod", "ut", "ut-frozen"])
def test_every_way_of_spending_depth_is_served(variant):
    """Two clients at once get what each prompt gets alone."""
    model = tiny_model(variant, 1)
    with serving(Engine(model, max_batch=4, kv_tokens=600), tiny_tokenizer()) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        options = {"model": "tiny", "max_tokens": 6, "temperature": 0}
        together = [choice.text for choice in client.completions.create(prompt=["the sea", "a dog"], **options).choices]
        alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in ("the sea", "a dog")]
    assert together == alone and all(together)


def test_openai_client_choices_seeds_stops_and_token_prompts(client):
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0.9, "top_p": 0.9, "seed": 5}
    answer = client.completions.create(prompt=["ab", "cd"], n=2, **options)
    texts = [choice.text for choice in answer.choices]
    sampled = {"temperature": 0.9, "top_p": 0.9}
    assert texts == [expected(p, seed=5, stream=i, **sampled) for p in ("ab", "cd") for i in (0, 1)]
    ids = tiny_tokenizer().encode("ab").ids
    assert client.completions.create(prompt=ids, **options).choices[0].text == texts[0]
    whole = expected("hello")
    stopped = client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0, stop=whole[2:4])
    assert stopped.choices[0].text == whole[: whole.find(whole[2:4])]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt: empty"),
        ({"prompt": "a" * 300}, "no room in the context"),
        ({"prompt": [3, 999]}, "999 is outside the vocabulary"),
        ({"prompt": [[]]}, "prompt: empty"),
        ({"prompt": []}, "must make 1 to 4"),
        ({"prompt": ["a"] * 5}, "must make 1 to 4"),
        ({"prompt": "a", "n": 0}, "n:"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_bad_fields_get_status_400_by_name(server, fields, message):
    answer = HTTP.post(f"{server[0]}/v1/completions", json=fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", ["{", "[]", "", '"text"', "\xff", '{"prompt": "a", "temperature": NaN}', "[" * 9000])
def test_broken_json_gets_status_400(server, body):
    headers = {"Content-Type": "application/json"}
    answer = HTTP.post(f"{server[0]}/v1/completions", content=body.encode("latin-1"), headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_refusals_reach_openai_clients_as_their_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=101)
    with pytest.raises(openai.NotFoundError, match="not 'other'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.APIStatusError, match="20000 bytes") as error:
        client.completions.create(model="tiny", prompt="a" * 30_000)
    assert error.value.status_code == 413


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_what_it_held(server, stream):
    address, engine = server
    # Four answers that do not end by themselves.
    body = {"prompt": "a", "max_tokens": 240, "n": 4, "logit_bias": {"0": -100}, "stream": stream}
    before = engine.statistics.generated_tokens
    if stream:
        with HTTP.stream("POST", f"{address}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(f"{address}/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.05))
    wait_until_idle(engine)
    assert engine.statistics.generated_tokens - before < 4 * 240


@pytest.mark.slow
def test_a_client_that_does_not_read_delays_nobody(server):
    address, engine = server
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"prompt": ["a"] * 4, "max_tokens": 240, "temperature": 0.9, "stream": True}).encode()
    head = request_head(len(body))
    with socket.create_connection((host, int(port))) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        silent.sendall(head + body)
        for number in range(4):
            wanted = {"prompt": "hello", "max_tokens": 8, "temperature": 0.0}
            answer = HTTP.post(f"{address}/v1/completions", json=wanted, timeout=20).json()
            assert answer["choices"][0]["text"] == expected("hello"), number
    wait_until_idle(engine)


@pytest.mark.slow
def test_back_pressure_is_status_429_and_passes():
    with running(max_batch=1, max_waiting=1) as (address, engine):
        body = {"prompt": "a", "max_tokens": 40, "temperature": 0.0}

        def post(_: int) -> httpx.Response:
            return HTTP.post(f"{address}/v1/completions", json=body, timeout=60)

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(post, range(8)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert all(a.headers["Retry-After"] == "1" for a in answers if a.status_code == 429)
        assert post(0).status_code == 200
        wait_until_idle(engine)
        metrics = HTTP.get(f"{address}/metrics").text
        assert f'mor_requests_total{{status="429"}} {float(statuses.count(429))}' in metrics


@pytest.mark.slow
def test_load_of_many_clients_gives_everyone_their_own_text(server):
    address, engine = server
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    answers = {letter: expected(letter) for letter in alphabet}

    def post(i: int) -> bool:
        prompt = alphabet[i % 26]
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": bool(i % 2)}
        answer = HTTP.post(f"{address}/v1/completions", json=body, timeout=60)
        if not body["stream"]:
            return answer.json()["choices"][0]["text"] == answers[prompt]
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == answers[prompt]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(post, range(52)))
    wait_until_idle(engine)


def test_a_step_is_handed_out_at_once_for_all_its_requests():
    engine, steps = Engine(tiny_model("expert-recursion_wise", 1), max_batch=8, kv_tokens=1200), []
    worker = EngineThread(engine, steps.append)
    sinks = [lambda events: None, lambda events: None]
    prompts = [tiny_tokenizer().encode(text).ids for text in ("abc", "de")]
    params = SamplingParams(max_tokens=6, logit_bias={0: -100})
    submitted = [worker.submit(prompts, [params] * 2, sink) for sink in sinks]
    worker.thread.start()
    requests = [request for done in submitted for request in done.result()]
    worker.stop()
    worker.thread.join(60)
    assert len(steps) <= engine.statistics.steps and all(set(step) <= set(sinks) for step in steps)
    for request, sink in zip(requests, [sinks[0]] * 2 + [sinks[1]] * 2, strict=True):
        events = [event for step in steps for event in step.get(sink, []) if event.request is request]
        assert [token for event in events for token in event.tokens] == request.tokens and len(request.tokens) == 6


def test_nothing_of_an_answer_is_kept():
    """Whole, streamed, refused or left by its client; what an engine's last step handed out stands until the next."""
    kinds = [{}, {"stream": True}, {"n": 3, "best_of": 4}, {"logprobs": 3, "echo": True}, {"stop": "e"}, {"n": 0}]
    before = len(alive())
    with running() as (address, engine):
        for fields in kinds * 3:
            HTTP.post(f"{address}/v1/completions", json={"prompt": "the sea", "max_tokens": 6} | fields)
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "a", "max_tokens": 240, "stream": True}).encode()
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(request_head(len(body)) + body)
            leaving.recv(100)
        wait_until_idle(engine)
        HTTP.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 2})
        until = time.monotonic() + 20
        while len(kept := alive()) > before + 1 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(kept) <= before + 1, kept


def alive() -> list[str]:
    """Kinds of the objects of answers that are still there."""
    gc.collect()
    kinds = (Request, Completion, Choice, TextStream)
    return sorted(type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds))


def test_health_and_metrics(server):
    address, engine = server
    assert HTTP.get(f"{address}/health").json() == {"status": "ok"}
    HTTP.post(f"{address}/v1/completions", json={"prompt": "abc", "max_tokens": 4, "temperature": 0})
    text = HTTP.get(f"{address}/metrics").text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values["mor_kv_bytes"] == engine.kv_bytes()
    assert values["mor_generated_tokens_total"] >= 4 and values["mor_prompt_tokens_total"] >= 3
    assert values["mor_running"] == 0 and values["mor_kv_free_share"] == 1
    assert values['mor_token_depth_bucket{le="3.0"}'] == values["mor_token_depth_count"] >= 3
    assert values["mor_flops_total"] > 0 and values["mor_saved_flops_total"] > 0


def test_shutdown_lets_running_requests_finish():
    with running() as (address, _), ThreadPoolExecutor(1) as threads:
        body = {"prompt": "a", "max_tokens": 60, "temperature": 0}
        answer = threads.submit(HTTP.post, f"{address}/v1/completions", json=body, timeout=60)
        time.sleep(0.15)
    assert answer.result().json()["choices"][0]["text"] == expected("a", max_tokens=60)


def test_a_failing_model_is_told_and_not_hung(monkeypatch):
    with running() as (address, engine):

        def fail():
            raise RuntimeError("broken")

        monkeypatch.setattr(engine, "step", fail)
        body = {"prompt": "a", "max_tokens": 4}
        assert HTTP.post(f"{address}/v1/completions", json=body).status_code == 500
        assert HTTP.get(f"{address}/health").status_code == 503
        assert HTTP.post(f"{address}/v1/completions", json=body).status_code == 503


# --- scores -----------------------------------------------------------------------------------------------------------


def reference(prompt: str, **fields):
    params = SamplingParams(**({"max_tokens": 3, "logprobs": 2, "prompt_logprobs": True} | fields), stop=[[0]])
    return Engine(tiny_model("expert-recursion_wise", 1)).generate([tiny_tokenizer().encode(prompt).ids], params)[0]


def test_log_probabilities_are_those_of_openai(client):
    request = reference("hello")
    options = {"model": "tiny", "prompt": "hello", "temperature": 0, "logprobs": 2}
    choice = client.completions.create(max_tokens=3, echo=True, **options).choices[0]
    listed, letters = choice.logprobs, "".join(tiny_tokenizer().id_to_token(token) for token in request.text)
    assert choice.text == "".join(listed.tokens) == letters and listed.text_offset == list(range(8))
    assert listed.token_logprobs[0] is None and listed.top_logprobs[0] is None
    assert listed.token_logprobs[1:] == [request.scores[i].logprob for i in range(1, 8)]
    for place in range(1, 8):
        scored = request.scores[place]
        top = {tiny_tokenizer().id_to_token(token): value for token, value in scored.top}
        assert listed.top_logprobs[place] == top | {letters[place]: scored.logprob}
    answer = client.completions.create(max_tokens=3, **options).choices[0].logprobs
    assert answer.token_logprobs == listed.token_logprobs[5:] and answer.text_offset == [0, 1, 2]
    alone = client.completions.create(max_tokens=0, echo=True, **options).choices[0]
    assert alone.text == "hello" and alone.logprobs.token_logprobs == listed.token_logprobs[:5]
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=0).choices[0].text == ""
    chunks = list(client.completions.create(max_tokens=3, echo=True, stream=True, **options))
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for chunk in chunks for x in getattr(chunk.choices[0].logprobs, name)] == getattr(listed, name)
    assert "".join(chunk.choices[0].text for chunk in chunks) == letters


def test_the_token_that_ends_a_text_is_listed(client):
    """lm-evaluation-harness takes the last one for the generated token, and leaves it out."""
    bias = {"0": 100}
    choice = client.completions.create(
        model="tiny", prompt="ab", max_tokens=1, logprobs=1, echo=True, temperature=0, logit_bias=bias
    ).choices[0]
    assert (choice.text, choice.finish_reason, len(choice.logprobs.tokens)) == ("ab", "stop", 3)
    assert choice.logprobs.tokens[-1] == "<eos>" and choice.logprobs.token_logprobs[-1] < 0  # before the bias


# --- OpenAI's fields --------------------------------------------------------------------------------------------------

# field -> (neutral values, values that are honoured, values that are refused)
FIELDS = {
    "prompt": ([None], ["a", ["a", "b"], [1, 2], [[1], [2, 3]]], [3, [], [[]], ["a", 1], [1.5], [True], {"a": 1}]),
    "model": ([None], ["tiny"], [3, "other"]),
    "best_of": ([None, 1], [2], [0, "2", 5]),
    "echo": ([None, False], [True], ["yes"]),
    "frequency_penalty": ([None, 0, 0.0], [2, -2, 0.5], [2.1, "0"]),
    "logit_bias": ([None, {}], [{"3": 100}, {"3": -1.5}], [{"3": 101}, {"x": 1}, {"99": 1}, [1]]),
    "logprobs": ([None], [0, 5], [6, -1, True]),
    "max_tokens": ([None], [0, 3], [-1, 1.5]),
    "n": ([None, 1], [2], [0, 5, 1000000]),
    "presence_penalty": ([None, 0], [2, -2], [-2.1]),
    "seed": ([None], [0, -1, 2**63, -(2**70)], [1.5, "1"]),
    "stop": ([None, []], ["x", ["x", "y"]], ["", ["x"] * 17, "x" * 51, 3]),
    "stream": ([None, False], [True], ["true"]),
    "stream_options": ([None], [], [{"include_usage": True}, {"other": True}]),
    "suffix": ([None, ""], [], ["the end"]),
    "temperature": ([None, 1, 1.0], [0, 0.5, 2, 1e-300], [-1, 101, "1"]),
    "top_p": ([None, 1], [0.5], [0, 1.1]),
    "user": ([None], ["someone"], [3]),
}


OWN_FIELDS = {"top_k", "depth", "return_depth", "return_scores", "return_flops"}


def test_every_field_of_openai_is_in_the_table():
    import inspect

    documented = set(inspect.signature(openai.resources.completions.Completions.create).parameters)
    documented -= {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert set(FIELDS) == documented
    assert set(CompletionRequest.model_fields) == documented | OWN_FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_neutral_values_are_the_default_and_others_are_honoured_or_refused(server, name):
    neutral, honoured, refused = FIELDS[name]
    base = {"prompt": "hello", "max_tokens": 4, "seed": 7}

    def post(value):
        return HTTP.post(f"{server[0]}/v1/completions", json=base | {name: value})

    without = {key: value for key, value in base.items() if key != name}
    if name == "prompt":
        expected_choices = HTTP.post(f"{server[0]}/v1/completions", json=base | {"prompt": [0]}).json()["choices"]
    else:
        answer = HTTP.post(f"{server[0]}/v1/completions", json=without | ({"seed": 7} if name != "seed" else {}))
        expected_choices = answer.json()["choices"]
    for value in neutral:
        answer = post(value)
        assert answer.status_code == 200, (value, answer.text)
        if name != "seed":  # without a seed every answer is drawn anew
            assert answer.json()["choices"] == expected_choices, value
    for value in honoured:
        answer = post(value)
        assert answer.status_code == 200, (value, answer.text)
    for value in refused:
        answer = post(value)
        assert answer.status_code in (400, 404), (value, answer.text)
        error = answer.json()["error"]
        assert name in error["message"] and set(error) == {"message", "type", "param", "code"}, value


def test_penalties_biases_and_best_of_do_what_they_say(client):
    options = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0}
    forced = client.completions.create(logit_bias={"3": 100}, **options).choices[0].text
    assert forced == "c" * 12
    varied = client.completions.create(logit_bias={"3": 1.0, "4": 1.0}, frequency_penalty=2, **options).choices[0].text
    params = {"logit_bias": {3: 1.0, 4: 1.0}, "frequency_penalty": 2.0}
    assert varied == expected("hello", max_tokens=12, **params) != expected("hello", max_tokens=12)
    sampled = options | {"temperature": 1.5, "seed": 3, "logprobs": 0}
    many = client.completions.create(n=4, **sampled).choices
    best = client.completions.create(n=2, best_of=4, **sampled).choices

    def rank(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    order = sorted(many, key=rank, reverse=True)
    assert [choice.text for choice in best] == [choice.text for choice in order[:2]] and len({c.text for c in many}) > 1


def test_depths_come_where_they_are_asked_for(server):
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "return_depth": True}
    request = reference("hello", max_tokens=4)
    choice = HTTP.post(f"{server[0]}/v1/completions", json=body).json()["choices"][0]
    assert choice["mor"] == {"prompt_depths": request.depths[:5], "depths": request.depths[5:]}
    assert "mor" not in HTTP.post(f"{server[0]}/v1/completions", json=body | {"return_depth": None}).text


def test_scores_flops_and_depth_policies_by_request(server):
    def mor(**fields):
        body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "return_depth": True, "return_flops": True}
        return HTTP.post(f"{server[0]}/v1/completions", json=body | fields).json()["choices"][0]["mor"]

    free, capped = mor(return_scores=True), mor(depth="cap:1")
    assert "scores" not in capped and set(capped["depths"]) == {1}
    assert capped["flops"] < free["flops"] < free["full_depth_flops"] == capped["full_depth_flops"]
    request = reference("hello", max_tokens=4, gates=True, prompt_logprobs=False)
    assert (free["flops"], free["full_depth_flops"]) == Prices(server[1].config).of_request(request)
    raw_scores = torch.tensor(request.gates, dtype=torch.float64)
    given = [[math.nan if x is None else x for x in row] for row in free["prompt_scores"] + free["scores"]]
    torch.testing.assert_close(torch.tensor(given).double(), raw_scores.sigmoid(), equal_nan=True, atol=2e-6, rtol=0)
    for row, depth in zip(given, free["prompt_depths"] + free["depths"], strict=True):
        assert sum(score >= 0.5 for score in row[1:]) == depth - 1 and not math.isnan(row[0])
    rising = mor(depth="progressive:1-3")
    assert rising["prompt_depths"] + rising["depths"] == [1 + 3 * place // 9 for place in range(8)]
    for wrong in ("cap:4", "deep", "progressive:3-1"):
        answer = HTTP.post(f"{server[0]}/v1/completions", json={"prompt": "a", "depth": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "depth"


# --- errors and safety ------------------------------------------------------------------------------------------------


def test_errors_are_json_whatever_goes_wrong(server, monkeypatch):
    address = server[0]
    answers = {
        404: HTTP.get(f"{address}/nowhere"),
        405: HTTP.get(f"{address}/v1/completions"),
        415: HTTP.post(f"{address}/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}),
        413: HTTP.post(f"{address}/v1/completions", json={"prompt": "a" * 30_000}),
        403: HTTP.get(f"{address}/health", headers={"Host": "evil.example"}),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status and answer.headers["content-type"] == "application/json"
    head, _, body = raw(address, b"no HTTP at all\r\n\r\n").partition(b"\r\n\r\n")
    assert b" 400 " in head and json.loads(body)["error"]["code"] == 400
    missing = HTTP.get(f"{address}/v1/models/other")
    assert missing.status_code == 404 and "not 'other'" in missing.json()["error"]["message"]
    assert HTTP.get(f"{address}/v1/models/tiny").json()["id"] == "tiny"
    monkeypatch.setattr("model.inference.app.generate_latest", lambda _: 1 / 0)
    broken = HTTP.get(f"{address}/metrics")
    assert broken.status_code == 500 and broken.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("prompt", ['"\\ud800"', '["a", "\\udfff b"]', '["\\ud83d"]'])
def test_lone_surrogates_are_refused(server, prompt):
    headers = {"Content-Type": "application/json"}
    for body in (
        f'{{"prompt": {prompt}}}',
        f'{{"prompt": "a", "model": {prompt}}}',
        f'{{"prompt": "a", {prompt[-8:-1]}": 1}}',
    ):
        answer = HTTP.post(f"{server[0]}/v1/completions", content=body.encode(), headers=headers)
        assert answer.status_code in (400, 404) and answer.json()["error"]["message"]


def test_host_is_checked_and_names_can_be_allowed(server):
    for host, status in (
        ("localhost:80", 200),
        ("[::1]", 200),
        ("allowed.example", 200),
        ("rebound.example", 403),
        ("", 403),
    ):
        assert HTTP.get(f"{server[0]}/health", headers={"Host": host}).status_code == status, host


def test_a_key_is_asked_for_where_one_is_set():
    with running(key="secret") as (address, _):
        assert HTTP.get(f"{address}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = HTTP.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="secret").models.list().data[0].id == "tiny"


def test_half_sent_requests_end_and_connections_are_counted():
    limits = Limits(body=20_000, connections=12, head_seconds=0.5, body_seconds=0.5)
    with running(limits) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        halves = [b"", b"POST /v1/comp", request_head(100), request_head(100) + b'{"prompt"']
        with ThreadPoolExecutor(8) as threads:
            received = list(threads.map(lambda data: raw(address, data), halves * 2))
        for answer in received:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b" 408 " in head and json.loads(body)["error"]["code"] == 408
        silent = [socket.create_connection((host, int(port)), timeout=30) for _ in range(12)]
        assert HTTP.get(f"{address}/health").status_code == 200  # the oldest of them makes room
        first = silent[0].recv(65536)
        assert json.loads(first.partition(b"\r\n\r\n")[2])["error"]["code"] == 503
        for connection in silent:
            while connection.recv(65536):
                pass
            connection.close()
        assert HTTP.get(f"{address}/health").status_code == 200


def test_a_half_sent_body_makes_room_and_a_whole_request_does_not(monkeypatch):
    with running(Limits(body=20_000, connections=1, body_seconds=120)) as (address, engine):
        host, port = address.removeprefix("http://").split(":")
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: time.sleep(0.1) or step())
        half = socket.create_connection((host, int(port)), timeout=60)
        half.sendall(request_head(100) + b'{"prompt"')
        time.sleep(0.3)
        body = {"prompt": "a", "max_tokens": 240, "logit_bias": {"0": -100}, "stream": True}
        with HTTP.stream("POST", f"{address}/v1/completions", json=body) as whole:
            lines = whole.iter_lines()  # kept: without it the connection is closed
            next(lines)
            assert half.recv(100) == b""
            refused = raw(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == 503
        half.close()
        wait_until_idle(engine)


def test_a_client_that_leaves_in_its_body_is_one_line(server, caplog, monkeypatch):
    host, port = server[0].removeprefix("http://").split(":")
    said, log = [], logging.getLogger("uvicorn.error")
    # Its records do not propagate, and whether caplog has them then depends on pytest.
    monkeypatch.setattr(log, "filters", [lambda record: said.append(record.getMessage()) or True])
    with caplog.at_level("INFO", logger=log.name):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request_head(100) + b'{"prompt"')
            time.sleep(0.2)
        until = time.monotonic() + 20
        while not said and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.1)
    assert said == ["127.0.0.1: the client left while it sent its request"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "stop": "x" * 900_000},
        {"prompt": "a", "stop": ["x" * 40_000] * 20},
        {"prompt": ["a"] * 250_000},
        {"prompt": [1] * 300_000},
        {"prompt": [[1]] * 200_000},
        {"prompt": "a " * 450_000},
        {"prompt": "a", "logit_bias": {str(i): 1 for i in range(60_000)}},
        {"prompt": "a", **{f"field{i}": 1 for i in range(60_000)}},
    ],
    ids=["long stop", "long stops", "prompts", "tokens", "token lists", "long text", "biases", "fields"],
)
def test_large_requests_are_refused_before_anything_is_done_with_them(body, monkeypatch):
    """Nothing is tokenized or validated item by item."""
    from model.inference import protocol, reader

    def refuse(*_, **__):
        raise AssertionError("looked into what is too large")

    class Untouched:
        encode_batch = encode = refuse

        def get_vocab(self):
            return {"a": 0}

    bodies = reader.Reader(Untouched(), 256, [[0]], Limits())  # type: ignore[arg-type]
    monkeypatch.setattr(
        CompletionRequest, "model_validate", lambda content: CompletionRequest.model_construct(**content)
    )
    with pytest.raises(protocol.ServiceError) as refused:
        bodies.read(json.dumps(body).encode())
    assert refused.value.status == 400 and len(str(refused.value)) < 1100


def test_the_model_is_called_by_its_name_not_its_path(tmp_path):
    assert (
        model_name(str(tmp_path / "mine" / "final")) == "mine" and model_name(str(tmp_path / "exported")) == "exported"
    )
