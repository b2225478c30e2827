"""The web application of the server (serve.py): OpenAI's completions on one engine.

POST /v1/completions (streaming or not; log-probabilities, so that lm-evaluation-harness's `local-completions` works),
POST /v1/chat/completions (where the tokenizer has a template), GET /v1/models, /health, /metrics (Prometheus), and / (a
page that colours tokens by depth). The engine runs in a thread of its own; requests reach it through a queue of
commands, so that no request ever waits for a lock; bodies are read and tokenized in other threads, so that no request
stops the event loop.

`protocol.py` and `chat.py` have the fields and the limits, `connection.py` who may ask and for how long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from tokenizers import Tokenizer

from model.inference import scheduler
from model.inference.answer import Completion, Conversation
from model.inference.chat import ChatTemplate
from model.inference.connection import Gate
from model.inference.engine import Engine
from model.inference.metrics import Metrics
from model.inference.page import PAGE
from model.inference.protocol import Limits, Prepared, ServiceError, error_body
from model.inference.reader import Reader
from model.inference.text import end_of_text, token_text
from model.inference.worker import EngineThread, Events, Sink

logger = logging.getLogger("uvicorn.error")


class Service:
    """Turns a body into completions."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, name: str, limits: Limits, template: ChatTemplate | None = None
    ):
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.metrics, self.worker = Metrics(engine), EngineThread(engine, self._hand_out)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.reader = Reader(tokenizer, engine.context, end_of_text(engine.model), limits, template)
        self.threads = ThreadPoolExecutor(2, "tokenize")
        self.token_text = lru_cache(100_000)(lambda token: token_text(tokenizer, token))

    def _hand_out(self, events: Mapping[Sink, Events]) -> None:
        """From the engine's thread: one wake-up of the event loop for all."""

        def call() -> None:
            for sink, of_step in events.items():
                sink(of_step)

        assert self.loop is not None
        self.loop.call_soon_threadsafe(call)

    async def off_loop(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that may take long, computed beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    async def read(self, http: Request, reader: Callable[[bytearray], Prepared]) -> Prepared:
        """The body, within its limits, checked and tokenized by `reader`. Raises ServiceError."""
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
        return await self.off_loop(reader, body)

    async def start(self, prepared: Prepared, kind: type[Completion]) -> Completion:
        """Queue what is asked for. Raises ServiceError."""
        asked = prepared.asked
        if asked.model not in (None, self.name):
            raise ServiceError(404, f"model: this server has {self.name!r}, not {asked.model!r}")
        events: asyncio.Queue = asyncio.Queue()
        prompts = [prompt for prompt in prepared.prompts for _ in range(asked.candidates)]
        try:
            submitted = self.worker.submit(prompts, prepared.params * len(prepared.prompts), events.put_nowait)
            requests = await asyncio.wrap_future(submitted)
        except scheduler.QueueFull as error:
            raise ServiceError(429, f"{error}; try again later", "rate_limit_error") from None
        except ValueError as error:
            raise ServiceError(400, str(error)) from None
        return kind(self, prepared, requests, events)


def build_app(
    engine: Engine,
    tokenizer: Tokenizer,
    name: str,
    limits: Limits | None = None,
    hosts: Sequence[str] | None = (),
    key: str | None = None,
    template: ChatTemplate | None = None,
) -> FastAPI:
    """The web application. name: of the model, as clients ask for it; hosts: names that a request's Host may hold
    beside loopback's, None for any; key: what clients must send as Bearer, None for no check; template: of
    conversations, without which none are held."""
    service = Service(engine, tokenizer, name, limits or Limits(), template)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        service.loop = asyncio.get_running_loop()
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

    async def answer(http: Request, reader: Callable[[bytearray], Prepared], kind: type[Completion]) -> Response:
        completion = await service.start(await service.read(http, reader), kind)
        if completion.asked.stream:
            service.metrics.requests.labels(200).inc()
            return StreamingResponse(completion.chunks(), media_type="text/event-stream")
        answer = await completion.whole(http)
        service.metrics.requests.labels(200).inc()
        return answer

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await answer(http, service.reader.read, Completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await answer(http, service.reader.read_chat, Conversation)

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
