"""Requests: what each one is, who waits, who runs, and who is sent back when the pool runs out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model.config import MoRConfig
from model.depth import stages_of
from model.depth.layout import within
from model.flops import capacities, gates_of
from model.inference.policy import DepthPolicy
from model.inference.pool import Pool, Run
from model.inference.sampling import SamplingParams, TokenScore

GROWTH = 16  # tokens


class QueueFull(Exception):
    """As many requests wait as the engine takes; try again later."""


def ragged_gates(config: MoRConfig, policy: DepthPolicy) -> list[int]:
    """Gates whose tokens' keys and values lie apart, those of the tokens that they let in alone."""
    kept = within(stages_of(config), policy.limit(config))
    return sorted(stage.gate for stage in kept if stage.gate is not None and stage.uses[0].keys == "entered")


def gate_share(config: MoRConfig, policy: DepthPolicy) -> float:
    """Expected tokens behind those gates for each token of text, by the configured capacities."""
    return sum(1.0 if policy.exact else float(capacities(config)[gate]) for gate in ragged_gates(config, policy))


@dataclass(eq=False)
class Request:
    """One prompt and what became of it.

    text: prompt and generated ids; done: how many of them passed all layers since the last (re)start; depths:
    recursions that each of the `done` executed; tokens: the generated ids without a stop sequence; released: how many
    of those were handed out; runs: pages of all tokens, then one run per gate; places: positions of their tokens.
    finished: `stop`, `length`, `cancelled` or "" while it lives. policy: its depth; limit: most recursions of a token;
    share: expected tokens behind the gates whose keys lie apart (`gate_share`), ragged: how many these are. heads: how
    often each of the `done` was read out before the end; passed, judged: the gates behind which it passed layers, and
    those that scored it, as bits; gates: their raw scores [G], NaN where there is none, where the parameters ask for
    them. scores: position -> token's log-probability, where the parameters ask for it, a stop sequence's tokens
    included; the first token of a prompt has none.
    """

    order: int
    prompt: list[int]
    params: SamplingParams
    generator: random.Random
    text: list[int]
    runs: list[Run]
    places: list[list[int]]
    policy: DepthPolicy = DepthPolicy()  # noqa: RUF009 - frozen
    limit: int = 1
    share: float = 0.0
    ragged: int = 0
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    done: int = 0
    released: int = 0
    running: bool = False
    finished: str = ""
    preemptions: int = 0
    passed: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    gates: list[list[float]] = field(default_factory=list)
    scores: dict[int, TokenScore] = field(default_factory=dict)

    def limits(self, start: int, count: int, context: int) -> np.ndarray:
        """Recursions that the tokens from position `start` on may take, [count]."""
        length = min(len(self.prompt) + self.params.max_tokens, context)
        return self.policy.limits(np.arange(start, start + count), length, self.limit)

    def append(self, token: int, context: int) -> list[int]:
        """Take in a generated token; returns the tokens that can be handed out, and sets `finished` at the end."""
        self.text.append(token)
        self.tokens.append(token)
        held = 0
        for stop in map(list, self.params.stop):
            if self.tokens[-len(stop) :] == stop:
                del self.tokens[-len(stop) :]
                self.finished, held = "stop", 0
                break
            starts = range(1, min(len(stop), len(self.tokens) + 1))
            held = max([held, *(n for n in starts if self.tokens[-n:] == stop[:n])])
        if not self.finished and (len(self.tokens) >= self.params.max_tokens or len(self.text) >= context):
            self.finished, held = "length", 0
        ready = self.tokens[self.released : len(self.tokens) - held]
        self.released += len(ready)
        return ready


@dataclass(frozen=True)
class Event:
    """Tokens of a request that can be handed out, and why it ended if it did."""

    request: Request
    tokens: list[int]
    finished: str


