"""The web application of the server (serve.py): OpenAI's text completions on one engine.

POST /v1/completions (streaming or not; log-probabilities, so that lm-evaluation-harness's `local-completions` works),
GET /v1/models, /health, /metrics (Prometheus), and / (a page that colours tokens by depth). The engine runs in a thread
of its own; requests reach it through a queue of commands, so that no request ever waits for a lock; bodies are read and
tokenized in other threads, so that no request stops the event loop.

`model/inference/protocol.py` has the fields and the limits, `connection.py` who may ask and for how long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from tokenizers import Tokenizer

from model.inference import scheduler
from model.inference.connection import Gate
from model.inference.cost import of_request
from model.inference.engine import Engine
from model.inference.page import PAGE
from model.inference.protocol import Ids, Limits, Prepared, Reader, ServiceError, error_body
from model.inference.sampling import SamplingParams
from model.inference.text import TextStream, end_of_text, pieces, token_text

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
logger = logging.getLogger("uvicorn.error")


class Metrics:
    """What /metrics tells."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mor_requests", "Requests by HTTP status", ["status"], **make)
        self.prompt_tokens = Counter("mor_prompt_tokens", "Prompt tokens taken in", **make)
        self.generated_tokens = Counter("mor_generated_tokens", "Tokens generated", **make)
        self.first_token = Histogram("mor_first_token_seconds", "Request to first token", buckets=SECONDS, **make)
        self.duration = Histogram("mor_request_seconds", "Request to last token", buckets=SECONDS, **make)
        depths = range(engine.method.gates + 1)
        self.depth = Histogram("mor_token_depth", "Recursions that generated tokens executed", buckets=depths, **make)
        self.flops = Counter("mor_flops", "Forward FLOPs of prompts and answers, exact", **make)
        self.saved = Counter("mor_saved_flops", "FLOPs that all of the depth for every token would have added", **make)
        for name, text, function in (
            ("mor_running", "Requests that run", lambda: len(engine.scheduler.running)),
            ("mor_waiting", "Requests that wait", lambda: len(engine.scheduler.waiting)),
            ("mor_preemptions", "Requests sent back for want of pages", lambda: engine.statistics.preemptions),
            ("mor_kv_bytes", "Bytes of the pool of keys and values", engine.kv_bytes),
            ("mor_kv_free_share", "Free share of its pages", lambda: self._free_share(engine)),
        ):
            Gauge(name, text, **make).set_function(function)

    @staticmethod
    def _free_share(engine: Engine) -> float:
        pools = (engine.everyone, engine.recursed)
        return sum(pool.free_pages() for pool in pools) / max(1, sum(pool.pages for pool in pools))


class EngineThread:
    """Runs an engine in a thread; every other thread talks to it by `call`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.commands: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self.sinks: dict[int, Callable[[scheduler.Event | Exception], None]] = {}
        self.failure: Exception | None = None
        self.stopping = False
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def call(self, function: Callable[[], Any]) -> Future:
        """Have the engine's thread call a function; the future holds what it returns or raises."""
        future: Future = Future()
        self.commands.put((function, future))
        return future

    def submit(self, prompts: list[Ids], params: list[SamplingParams], sink) -> Future:
        """Queue requests, all or none; `sink` is called with their events, in the engine's thread."""

        def submit():
            if self.failure is not None or self.stopping:
                raise ServiceError(503, "the engine has stopped", "server_error")
            room = self.engine.scheduler.max_waiting
            if room is not None and len(prompts) > room:
                raise ValueError(f"prompt: {len(prompts)} texts at once; this server queues {room}")
            requests = []
            try:
                for prompt, param in zip(prompts, params, strict=True):
                    requests.append(self.engine.submit(prompt, param))
            except Exception:
                for request in requests:
                    self.engine.cancel(request)
                raise
            self.sinks.update({request.order: sink for request in requests})
            return requests

        return self.call(submit)

    def cancel(self, requests: Sequence[scheduler.Request]) -> Future:
        """Stop requests that nobody waits for."""

        def cancel():
            for request in requests:
                self.sinks.pop(request.order, None)
                self.engine.cancel(request)

        return self.call(cancel)

    def stop(self) -> None:
        """Finish what runs, then end."""
        self.stopping = True
        self.call(lambda: None)

    def _loop(self) -> None:
        while not (self.stopping and self.engine.idle and self.commands.empty()):
            self._obey(wait=self.engine.idle)
            if self.engine.idle:
                continue
            try:
                events = self.engine.step()
            except Exception as error:
                self._fail(error)
                continue
            for event in events:
                sink = self.sinks.get(event.request.order)
                if event.finished:
                    self.sinks.pop(event.request.order, None)
                if sink is not None:
                    sink(event)

    def _obey(self, wait: bool) -> None:
        while wait or not self.commands.empty():
            function, future = self.commands.get()
            wait = False
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _fail(self, error: Exception) -> None:
        """A step went wrong: tell everyone, and take nothing in from now on."""
        self.failure = error
        for sink in self.sinks.values():
            sink(error)
        self.sinks.clear()
        for request in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.cancel(request)


