"""Answers while they are made: text, log-probabilities and what was spent, as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import AsyncGenerator
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from fastapi import Request, Response

from model.inference import scheduler
from model.inference.engine import Engine
from model.inference.protocol import Prepared, ServiceError, error_body
from model.inference.text import TextStream, bytes_of, pieces

if TYPE_CHECKING:
    from model.inference.app import Service


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
        self.begun = False  # whether a part of it was given
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

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        return self._content(self.echo + self.stream.shown, True) | self._end(True)

    def part(self, text: str) -> dict[str, Any]:
        """What a stream says of the text that an answer gains."""
        content = self._content(text if self.begun else self.echo + text, False)
        self.begun = True
        return content | self._end(False)

    def _content(self, text: str, whole: bool) -> dict[str, Any]:
        return {"text": text}

    def _end(self, whole: bool) -> dict[str, Any]:
        end = {"finish_reason": self.reason, "logprobs": self.logprobs(whole)}
        return end | self.extension() if whole or self.reason else end

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
            took, whole = self.service.metrics.prices.of_request(request)
            found |= {"flops": took, "full_depth_flops": whole}
        return {"mor": found} if found else {}


class Message(Choice):
    """An answer in a conversation."""

    def _content(self, text: str, whole: bool) -> dict[str, Any]:
        if whole:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {"content": text} if self.begun else {"role": "assistant", "content": text}}

    def logprobs(self, whole: bool) -> dict[str, Any] | None:
        """A list of the answer's tokens, or of those since the last call; those that end it are not among them."""
        if self.asked.logprobs is None:
            return None
        start, first, ids = len(self.request.prompt), 0 if whole else self.listed, self.stream.ids
        self.listed = len(ids)
        content = []
        for place, token in enumerate(ids[first:], first):
            scored = self.request.scores[start + place]
            likeliest = [self._scored(*pair) for pair in scored.top]
            content.append({**self._scored(token, scored.logprob), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.service.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(bytes_of(text))}


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

    choice: type[Choice] = Choice
    prefix, kind, kind_of_chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, service: Service, prepared: Prepared, requests: list[scheduler.Request], events: asyncio.Queue):
        self.service, self.asked, self.requests, self.events = service, prepared.asked, requests, events
        each = self.asked.candidates
        self.choices = [self.choice(service, prepared, request, i // each) for i, request in enumerate(requests)]
        self.index = {request.order: i for i, request in enumerate(requests)}
        self.id, self.created, self.began = f"{self.prefix}{uuid.uuid4().hex}", int(time.time()), time.perf_counter()

    async def pieces(self) -> AsyncGenerator[list[tuple[int, str]], None]:
        """(choice, text that it gains) of each step, until all have ended. Leaving early cancels the rest."""
        metrics, left = self.service.metrics, len(self.choices)
        first = True
        try:
            while left:
                events = await self.events.get()
                if isinstance(events, Exception):
                    raise ServiceError(500, "the model failed on this batch", "server_error") from events
                if first:
                    metrics.first_token.observe(time.perf_counter() - self.began)
                first, gained = False, []
                for event in events:
                    place = self.index[event.request.order]
                    choice = self.choices[place]
                    if choice.reason:
                        continue
                    gained.append((place, choice.feed(event)))
                    if choice.reason:
                        left -= 1
                        if choice.stream.stopped:
                            self.service.worker.cancel([event.request])
                yield gained
            metrics.duration.observe(time.perf_counter() - self.began)
        finally:
            self.service.worker.cancel([choice.request for choice in self.choices if not choice.reason])
            metrics.answered(self.requests, self.usage())

    def usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self.requests[:: self.asked.candidates])
        answer = sum(len(choice.stream.ids) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def body(self, kind: str, **more: Any) -> dict[str, Any]:
        """An answer without its choices."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}
        return {**head, "choices": [], **more}

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
        text = json.dumps(self.body(self.kind, usage=self.usage())).replace(
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
        return json.dumps({"index": index, **choice.whole()})

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events, those of a step together."""
        usage = self.asked.stream_options and self.asked.stream_options.include_usage
        # All but the choice is the same in every one of them.
        before, after = json.dumps(self.body(self.kind_of_chunk, **({"usage": None} if usage else {}))).rsplit("[]", 1)
        try:
            async with contextlib.aclosing(self.pieces()) as pieces:
                async for gained in pieces:
                    items = []
                    for place, text in gained:
                        choice = self.choices[place]
                        shows = text or (choice.echo and not choice.begun)
                        if shows or choice.reason or self.asked.logprobs is not None:
                            items.append({"index": place, **choice.part(text)})
                    if items:
                        yield "".join(f"data: {before}[{json.dumps(item)}]{after}\n\n" for item in items)
            if usage:
                yield f"data: {json.dumps(self.body(self.kind_of_chunk, usage=self.usage()))}\n\n"
            yield "data: [DONE]\n\n"
        except ServiceError as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"


class Conversation(Completion):
    """The same for messages."""

    choice = Message
    prefix, kind, kind_of_chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"
