"""The server in a process of its own: nothing that one client sends delays the others, and memory stays flat.

Bounds are generous, for machines that do other things; `make bench-serve` has the figures.
"""

from __future__ import annotations

import json
import random

import pytest

from model.folder import write_folder
from tests.helpers.serving import Server, at_once, attacks, get, health_under, request, serving_folder, status
from tests.helpers.tiny import tiny_model
from tests.model.test_export import byte_bpe

CONTEXT = 256
ATTACKS = attacks("the state of the union ", CONTEXT)
WAIT_FOR_TIME_OUTS = {"300 connections that say nothing", "300 half-sent bodies"}  # 10 and 20 s each


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    byte_bpe(root / "tokenizer.json")
    model = tiny_model("expert-recursion_wise", 1, vocab_size=290).float()
    write_folder(model, root / "final", root / "tokenizer.json")
    with serving_folder(root / "final") as running:
        yield running


@pytest.mark.slow
def test_no_attack_stops_health(server: Server) -> None:
    answer = request({"prompt": "the sea", "max_tokens": 4, "temperature": 0})
    (expected,) = at_once(server.port, [answer])
    work = {name: attack for name, attack in ATTACKS.items() if name not in WAIT_FOR_TIME_OUTS}
    slowest = {name: max(latencies) for name, latencies in health_under(server.port, work).items()}
    assert max(slowest.values()) < 2.0, slowest
    text = json.loads(expected.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
    (again,) = at_once(server.port, [answer])
    assert json.loads(again.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == text


def varied(rng: random.Random) -> bytes:
    """A request of a kind at random, good or bad."""
    body = {"prompt": "the sea " * rng.randrange(1, 12), "max_tokens": rng.randrange(1, 12), "temperature": 1.0}
    kinds = [{}, {"stream": True}, {"logprobs": 3, "echo": True}, {"n": 3}, {"stop": "e"}, {"return_depth": True}]
    kinds += [{"prompt": "a" * 9000}, {"temperature": -1}]
    return request(body | rng.choice(kinds))


def soak(server: Server, count: int, parts: int, seed: int = 0) -> list[int]:
    """Resident bytes after each part of `count` varied requests; every one is answered."""
    rng, sizes = random.Random(seed), []
    for _ in range(parts):
        answers = at_once(server.port, [varied(rng) for _ in range(count // parts)], 16)
        assert {status(answer) for answer in answers} <= {200, 400}
        sizes.append(server.memory())
    return sizes


@pytest.mark.slow
def test_memory_stays_flat_over_many_requests(server: Server) -> None:
    soak(server, 600, 1)  # allocators and caches fill first; over 5,000 requests the benchmark sees them level off
    sizes = soak(server, 600, 3, 1)
    assert sizes[-1] - sizes[0] < 64 << 20, sizes
    values = get(server.port, "/metrics")[1].decode()
    assert "mor_running 0.0" in values and "mor_kv_free_share 1.0" in values
