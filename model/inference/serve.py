"""An OpenAI-compatible server of text completions on one engine.

python -m model.inference.serve --checkpoint DIR [--host 127.0.0.1] [--port 8000]

POST /v1/completions (streaming or not), GET /v1/models, /health and /metrics (Prometheus). The engine runs in a thread
of its own; requests reach it through a queue of commands, so that no request ever waits for a lock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import queue
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer
from transformers.utils.logging import disable_progress_bar

from model.inference import scheduler
from model.inference.engine import Engine
from model.inference.generate import add_engine_arguments, load_engine
from model.inference.sampling import SamplingParams
from model.inference.text import TextStream, end_of_text

Ids = list[int]
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class CompletionRequest(BaseModel):
    """The fields of OpenAI's completions that are honoured; any other is refused rather than ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[str] | Ids | list[Ids]
    model: str | None = None
    max_tokens: int = Field(16, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = Field(1, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    user: str | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[Ids]:
        """Token ids of every prompt."""
        if isinstance(self.prompt, str):
            return [tokenizer.encode(self.prompt).ids]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return [tokenizer.encode(item).ids if isinstance(item, str) else item for item in self.prompt]  # type: ignore[misc]

    def stops(self) -> list[str]:
        """Stop strings. Raises ValueError for an empty one."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not all(stops) or len(stops) > 16:
            raise ValueError("stop: give at most 16 texts, none of them empty")
        return stops


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which a request is refused. body: bytes; choices: prompts times n; patience: seconds for a drain."""

    body: int = 1 << 20
    choices: int = 16
    patience: int = 30


class ServiceError(Exception):
    """A refusal, with its HTTP status."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.kind = status, kind


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
        self.depth = Counter("mor_token_depth", "Generated tokens by executed recursions", ["recursions"], **make)
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
        self.ends = end_of_text(engine.model)

    async def read(self, http: Request) -> CompletionRequest:
        """The body, within its limit, checked."""
        body = b""
        async for part in http.stream():
            body += part
            if len(body) > self.limits.body:
                raise ServiceError(413, f"body: more than {self.limits.body} bytes")
        try:
            return CompletionRequest.model_validate(json.loads(body))
        except ValidationError as error:
            faults = {".".join(map(str, e["loc"][:1])) or "body": e["msg"] for e in error.errors()}
            raise ServiceError(400, "; ".join(f"{name}: {text}" for name, text in faults.items())) from None
        except (ValueError, RecursionError) as error:
            raise ServiceError(400, f"body: no JSON object: {error}") from None

    async def start(self, asked: CompletionRequest) -> Completion:
        """Queue what is asked for. Raises ServiceError."""
        try:
            if asked.model not in (None, self.name):
                raise ServiceError(404, f"model: this server has {self.name!r}, not {asked.model!r}")
            prompts, stops = asked.prompts(self.tokenizer), asked.stops()
            if not 1 <= len(prompts) * asked.n <= self.limits.choices:
                raise ValueError(f"prompt: {len(prompts)} texts times n must make 1 to {self.limits.choices} choices")
            if asked.stream_options and not asked.stream:
                raise ValueError("stream_options: only with stream")
            common = SamplingParams(asked.max_tokens, asked.temperature, asked.top_k, asked.top_p, stop=self.ends)
            params = [
                replace(common, seed=None if asked.seed is None else asked.seed + i)
                for _ in prompts
                for i in range(asked.n)
            ]
            events: asyncio.Queue = asyncio.Queue()
            loop = asyncio.get_running_loop()
            everything = [prompt for prompt in prompts for _ in range(asked.n)]
            sink = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)  # noqa: E731
            requests = await asyncio.wrap_future(self.worker.submit(everything, params, sink))
        except scheduler.QueueFull as error:
            raise ServiceError(429, f"{error}; try again later", "rate_limit_error") from None
        except ValueError as error:
            raise ServiceError(400, str(error)) from None
        return Completion(self, asked, requests, [TextStream(self.tokenizer, stops) for _ in requests], events)


class Completion:
    """One HTTP request's texts while they are made."""

    def __init__(self, service: Service, asked: CompletionRequest, requests, streams: list[TextStream], events):
        self.service, self.asked, self.requests, self.streams, self.events = service, asked, requests, streams, events
        self.index = {request.order: i for i, request in enumerate(requests)}
        self.reasons: dict[int, str] = {}
        self.id, self.created, self.began = f"cmpl-{uuid.uuid4().hex}", int(time.time()), time.perf_counter()

    async def pieces(self) -> AsyncGenerator[tuple[int, str, str | None], None]:
        """(choice, text that it gains, why it ended or None), until all have ended. Leaving early cancels the rest."""
        metrics = self.service.metrics
        try:
            while len(self.reasons) < len(self.requests):
                event = await self.events.get()
                if isinstance(event, Exception):
                    raise ServiceError(500, "the model failed on this batch", "server_error") from event
                choice = self.index[event.request.order]
                if choice in self.reasons:
                    continue
                if not self.reasons and not any(stream.ids for stream in self.streams):
                    metrics.first_token.observe(time.perf_counter() - self.began)
                stream = self.streams[choice]
                text, reason = stream.feed(event.tokens, bool(event.finished)), event.finished or None
                if stream.stopped:
                    reason = "stop"
                    self.service.worker.cancel([event.request])
                if reason:
                    self.reasons[choice] = reason
                yield choice, text, reason
            metrics.duration.observe(time.perf_counter() - self.began)
        finally:
            self.service.worker.cancel([r for r in self.requests if self.index[r.order] not in self.reasons])
            usage = self.usage()
            metrics.prompt_tokens.inc(usage["prompt_tokens"])
            metrics.generated_tokens.inc(usage["completion_tokens"])
            if self.service.engine.config.routing != "none":
                for request in self.requests:
                    for depth in request.depths[len(request.prompt) :]:
                        metrics.depth.labels(depth).inc()

    def usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self.requests[:: self.asked.n])
        answer = sum(len(stream.ids) for stream in self.streams)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def body(self, choices: list[dict], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.service.name}
        return {**head, "choices": choices, **more}

    async def whole(self, http: Request) -> dict[str, Any]:
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
        choices = [
            {"index": i, "text": stream.shown, "finish_reason": self.reasons[i], "logprobs": None}
            for i, stream in enumerate(self.streams)
        ]
        return self.body(choices, usage=self.usage())

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        try:
            async with contextlib.aclosing(self.pieces()) as pieces:
                async for choice, text, reason in pieces:
                    if text or reason:
                        item = {"index": choice, "text": text, "finish_reason": reason, "logprobs": None}
                        yield f"data: {json.dumps(self.body([item]))}\n\n"
            if (self.asked.stream_options or {}).get("include_usage"):
                yield f"data: {json.dumps(self.body([], usage=self.usage()))}\n\n"
            yield "data: [DONE]\n\n"
        except ServiceError as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"


def error_body(error: ServiceError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": str(error), "type": error.kind, "param": None, "code": error.status}}


def build_app(engine: Engine, tokenizer: Tokenizer, name: str, limits: Limits | None = None) -> FastAPI:
    """The web application. name: of the model, as clients ask for it."""
    service = Service(engine, tokenizer, name, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        service.worker.thread.start()
        yield
        service.worker.stop()
        await asyncio.to_thread(service.worker.thread.join, service.limits.patience)

    app = FastAPI(title="Mixture-of-Recursions", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ServiceError)
    async def refuse(_: Request, error: ServiceError) -> Response:
        service.metrics.requests.labels(error.status).inc()
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error_body(error), error.status, headers)

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        asked = await service.read(http)
        completion = await service.start(asked)
        if asked.stream:
            service.metrics.requests.labels(200).inc()
            return StreamingResponse(completion.chunks(), media_type="text/event-stream")
        body = await completion.whole(http)
        service.metrics.requests.labels(200).inc()
        return JSONResponse(body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    async def health() -> Response:
        worker = service.worker
        good = worker.thread.is_alive() and worker.failure is None and not worker.stopping
        return JSONResponse({"status": "ok" if good else "failed"}, 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; a user's mistake ends with exit code 2 and one message."""
    parser = argparse.ArgumentParser(prog="python -m model.inference.serve", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="from_pretrained folder with tokenizer.json")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8000)
    add("--model-name", help="name that clients ask for (default: the checkpoint's path)")
    add("--max-waiting", type=int, default=256, help="requests that may wait before others get status 429")
    add_engine_arguments(parser)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        engine, tokenizer = load_engine(options, max_waiting=options.max_waiting)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    limits = Limits()
    app = build_app(engine, tokenizer, options.model_name or str(options.checkpoint), limits)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=limits.patience)


if __name__ == "__main__":
    main()
