"""A server in a process of its own: its address and memory, clients that cost little, and what can be sent against it.

Clients speak HTTP over plain sockets, one request a connection, so that what they need of the processor is small beside
what the server needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: psutil.Process

    def memory(self) -> int:
        """Resident bytes."""
        return self.process.memory_info().rss

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextlib.contextmanager
def started(command: Sequence[str], port: int, path: str = "/health", patience: float = 120.0) -> Iterator[Server]:
    """A server's process, once it answers on `path`; ended with the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log) as process,
    ):
        try:
            until = time.monotonic() + patience
            while True:
                assert process.poll() is None and time.monotonic() < until, f"{command[:4]} did not start"
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if get(port, path)[0] == 200:
                        break
                time.sleep(0.1)
            yield Server(port, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def serving_folder(folder: Path, *options: str) -> Iterator[Server]:
    """This project's server on a checkpoint folder."""
    port = free_port()
    command = [sys.executable, "-m", "model.inference.serve", "--checkpoint", str(folder), "--port", str(port)]
    with started([*command, *options], port) as server:
        yield server


def get(port: int, path: str, timeout: float = 60.0) -> tuple[int, bytes]:
    """Status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def head(length: int, path: str = "/v1/completions") -> bytes:
    """The head of a request with a body of so many bytes."""
    fields = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode()


def request(body: Any, path: str = "/v1/completions") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(data), path) + data


def send(port: int, data: bytes, timeout: float = 120.0) -> bytes:
    """What the server answers until it closes the connection; nothing where it resets it."""
    received = bytearray()
    connection = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        while part := connection.recv(1 << 16):
            received += part
    return bytes(received)


def status(answer: bytes) -> int:
    """0 where there was no answer."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


# --- latency of /health -----------------------------------------------------------------------------------------------


# Asks for /health every 20 ms until its standard input closes; prints when, and how long it took.
_PROBE = """
import http.client, select, sys, time
while not select.select([sys.stdin], [], [], 0.02)[0]:
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=300)
    connection.request("GET", "/health")
    good = connection.getresponse().status == 200
    connection.close()
    print(began, time.perf_counter() - began, int(good), flush=True)
"""


@contextlib.contextmanager
def health_probe(port: int) -> Iterator[list[tuple[float, float, bool]]]:
    """(when asked, by `time.perf_counter`; seconds until the answer; whether that was 200) of /health, every 20 ms from
    a process of its own, in a list that is filled when the block has ended."""
    found = list[tuple[float, float, bool]]()
    with tempfile.TemporaryFile("w+") as written:
        with subprocess.Popen(
            [sys.executable, "-I", "-c", _PROBE, str(port)], stdin=subprocess.PIPE, stdout=written
        ) as process:
            while not os.fstat(written.fileno()).st_size:
                time.sleep(0.01)
            yield found
            assert process.stdin is not None
            process.stdin.close()
        assert process.returncode == 0
        written.seek(0)
        for line in written:
            when, took, good = map(float, line.split())
            found.append((when, took, bool(good)))


def health_under(port: int, work: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
    """Seconds of /health while each piece of work was going on, and for half a second after it; an answer that is not
    200 took for ever."""
    spans = {}
    with health_probe(port) as latencies:
        for name, run in work.items():
            began = time.perf_counter()
            run(port)
            time.sleep(0.5)
            spans[name] = began, time.perf_counter()
    return {
        name: [took if good else float("inf") for when, took, good in latencies if when < end and when + took > began]
        for name, (began, end) in spans.items()
    }


# --- attacks ----------------------------------------------------------------------------------------------------------


def at_once(port: int, data: Sequence[bytes], threads: int = 8) -> list[bytes]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda one: send(port, one), data))


def _half_open(port: int, count: int, data: bytes) -> None:
    """Connections that send `data` and then nothing, until the server closes them."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
                connection.sendall(data)
                connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                while connection.recv(1 << 16):
                    pass


def _leave(port: int, data: bytes, count: int) -> None:
    """Clients that ask for much and leave after 50 ms."""
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(data)
            time.sleep(0.05)


def _silent_readers(port: int, data: bytes, count: int) -> None:
    """Clients that take nothing of what they asked for."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", port))
            connection.sendall(data)
        time.sleep(3)