class Service:
    """Turns a body into completions."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, limits: Limits):
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.metrics, self.worker = Metrics(engine), EngineThread(engine)
        self.reader = Reader(tokenizer, engine.context, end_of_text(engine.model), limits)
        self.threads = ThreadPoolExecutor(2, "tokenize")
        self.token_text = lru_cache(100_000)(lambda token: token_text(tokenizer, token))

    async def off_loop(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that may take long, computed beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    async def read(self, http: Request) -> Prepared:
        """The body, within its limits, checked and tokenized. Raises ServiceError."""
        body, limits = bytearray(), self.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in http.stream():
                    body += part
                    if len(body) > limits.body:
                        raise ServiceError(413, f"body: more than {limits.body} bytes")
        except TimeoutError:
            raise ServiceError(408, f"body: not whole within {limits.body_seconds:g} seconds") from None
        except ClientDisconnect:
            logger.info("%s: the client left while it sent its request", http.client.host if http.client else "?")
            raise ServiceError(499, "the client is gone") from None
        return await self.off_loop(self.reader.read, body)

    async def start(self, prepared: Prepared) -> Completion:
        """Queue what is asked for. Raises ServiceError."""
        asked = prepared.asked
        if asked.model not in (None, self.name):
            raise ServiceError(404, f"model: this server has {self.name!r}, not {asked.model!r}")
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()
        prompts = [prompt for prompt in prepared.prompts for _ in range(asked.candidates)]
        sink = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)  # noqa: E731
        try:
            submitted = self.worker.submit(prompts, prepared.params * len(prepared.prompts), sink)
            requests = await asyncio.wrap_future(submitted)
        except scheduler.QueueFull as error:
            raise ServiceError(429, f"{error}; try again later", "rate_limit_error") from None
        except ValueError as error:
            raise ServiceError(400, str(error)) from None
        return Completion(self, prepared, requests, events)


class Choice:
    """One answer while it is made: its text, its log-probabilities, its part of the response."""

    def __init__(self, service: Service, prepared: Prepared, request: scheduler.Request, prompt: int):
        self.service, self.asked, self.request = service, prepared.asked, request
        self.stream = TextStream(service.tokenizer, prepared.asked.stops())
        self.reason: str | None = None
        self.echo = ""
        if self.asked.echo:
            text = prepared.texts[prompt]
            self.echo = service.tokenizer.decode(request.prompt, skip_special_tokens=False) if text is None else text
        self.listed = 0  # tokens of the answer whose log-probabilities were given
        self.offset = len(self.echo)

    def feed(self, event: scheduler.Event) -> str:
        """Take in an event; returns the text that it adds, and sets `reason` at the end."""
        text = self.stream.feed(event.tokens, bool(event.finished))
        self.reason = "stop" if self.stream.stopped else event.finished or None
        return text

    def rank(self) -> float:
        """Log-probability per token, which the best of several has highest."""
        start = len(self.request.prompt)
        values = [scored.logprob for place, scored in self.request.scores.items() if place >= start]
        return fmean(values) if values else 0.0

    def logprobs(self, whole: bool) -> dict[str, list] | None:
        """OpenAI's four lists, of all tokens or of those since the last call; None where they are not asked for.

        They hold every token that was generated, those of a stop text and the token that ended the text included.
        """
        if self.asked.logprobs is None:
            return None
        tokens, scores, start = self.service.token_text, self.request.scores, len(self.request.prompt)
        ids = self.stream.ids if self.stream.stopped or not self.reason else self.request.text[start:]
        shown = pieces(self.service.tokenizer, ids) if whole else [tokens(token) for token in ids[self.listed :]]
        places = list(range(start + (0 if whole else self.listed), start + len(ids)))
        offset = len(self.echo) if whole else self.offset
        if self.echo and (whole or not self.listed):
            shown = pieces(self.service.tokenizer, self.request.prompt) + shown
            places, offset = [*range(start), *places], 0
        offsets = []
        for piece in shown:
            offsets.append(offset)
            offset += len(piece)
        self.listed, self.offset = len(ids), offset
        text = [*self.request.prompt, *ids]
        found = [scores.get(place) for place in places]
        best = [None if s is None else self._top(text[place], s) for place, s in zip(places, found, strict=True)]
        return {
            "tokens": [tokens(text[place]) for place in places],
            "token_logprobs": [None if s is None else s.logprob for s in found],
            "top_logprobs": best,
            "text_offset": offsets,
        }

    def _top(self, token: int, scored: Any) -> dict[str, float]:
        """The likeliest tokens, and this one, which may come in addition."""
        named = {self.service.token_text(other): value for other, value in reversed(scored.top)}
        return named | {self.service.token_text(token): scored.logprob}

    def body(self, text: str, whole: bool) -> dict[str, Any]:
        answer = {"text": text, "finish_reason": self.reason, "logprobs": self.logprobs(whole)}
        if whole or self.reason:
            answer |= self.extension()
        return answer

    def extension(self) -> dict[str, Any]:
        """`mor`: what was asked for of depths, scores and FLOPs. The last token has not been run and has none."""
        asked, request, engine = self.asked, self.request, self.service.engine
        start, end = len(request.prompt), len(request.prompt) + len(self.stream.ids)
        found: dict[str, Any] = {}
        if asked.return_depth:
            found |= {"prompt_depths": request.depths[:start], "depths": request.depths[start:end]}
        if asked.return_scores:
            scores = shown_scores(engine, request.gates)
            found |= {"prompt_scores": scores[:start], "scores": scores[start:end]}
        if asked.return_flops:
            took, whole = of_request(engine.config, request)
            found |= {"flops": took, "full_depth_flops": whole}
        return {"mor": found} if found else {}


def shown_scores(engine: Engine, gates: list[list[float]]) -> list[list[float | None]]:
    """Scores in 0..1 of each token: of each depth where a token chooses one, else of each gate that it met."""
    if not gates or not gates[0]:
        return [[] for _ in gates]
    raw = torch.tensor(gates)
    method = engine.method
    values = torch.sigmoid(raw)
    if method.chooses_depth and (shown := method.shown(engine.config, SimpleNamespace(scores=[raw]))) is not None:
        values = shown
    return [[None if math.isnan(value) else round(value, 6) for value in row] for row in values.tolist()]


class Completion:
    """One HTTP request's texts while they are made."""

    def __init__(self, service: Service, prepared: Prepared, requests: list[scheduler.Request], events: asyncio.Queue):
        self.service, self.asked, self.requests, self.events = service, prepared.asked, requests, events
        each = self.asked.candidates
        self.choices = [Choice(service, prepared, request, i // each) for i, request in enumerate(requests)]
        self.index = {request.order: i for i, request in enumerate(requests)}
        self.id, self.created, self.began = f"cmpl-{uuid.uuid4().hex}", int(time.time()), time.perf_counter()

    async def pieces(self) -> AsyncGenerator[tuple[int, str], None]:
        """(choice, text that it gains), until all have ended. Leaving early cancels the rest."""
        metrics, left = self.service.metrics, len(self.choices)
        first = True
        try:
            while left:
                event = await self.events.get()
                if isinstance(event, Exception):
                    raise ServiceError(500, "the model failed on this batch", "server_error") from event
                place = self.index[event.request.order]
                choice = self.choices[place]
                if choice.reason:
                    continue
                if first:
                    metrics.first_token.observe(time.perf_counter() - self.began)
                first, text = False, choice.feed(event)
                if choice.reason:
                    left -= 1
                    if choice.stream.stopped:
                        self.service.worker.cancel([event.request])
                yield place, text
            metrics.duration.observe(time.perf_counter() - self.began)
        finally:
            self._close()

    def _close(self) -> None:
        """Stop what still runs, and count what was done."""
        metrics = self.service.metrics
        self.service.worker.cancel([choice.request for choice in self.choices if not choice.reason])
        usage = self.usage()
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.generated_tokens.inc(usage["completion_tokens"])
        engine = self.service.engine
        for request in self.requests:
            took, whole = of_request(engine.config, request)
            metrics.flops.inc(took)
            metrics.saved.inc(max(0, whole - took))
            for depth in request.depths[len(request.prompt) :] if engine.method.gates else ():
                metrics.depth.observe(depth)

    def usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self.requests[:: self.asked.candidates])
        answer = sum(len(choice.stream.ids) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def body(self, choices: list[dict], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.service.name}
        return {**head, "choices": choices, **more}

    async def whole(self, http: Request) -> Response:
        """The answer in one piece; stops when the client is gone."""

        async def collect() -> None:
            async with contextlib.aclosing(self.pieces()) as pieces:
                async for _ in pieces:
                    pass

        task = asyncio.create_task(collect())
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and await http.is_disconnected():
                task.cancel()
        if task.cancelled():
            raise ServiceError(499, "the client is gone")
        task.result()
        # Each choice on its own: a list of log-probabilities can be long.
        parts = [await self.service.off_loop(self._part, i, choice) for i, choice in enumerate(self._best())]
        text = json.dumps(self.body([], usage=self.usage())).replace(
            '"choices": []', f'"choices": [{", ".join(parts)}]'
        )
        return Response(text, media_type="application/json")

    def _best(self) -> list[Choice]:
        """The choices that are given: of each prompt's candidates the best `n`."""
        each, chosen = self.asked.candidates, []
        for begin in range(0, len(self.choices), each):
            candidates = self.choices[begin : begin + each]
            if each > self.asked.n:
                candidates = sorted(candidates, key=Choice.rank, reverse=True)[: self.asked.n]
            chosen += candidates
        return chosen

    @staticmethod
    def _part(index: int, choice: Choice) -> str:
        return json.dumps({"index": index, **choice.body(choice.echo + choice.stream.shown, whole=True)})

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        usage = self.asked.stream_options and self.asked.stream_options.include_usage
        more = {"usage": None} if usage else {}
        begun: set[int] = set()
        try:
            async with contextlib.aclosing(self.pieces()) as pieces:
                async for place, text in pieces:
                    choice = self.choices[place]
                    if place not in begun:
                        begun.add(place)
                        text = choice.echo + text
                    if text or choice.reason or self.asked.logprobs is not None:
                        item = {"index": place, **choice.body(text, whole=False)}
                        yield f"data: {json.dumps(self.body([item], **more))}\n\n"
            if usage:
                yield f"data: {json.dumps(self.body([], usage=self.usage()))}\n\n"
            yield "data: [DONE]\n\n"
        except ServiceError as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"


def build_app(
    engine: Engine,
    tokenizer: Tokenizer,
    name: str,
    limits: Limits | None = None,
    hosts: Sequence[str] | None = (),
    key: str | None = None,
) -> FastAPI:
    """The web application. name: of the model, as clients ask for it; hosts: names that a request's Host may hold
    beside loopback's, None for any; key: what clients must send as Bearer, None for no check."""
    service = Service(engine, tokenizer, name, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        service.worker.thread.start()
        yield
        service.worker.stop()
        await asyncio.to_thread(service.worker.thread.join, service.limits.patience)
        service.threads.shutdown(wait=False)

    app = FastAPI(title="Mixture-of-Recursions", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, hosts=hosts, key=key)
    _add_refusals(app, service)
    _add_routes(app, service)
    return app


def _add_refusals(app: FastAPI, service: Service) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(ServiceError)
    async def refuse(_: Request, error: ServiceError) -> Response:
        service.metrics.requests.labels(error.status).inc()
        headers = {429: {"Retry-After": "1"}, 408: {"Connection": "close"}, 413: {"Connection": "close"}}
        return JSONResponse(error_body(error), error.status, headers.get(error.status))

    @app.exception_handler(HTTPException)
    async def unknown(http: Request, error: HTTPException) -> Response:
        text = f"{http.method} {http.url.path}: {error.detail}"
        answer = await refuse(http, ServiceError(error.status_code, text))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:
        return await refuse(http, ServiceError(500, "the server failed; its log says why", "server_error"))


def _add_routes(app: FastAPI, service: Service) -> None:
    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        completion = await service.start(await service.read(http))
        if completion.asked.stream:
            service.metrics.requests.labels(200).inc()
            return StreamingResponse(completion.chunks(), media_type="text/event-stream")
        answer = await completion.whole(http)
        service.metrics.requests.labels(200).inc()
        return answer

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ServiceError(404, f"model: this server has {service.name!r}, not {name!r}")
        return card

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE)

    @app.get("/health")
    async def health() -> Response:
        worker = service.worker
        good = worker.thread.is_alive() and worker.failure is None and not worker.stopping
        return JSONResponse({"status": "ok" if good else "failed"}, 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