class Scheduler:
    """First come, first served, within a number of running requests and the pool's pages.

    A request that is sent back keeps its place by order of arrival and what it generated; its keys and values are
    computed anew. The oldest request is never sent back while another runs, so that everyone gets done.
    """

    def __init__(
        self,
        config: MoRConfig,
        everyone: Pool,
        recursed: Pool,
        policy: DepthPolicy,
        max_batch: int,
        max_waiting: int | None,
    ):
        self.config, self.everyone, self.recursed, self.policy = config, everyone, recursed, policy
        self.ragged = ragged_gates(config, policy)
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._orders = itertools.count()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Check and queue a request. Raises ValueError naming what cannot be served, QueueFull when too many wait."""
        prompt, vocabulary = list(prompt), self.config.vocab_size
        context = self.config.max_position_embeddings
        if not prompt:
            raise ValueError("prompt: empty; give at least one token")
        outside = [token for token in prompt if not (isinstance(token, int) and 0 <= token < vocabulary)]
        if outside:
            raise ValueError(f"prompt: token id {outside[0]!r} is outside the vocabulary of {vocabulary}")
        if len(prompt) > context:
            raise ValueError(f"prompt: {len(prompt)} tokens leave no room in the context of {context}; shorten it")
        biased = [token for token in params.logit_bias if not 0 <= token < vocabulary]
        if biased:
            raise ValueError(f"logit_bias: token id {biased[0]!r} is outside the vocabulary of {vocabulary}")
        most = self.policy.limit(self.config)
        policy = self.policy if params.depth is None else params.depth.checked(self.config, most)
        share, ragged = gate_share(self.config, policy), len(ragged_gates(self.config, policy))
        total = min(len(prompt) + params.max_tokens, context)
        pages, pages_each = self.everyone.pages_for(total), self.recursed.pages_for(total) * ragged
        if pages > self.everyone.pages or pages_each > self.recursed.pages:
            raise ValueError(
                f"max_tokens: prompt and answer of {total} tokens can need more keys and values than the engine holds; "
                "ask for fewer, or give the engine more kv_tokens"
            )
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests wait already")
        runs = [Run() for _ in range(1 + gates_of(self.config))]
        places: list[list[int]] = [[] for _ in runs]
        depth = (policy, min(most, policy.limit(self.config)), share, ragged)
        request = Request(next(self._orders), prompt, params, params.generator(), list(prompt), runs, places, *depth)
        self.waiting.append(request)
        return request

    def admit(self) -> None:
        """Start waiting requests while slots are free and pages suffice for their text beside that of the running."""
        if not self.waiting or len(self.running) >= self.max_batch:
            return
        everyone, recursed = self._unclaimed()
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            need, need_recursed = self._needs(request)
            # A page for each run that lives and will soon need one, so that a newcomer is not sent back at once.
            ready, ready_recursed = everyone - need, recursed - need_recursed
            if self.running and (ready < self._growing(True) or ready_recursed < self._growing(False)):
                return
            everyone, recursed = everyone - need, recursed - need_recursed
            request.running = True
            self.running.append(self.waiting.pop(0))

    def _growing(self, everyone: bool) -> int:
        """Runs of the running requests, in one of the pools, that fill their last page within some tokens."""
        size = self.everyone.page_size
        gates = {0} if everyone else {1 + gate for gate in self.ragged}
        runs = [run for request in self.running for i, run in enumerate(request.runs) if i in gates]
        return sum(run.pages * size - run.length < GROWTH for run in runs)

    def _needs(self, request: Request) -> tuple[int, int]:
        length = len(request.text) + 1
        each = self.recursed.pages_for(length * request.share / request.ragged) if request.ragged else 0
        return self.everyone.pages_for(length), each * request.ragged

    def _unclaimed(self) -> tuple[int, int]:
        """Free pages, less what the running requests' texts still need."""
        everyone, recursed = self.everyone.free_pages(), self.recursed.free_pages()
        for request in self.running:
            need, need_recursed = self._needs(request)
            everyone -= max(0, need - request.runs[0].pages)
            recursed -= max(0, need_recursed - sum(run.pages for run in request.runs[1:]))
        return everyone, recursed

    def preempt(self) -> Request:
        """Send the youngest running request back to the queue."""
        request = max(self.running, key=lambda request: request.order)
        self._release(request)
        request.done, request.preemptions = 0, request.preemptions + 1
        place = next((i for i, other in enumerate(self.waiting) if other.order > request.order), len(self.waiting))
        self.waiting.insert(place, request)
        return request

    def finish(self, request: Request, reason: str) -> None:
        """Take a request out, whether it runs or waits."""
        request.finished = reason
        if request.running:
            self._release(request)
        else:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        request.running = False
        for i, run in enumerate(request.runs):
            (self.recursed if i else self.everyone).release(run)
            request.places[i].clear()
