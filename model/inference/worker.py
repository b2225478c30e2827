"""The engine's thread, which every other thread talks to by commands."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from model.inference import scheduler
from model.inference.engine import Engine
from model.inference.protocol import Ids, ServiceError
from model.inference.sampling import SamplingParams

Events = list[scheduler.Event] | Exception
Sink = Callable[[Events], None]


class EngineThread:
    """Runs an engine in a thread; every other thread talks to it by `call`.

    hand_out: has sinks called with their events, once a step for all of them, so that whoever waits is woken once.
    """

    def __init__(self, engine: Engine, hand_out: Callable[[Mapping[Sink, Events]], None]):
        self.engine, self.hand_out = engine, hand_out
        self.commands: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self.sinks: dict[int, Sink] = {}
        self.failure: Exception | None = None
        self.stopping = False
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def call(self, function: Callable[[], Any]) -> Future:
        """Have the engine's thread call a function; the future holds what it returns or raises."""
        future: Future = Future()
        self.commands.put((function, future))
        return future

    def submit(self, prompts: list[Ids], params: list[SamplingParams], sink: Sink) -> Future:
        """Queue requests, all or none; `sink` gets their events, those of a step together."""

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
            by_sink: dict[Sink, list[scheduler.Event]] = {}
            for event in events:
                order = event.request.order
                sink = self.sinks.pop(order, None) if event.finished else self.sinks.get(order)
                if sink is not None:
                    by_sink.setdefault(sink, []).append(event)
            if by_sink:
                self.hand_out(by_sink)

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
        self.hand_out(dict.fromkeys(self.sinks.values(), error))
        self.sinks.clear()
        for request in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.cancel(request)
