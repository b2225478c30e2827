"""The server on loopback: OpenAI's own client, bad input, clients that leave, back-pressure, load, shutdown."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn

from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from model.inference.serve import Limits, build_app
from tests.helpers.tiny import tiny_model, tiny_tokenizer

HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


@contextmanager
def running(**sizes):
    """A server on a free port: (address, engine)."""
    engine = Engine(tiny_model("expert-recursion_wise", 1), **({"max_batch": 8, "kv_tokens": 1200} | sizes))
    app = build_app(engine, tiny_tokenizer(), "tiny", Limits(body=20_000, choices=4))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()


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


def test_openai_client_choices_seeds_stops_and_token_prompts(client):
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0.9, "top_p": 0.9, "seed": 5}
    answer = client.completions.create(prompt=["ab", "cd"], n=2, **options)
    texts = [choice.text for choice in answer.choices]
    sampled = {"temperature": 0.9, "top_p": 0.9}
    assert texts == [expected(p, seed=s, **sampled) for p in ("ab", "cd") for s in (5, 6)]
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
        ({"prompt": "a", "best_of": 3}, "best_of"),
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
    answer = HTTP.post(f"{server[0]}/v1/completions", content=body.encode("latin-1"))
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
    body = {"prompt": "a", "max_tokens": 240, "temperature": 0.9, "seed": 1, "stream": stream}
    before = engine.statistics.generated_tokens
    if stream:
        with HTTP.stream("POST", f"{address}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(f"{address}/v1/completions", json=body, timeout=0.2)
    wait_until_idle(engine)
    assert engine.statistics.generated_tokens - before < 240


@pytest.mark.slow
def test_a_client_that_does_not_read_delays_nobody(server):
    address, engine = server
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"prompt": ["a"] * 4, "max_tokens": 240, "temperature": 0.9, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
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


def test_health_and_metrics(server):
    address, engine = server
    assert HTTP.get(f"{address}/health").json() == {"status": "ok"}
    HTTP.post(f"{address}/v1/completions", json={"prompt": "abc", "max_tokens": 4, "temperature": 0})
    text = HTTP.get(f"{address}/metrics").text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values["mor_kv_bytes"] == engine.kv_bytes()
    assert values["mor_generated_tokens_total"] >= 4 and values["mor_prompt_tokens_total"] >= 3
    assert values["mor_running"] == 0 and values["mor_kv_free_share"] == 1
    assert sum(value for name, value in values.items() if name.startswith("mor_token_depth_total")) >= 3


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