def _drip(port: int, seconds: float) -> None:
    """A body that comes a byte at a time."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head(10_000))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            connection.sendall(b" ")
            time.sleep(0.005)


def attacks(words: str, context: int) -> dict[str, Callable[[int], Any]]:
    """What one or a few clients can send: name -> what sends it to a port and returns when it is over. words: text that
    the model's tokenizer knows; context: the model's."""
    million = 1_000_000
    text = (words * (million // len(words) + 1))[: million - 1000]
    long_prompts = [text[: min(context * 3, 15_000)]] * 64
    scored = {"prompt": [text[:context]] * 16, "max_tokens": 1, "echo": True, "logprobs": 5}
    endless = {"prompt": "a", "max_tokens": context - 8, "n": 16, "temperature": 1.0, "stream": True}
    bodies: dict[str, tuple[Any, int]] = {
        "one text of 1 MB": ({"prompt": text}, 4),
        "a stop of 0.9 MB": ({"prompt": "a", "stop": text[:900_000]}, 4),
        "20 stops of 45 kB": ({"prompt": "a", "stop": [text[:45_000]] * 20}, 4),
        "250,000 prompts": ({"prompt": ["a"] * 190_000}, 4),
        "200,000 lists of tokens": ({"prompt": [[1]] * 190_000}, 4),
        "300,000 token ids": ({"prompt": [1] * 300_000}, 4),
        "64 prompts that fill 1 MB": ({"prompt": long_prompts, "max_tokens": 1}, 4),
        "60,000 biases": ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(60_000)}}, 4),
        "60,000 unknown fields": ({"prompt": "a"} | {f"field{i}": 1 for i in range(60_000)}, 4),
        "brackets 500,000 deep": (b"[" * 500_000, 4),
        "a number of a million digits": (b'{"prompt": "a", "seed": ' + b"1" * million + b"}", 4),
        "a body of 30 MB": (b" " * 30_000_000, 4),
        "log-probabilities of 16 whole contexts": (scored, 4),
        "500 requests at once": ({"prompt": "a", "max_tokens": 4}, 500),
        "1,000 broken requests": (b"{", 1000),
    }
    found: dict[str, Callable[[int], Any]] = {}
    for name, (body, count) in bodies.items():
        data = [request(body)] * count
        found[name] = lambda port, data=data: at_once(port, data, 64 if len(data) > 8 else 4)
    found["300 connections that say nothing"] = lambda port: _half_open(port, 300, b"")
    found["300 half-sent bodies"] = lambda port: _half_open(port, 300, head(100) + b'{"prompt"')
    found["a body a byte at a time"] = lambda port: _drip(port, 5)
    found["100 clients that leave"] = lambda port: _leave(port, request(endless), 100)
    found["16 clients that do not read"] = lambda port: _silent_readers(port, request(endless), 16)
    found["bytes that are no HTTP"] = lambda port: at_once(port, [os.urandom(100_000)] * 50)
    return found


# --- streams ----------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """One streamed answer: seconds of its request and of each of its chunks, on one clock; tokens, as its usage says: a
    token that ends within a character makes no chunk."""

    asked: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first(self) -> float:
        return self.chunks[0] - self.asked

    @property
    def between(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:])]


async def stream(port: int, body: dict[str, Any], path: str = "/v1/completions", asked: float | None = None) -> Stream:
    """Ask for a streamed answer; the times of its chunks with text."""
    result, usage = Stream(time.perf_counter() if asked is None else asked), b"{}"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(body | {"stream": True, "stream_options": {"include_usage": True}}, path))
        first = await reader.readline()
        assert b" 200 " in first, first + await reader.read(2000)
        while line := await reader.readline():
            if line.startswith(b"data: {") and b'"error"' not in line[:20]:
                result.chunks.append(time.perf_counter())
                if b'"completion_tokens"' in line:
                    usage = line
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    told = json.loads(usage.removeprefix(b"data: "))
    result.tokens = told["usage"]["completion_tokens"] if told else 0
    if told and not told["choices"]:
        result.chunks.pop()  # the usage alone
    return result


async def closed_loop(
    port: int, bodies: Sequence[dict[str, Any]], clients: int, path: str = "/v1/completions"
) -> list[Stream]:
    """All the bodies, `clients` of them at once."""
    left, done = iter(bodies), list[Stream]()

    async def client() -> None:
        for body in left:
            done.append(await stream(port, body, path))

    await asyncio.gather(*(client() for _ in range(clients)))
    return done


async def open_loop(
    port: int, bodies: Sequence[dict[str, Any]], rate: float, seed: int = 0, path: str = "/v1/completions"
) -> list[Stream]:
    """The bodies as a Poisson process of `rate` a second, whatever the server has got done."""
    rng, start, at = random.Random(seed), time.perf_counter(), 0.0

    async def arrive(body: dict[str, Any], at: float) -> Stream:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        return await stream(port, body, path, start + at)

    tasks = []
    for body in bodies:
        at += rng.expovariate(rate)
        tasks.append(asyncio.create_task(arrive(body, at)))
    return list(await asyncio.gather(*tasks))
