"""Connections of the server: bounds in time and number, and who may ask.

uvicorn waits for ever for the rest of a request's head and for a client that does not read, and answers what it cannot
parse as plain text; `guarded` bounds both and speaks JSON. Where connections are as many as are allowed, the oldest one
that has not sent a whole request makes room, so that silent ones keep nobody out. `Gate` lets requests through: by
Host, so that a page in a browser cannot reach a server on loopback under a name of its own (DNS rebinding), by content
type, so that no form can post, and by key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.inference.protocol import Limits, ServiceError, error_body

OPEN = ("/", "/health")  # asked without a key: they tell nothing


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware that refuses requests. hosts: names that Host may hold beside loopback's; None: any."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None, key: str | None):
        self.app, self.hosts, self.key = app, hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._fault(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await JSONResponse(error_body(error), error.status, {"Connection": "close"})(scope, receive, send)

    def _fault(self, scope: Scope) -> ServiceError | None:
        headers = dict(scope["headers"])
        host = _hostname(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and not is_loopback(host) and host not in self.hosts:
            return ServiceError(403, f"Host: {host!r} is not this server; start it with --allowed-host to allow it")
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                return ServiceError(401, "Authorization: expected Bearer and this server's key", "authentication_error")
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return ServiceError(415, f"Content-Type: expected application/json, got {kind!r}")
        return None


def _hostname(host: str) -> str:
    """Host without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def guarded(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol with limits on its connections."""

    opened: dict[Guarded, None] = {}  # in order of arrival

    class Guarded(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _answered = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            opened[self] = None
            waits = next((c for c in opened if c._unfinished), self) if len(opened) > limits.connections else None
            if waits is not None:
                waits._make_room()
            if waits is not self:
                self._watch()

        @property
        def _unfinished(self) -> bool:
            """Whether its client has yet to send the rest of a request, or a request at all."""
            if self._answered or self.transport.is_closing():
                return False
            return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

        def _make_room(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._answer(503, "Service Unavailable", f"more than {limits.connections} connections; try again later")
            else:  # within a body: the application learns that its client is gone
                opened.pop(self, None)
                self.transport.close()

        def data_received(self, data: bytes) -> None:
            if self._answered or self.transport.is_closing():
                return
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            opened.pop(self, None)
            self._deadline, self._unread = _cancelled(self._deadline), _cancelled(self._unread)
            super().connection_lost(exc)

        def _watch(self) -> None:
            """A head that has begun, or a connection that has said nothing yet, gets so many seconds."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._deadline = _cancelled(self._deadline)
            elif self._deadline is None and not self._answered and not self.transport.is_closing():
                self._deadline = self.loop.call_later(limits.head_seconds, self._too_late)

        def _too_late(self) -> None:
            self._deadline = None
            if not self.transport.is_closing():
                self._answer(408, "Request Timeout", f"no whole request within {limits.head_seconds:g} seconds")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = _cancelled(self._unread) or self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._unread = _cancelled(self._unread)
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            self._answer(400, "Bad Request", msg)

        def _answer(self, status: int, phrase: str, message: str) -> None:
            """An error where no request has reached the application."""
            self.transport.write(_error(status, phrase, message))
            self._answered = True
            opened.pop(self, None)
            # Closed at once, with something unread, the connection would be reset before the client has the answer.
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._deadline = self.loop.call_later(1.0, self.transport.close)

    return Guarded


def _error(status: int, phrase: str, message: str) -> bytes:
    kind = "server_error" if status == 503 else "invalid_request_error"
    body = json.dumps(error_body(ServiceError(status, message, kind))).encode()
    head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, with the timer stopped."""
    if timer is not None:
        timer.cancel()
    return None
