"""The engine: continuous depth-wise batching (paper section 2.2.3), everything counted from request to token.

One step takes tokens in at the first layers, runs the shared block once on a batch of tokens at different recursions,
and takes those that are done through the last layers and the head; a request's next token enters with the next step, so
that no slot of the block stands empty. Prompts go the same way in chunks, beside the decoding of other requests. For
vanilla and recursive models the same step is ordinary continuous batching: all layers are "before" an empty block.

Shapes: M tokens in flight, N tokens of one call, D hidden size, Nr recursions, V vocabulary. Recursions count from 0 in
the code (the paper's r - 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import routing
from model.cache import owned_uses
from model.depth.layout import Use
from model.inference.packed import Norm, PackedLayer, Product, rotary
from model.inference.pool import CallPlan, PagePool, Reader, Run, Writer
from model.inference.sampling import SamplingParams, choose, score
from model.inference.scheduler import DepthPolicy, Event, Request, Scheduler, gate_share
from model.layers import Tokens
from model.modeling import MoRForCausalLM, Row


@dataclass(eq=False)
class Flight:
    """Consecutive tokens of one request between first and last layer: one when decoding, else a chunk of a prompt.

    start: position of the first; ends: whether the text ends with the last, so that the next token is wanted; at: the
    recursion that they enter next; offset: where they stand among all the tokens in flight.
    """

    request: Request
    start: int
    count: int
    ends: bool
    at: int = 0
    offset: int = 0

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + self.count)


@dataclass
class InFlight:
    """All tokens between the first layer and the last, [M] each.

    ids, positions, state [M, D], logits (of the router that judged last), base [M, D] and gate (token-choice: the
    state before the recursions, and the factor of their output); on the host: active (takes part in the next call of
    the block), kept (and goes on with its result), depth (recursions executed), chosen (token-choice: to execute).
    """

    ids: Tensor
    positions: Tensor
    state: Tensor
    logits: Tensor
    base: Tensor | None
    gate: Tensor | None
    active: np.ndarray
    kept: np.ndarray
    depth: np.ndarray
    chosen: np.ndarray

    def select(self, index: np.ndarray) -> InFlight:
        """The tokens `index`, in this order."""
        on_device = torch.from_numpy(index).to(self.ids.device)
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            picks = index if isinstance(value, np.ndarray) else on_device
            values[name] = None if value is None else value[picks]
        return InFlight(**values)

    def join(self, other: InFlight) -> InFlight:
        """These tokens, then the others."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            more = getattr(other, name)
            join: Any = np.concatenate if isinstance(value, np.ndarray) else torch.cat
            values[name] = None if value is None else join([value, more])
        return InFlight(**values)


@dataclass
class Statistics:
    """Counts since the engine was made. seconds: in `step`; model_seconds: of those, in layers, routers and head."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    block_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0


class Engine:
    """Serves requests with one model.

    max_batch: requests that run at once. kv_tokens: tokens of text that the pool holds at the expected depth; the pool
    is allocated once. prefill_tokens: prompt tokens that enter in one step. max_waiting: requests that may wait, None
    for any number. depth: see `DepthPolicy`. To be used from one thread.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        max_batch: int = 32,
        kv_tokens: int = 32 * 512,
        page_size: int = 16,
        prefill_tokens: int = 128,
        max_waiting: int | None = None,
        depth: DepthPolicy | None = None,
    ):
        sizes = {
            "max_batch": max_batch,
            "kv_tokens": kv_tokens,
            "page_size": page_size,
            "prefill_tokens": prefill_tokens,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        config = model.config
        self.model, self.inner, self.config = model.eval(), model.model, config
        self.inner._mode("causal")  # refuses a model that cannot decide without looking ahead
        self.policy = (depth or DepthPolicy()).checked(config)
        # Plain attributes: those of a transformers configuration are slow to read.
        self.kv_strategy, self.context = config.kv_strategy, config.max_position_embeddings
        self.token_choice, self.expert_choice = config.routing == "token_choice", config.routing == "expert_choice"
        self.first_sees_everyone = self.token_choice or self.kv_strategy != "recursion_wise"
        self.limit = self.policy.limit(config)
        self._lay_out()
        self.layers = [PackedLayer(layer) for layer in self.inner.layers]
        self.norm, self.head = Norm(self.inner.norm), Product(model.lm_head)
        share, pages = gate_share(config, self.policy), -(-kv_tokens // page_size)
        layers = len(self.block[0]) if share else 0
        self.everyone = PagePool(config, len(self.layer_of_use), pages, page_size, model.dtype, model.device)
        self.recursed = PagePool(config, layers, round(pages * share), page_size, model.dtype, model.device)
        self.scheduler = Scheduler(config, self.everyone, self.recursed, self.policy, max_batch, max_waiting)
        self.prefill_tokens = prefill_tokens
        self.flights: list[Flight] = []
        self.air: InFlight | None = None
        self.statistics = Statistics()

    def _lay_out(self) -> None:
        """Which layers stand before, in and after the block, and which layer of the pool each depth reads."""
        config = self.config
        segments = [list(stage.uses) for stage in self.inner.layout]
        self.block: list[list[Use]] = []
        self.after: list[Use] = []
        if config.routing == "none":
            self.before = [use for segment in segments for use in segment if (use.recursion or 0) < self.limit]
        elif config.sharing == "middle_cycle":
            self.before, self.block, self.after = segments[0], segments[1:-1], segments[-1]
        else:
            self.before, self.block = [], segments
        owned = [use.depth for use in owned_uses(config) if use.keys == "everyone"]
        self.layer_of_use = {depth: i for i, depth in enumerate(owned)}
        self.silent = frozenset(use.depth for use in self.before if use.keys == "none")
        self.reads = self.layer_of_use | {
            use.depth: self.layer_of_use[use.source]
            for use in self.before
            if use.source is not None and use.depth in self.silent
        }
        # One call of the block serves every recursion, unless recursions have weights of their own.
        self.apart = config.relaxation != "none" or not config.share_norms

    # Requests --------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Request:
        """Queue a request. Raises ValueError for one that cannot be served, QueueFull when too many wait."""
        return self.scheduler.submit(prompt, params or SamplingParams())

    def cancel(self, request: Request) -> None:
        """Stop a request and free what it holds; what it generated so far stays."""
        if not request.finished:
            self.scheduler.finish(request, "cancelled")
            self._retain(lambda flight: flight.request.running)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self.scheduler.idle

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None) -> list[Request]:
        """Serve all the prompts; returns the finished requests in order."""
        requests = [self.submit(prompt, params) for prompt in prompts]
        for _ in self.stream():
            pass
        return requests

    def stream(self) -> Iterator[Event]:
        """Step until nothing is left to do."""
        while not self.idle:
            yield from self.step()

    def kv_bytes(self) -> int:
        """Bytes of the pool: all that keys and values ever take."""
        return self.everyone.memory_bytes() + self.recursed.memory_bytes()

    # One step --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Take tokens in, run the block once, take finished tokens out. Returns what can be handed out."""
        began = time.perf_counter()
        self.scheduler.admit()
        self._enter()
        if self.block:
            self._run_block()
        done = [flight for flight, waiting in zip(self.flights, self._waiting(), strict=True) if not waiting]
        events = self._leave(done) if done else []
        self.statistics.steps += 1
        self.statistics.seconds += time.perf_counter() - began
        return events

    def _waiting(self) -> list[int]:
        """How many tokens of each flight have yet to pass the block."""
        if self.air is None:
            return [0] * len(self.flights)
        return np.add.reduceat(self.air.active, [flight.offset for flight in self.flights], dtype=np.int64).tolist()

    def _retain(self, wanted: Callable[[Flight], bool]) -> None:
        """Forget the flights that are not wanted."""
        kept = [flight for flight in self.flights if wanted(flight)]
        if len(kept) == len(self.flights):
            return
        index = [np.arange(flight.offset, flight.offset + flight.count) for flight in kept]
        self.air = self.air.select(np.concatenate(index)) if kept and self.air is not None else None
        self.flights, offset = kept, 0
        for flight in kept:
            flight.offset, offset = offset, offset + flight.count

    def _reserve(self, wanted: list[tuple[Flight, PagePool, Run, int]]) -> None:
        """Room in the pool for tokens of these flights, the oldest request first; if there is none, the youngest
        requests are sent back, perhaps one of these."""
        for flight, pool, run, tokens in sorted(wanted, key=lambda item: item[0].request.order):
            while flight.request.running and not pool.reserve(run, tokens):
                self.scheduler.preempt()
                self.statistics.preemptions += 1
        self._retain(lambda flight: flight.request.running)

    def _call(self, uses: list[Use], hidden: Tensor, positions: Tensor, plan: CallPlan) -> Tensor:
        """Apply layers to packed tokens. hidden: [N, D]; positions: [N]."""
        began = time.perf_counter()
        cos, sin = self.inner.rotary_emb(hidden, positions[None])
        cos, sin = rotary(cos[0], sin[0])
        for use in uses:
            hidden = self.layers[use.layer](hidden, cos, sin, use.recursion or 0, plan, use.depth)
            if self.inner.recursion_encoding is not None and use.encoding is not None:
                hidden = hidden * self.inner.recursion_encoding[use.encoding]
        self.statistics.model_seconds += time.perf_counter() - began
        return hidden

    def _indices(self, values: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(values)).to(self.model.device)

    # In --------------------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Start the next token of every decoding request, and chunks of prompts within the step's budget."""
        flying = {flight.request for flight in self.flights}
        entering: list[Flight] = []
        budget = self.prefill_tokens
        for request in self.scheduler.running:
            pending = len(request.text) - request.done
            count = 1 if pending == 1 else min(pending, budget)
            if request in flying or not count:
                continue
            if pending > 1:
                budget -= count
            entering.append(Flight(request, request.done, count, count == pending))
        self._reserve([(flight, self.everyone, flight.request.runs[0], flight.count) for flight in entering])
        entering = [flight for flight in entering if flight.request.running]
        if not entering:
            return
        ids, positions = [], []
        for flight in entering:
            end = flight.start + flight.count
            ids.append(np.array(flight.request.text[flight.start : end]))
            positions.append(np.arange(flight.start, end))
            flight.request.runs[0].length = end
            self.statistics.prompt_tokens += flight.count if flight.start < len(flight.request.prompt) else 0
        self._join(entering, self._indices(ids), self._indices(positions))

    def _join(self, entering: list[Flight], ids: Tensor, positions: Tensor) -> None:
        """Embedding and first layers of new flights, and the routers' first decision on them."""
        state = self.inner.embed_tokens(ids)
        if self.before:
            state = self._call(self.before, state, positions, self._plan_everyone(entering))
        count, offset = len(ids), self.air.state.shape[0] if self.air is not None else 0
        for flight in entering:
            flight.offset, offset = offset, offset + flight.count
        ones, zeros = np.ones(count, dtype=bool), np.zeros(count, dtype=np.int64)
        logits = torch.zeros(count, device=state.device)
        fresh = InFlight(ids, positions, state, logits, None, None, ones & bool(self.block), ones, zeros, zeros.copy())
        if self.token_choice:
            self._choose_depths(fresh)
        self.air = fresh if self.air is None else self.air.join(fresh)
        self.flights += entering
        if self.expert_choice:
            self._decide(entering)

    def _plan_everyone(self, flights: list[Flight]) -> CallPlan:
        """The plan of layers that see every token: slot and position of a token are the same."""
        readers, slots = [], []
        for flight in flights:
            run, end = flight.request.runs[0], flight.start + flight.count
            first = run.first * self.everyone.page_size
            slots.append(np.arange(first + flight.start, first + end))
            seen = list(range(flight.start + 1, end + 1))
            readers.append(Reader(self.everyone, 0, run, seen))
        index = self._indices(slots)
        writer = Writer(0, len(index), self.everyone, 0, index)
        return CallPlan([writer], readers, self.reads, self.silent)

    # Routing ---------------------------------------------------------------------------------------------------------

    def _row(self, ids: Tensor, positions: Tensor) -> Row:
        """What the random control needs to know of tokens [N]."""
        return Row(Tokens(ids, ids), positions[None], input_ids=ids[None])

    def _choose_depths(self, air: InFlight) -> None:
        """Token-choice: the recursions of new tokens, and their gates (eq. 2.2)."""
        began, config = time.perf_counter(), self.config
        if config.router == "random":
            logits = routing.random_logits(air.ids[None], air.positions[None], 0, config.num_recursions)[0]
        else:
            logits = self.inner.routers[0](air.state)
        scores = routing.depth_scores(logits, self.inner.activation, self.inner.alpha)
        choice = self.inner._choose_depth(scores[None], None)[0].clamp(max=self.limit - 1)
        if self.policy.mode == "uniform":
            choice = torch.full_like(choice, self.limit - 1)
        air.base, air.gate = air.state.clone(), scores.gather(1, choice[:, None])[:, 0].to(air.state.dtype)
        air.chosen = choice.cpu().numpy() + 1
        self.statistics.model_seconds += time.perf_counter() - began

    def _decide(self, flights: list[Flight]) -> None:
        """Expert-choice: which of the tokens kept so far enter the next recursion, by their own score (section 3.1)."""
        began, air = time.perf_counter(), self.air
        assert air is not None
        for r in sorted({flight.at for flight in flights}):
            here = [flight for flight in flights if flight.at == r]
            places = np.concatenate([np.arange(flight.offset, flight.offset + flight.count) for flight in here])
            offered = places[air.kept[places]]
            air.active[places] = air.kept[places] = False
            if r >= self.limit or not len(offered):
                continue
            index = torch.from_numpy(offered).to(self.model.device)
            row, states, flat = (
                self._row(air.ids[index], air.positions[index]),
                air.state[index],
                torch.arange(len(offered)),
            )
            logits = self.inner._logits("routers", r, states, row, flat.to(index.device))
            air.logits[index] = logits
            if self.policy.mode == "uniform" or self.inner.capacities[r] == 1.0:
                air.kept[offered] = True
            else:
                if self.config.selection == "aux_router" and self.config.router != "random":
                    logits = self.inner._logits("aux_routers", r, states, row, flat)
                air.kept[offered] = (logits >= 0).cpu().numpy()
            air.active[places] = air.kept[places]
            if r == 0 and self.kv_strategy != "recursion_wise":
                air.active[places] = True  # deeper tokens look at the first recursion's keys of every token
        self.statistics.model_seconds += time.perf_counter() - began

    # The block -------------------------------------------------------------------------------------------------------

    def _run_block(self) -> None:
        """One call of the shared block on every active token, whatever its recursion, and the decisions that follow."""
        if self.air is None:
            return
        wanted = [
            (flight, self.recursed, flight.request.runs[1 + flight.at], tokens)
            for flight, tokens in zip(self.flights, self._waiting(), strict=True)
            if tokens and not self._reads_shared(flight.at)
        ]
        self._reserve(wanted)
        waiting = zip(self.flights, self._waiting(), strict=True)
        flights = sorted((flight for flight, tokens in waiting if tokens), key=lambda flight: flight.at)
        groups = [flights]
        if self.apart:
            groups = [[f for f in flights if f.at == r] for r in sorted({flight.at for flight in flights})]
        for group in groups:
            if group:
                self._run_group(group)
        if self.expert_choice:
            self._decide(flights)

    def _reads_shared(self, recursion: int) -> bool:
        """Whether tokens of a recursion write nothing into its own run."""
        return self.kv_strategy == "shared" or (recursion == 0 and self.first_sees_everyone)

    def _run_group(self, flights: list[Flight]) -> None:
        """The block on flights in order of recursion, and its result put in place."""
        air = self.air
        assert air is not None
        alone = np.zeros(1, dtype=np.int64)
        chosen = [np.flatnonzero(air.active[flight.place]) if flight.count > 1 else alone for flight in flights]
        places = np.concatenate([flight.offset + own for flight, own in zip(flights, chosen, strict=True)])
        uses = self.block[flights[0].at if self.apart else 0]
        plan = self._plan_block(flights, chosen, {use.depth: i for i, use in enumerate(uses)})
        index = torch.from_numpy(places).to(self.model.device)
        state = air.state[index]
        fresh = self._call(uses, state, air.positions[index], plan)
        self.statistics.block_tokens += len(places)
        if self.expert_choice:
            fresh = self.inner._mix(state, fresh, air.logits[index])
        kept = air.kept[places]
        if not kept.all():
            places, going = places[kept], torch.from_numpy(np.flatnonzero(kept)).to(index.device)
            index, fresh = index[going], fresh[going]
        air.state.index_copy_(0, index, fresh)
        air.depth[places] += 1
        for flight in flights:
            flight.at += 1
            if self.token_choice:
                air.active[flight.place] = air.chosen[flight.place] > flight.at
                air.kept[flight.place] = True

    def _plan_block(self, flights: list[Flight], chosen: list[np.ndarray], layers: dict[int, int]) -> CallPlan:
        """Who writes and reads where. flights: by recursion; chosen: the tokens of each that take part."""
        readers: list[Reader] = []
        everyone, recursed = [], []
        base = self.layer_of_use.get(self.block[0][0].depth, 0)
        for flight, own in zip(flights, chosen, strict=True):
            r, whole, count = flight.at, flight.request.runs[0], len(own)
            positions, run = flight.start + own, flight.request.runs[1 + r]
            over = None
            if r == 0 and self.first_sees_everyone:
                everyone.append(whole.first * self.everyone.page_size + positions)
            elif self.kv_strategy != "shared":
                recursed.append(run.first * self.recursed.page_size + run.length + np.arange(count))
                held = flight.request.places[1 + r]
                held += positions.tolist()
                seen = list(range(run.length + 1, run.length + count + 1))
                run.length += count
                if self.kv_strategy == "recursion_wise":
                    readers.append(Reader(self.recursed, 0, run, seen))
                    continue
                over = (self.recursed, run, torch.tensor(held, device=self.model.device))
            readers.append(Reader(self.everyone, base, whole, (positions + 1).tolist(), over))
        writers, begin = [], 0
        for pool, layer, slots in ((self.everyone, base, everyone), (self.recursed, 0, recursed)):
            if slots:
                index = self._indices(slots)
                writers.append(Writer(begin, len(index), pool, layer, index))
                begin += len(index)
        return CallPlan(writers, readers, layers)

    # Out -------------------------------------------------------------------------------------------------------------

    def _leave(self, done: list[Flight]) -> list[Event]:
        """Last layers, head and next token of flights that passed the block."""
        assert self.air is not None
        order = [np.arange(flight.offset, flight.offset + flight.count) for flight in done]
        air = self.air.select(np.concatenate(order))
        self._retain(lambda flight: flight not in done)
        state = air.state
        if air.base is not None and air.gate is not None:
            state = air.base + (air.gate[:, None] * state if self.config.gating == "weighted" else state)
        if self.after:
            state = self._call(self.after, state, air.positions, self._plan_everyone(done))
        ends, begin = [], 0
        for flight in done:
            request, end = flight.request, begin + flight.count
            if request.params.prompt_logprobs:
                self._score_prompt(flight, state[begin:end])
            request.done += flight.count
            request.depths[flight.start :] = air.depth[begin:end].tolist()
            begin = end
            if flight.ends:
                ends.append(end - 1)
        wanting = [flight.request for flight in done if flight.ends]
        return self._next_tokens(wanting, state[torch.tensor(ends, device=state.device)]) if wanting else []

    def _score_prompt(self, flight: Flight, state: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow those of a flight. state: [flight.count, D]."""
        request, first = flight.request, flight.start + 1
        following = request.prompt[first : first + flight.count]
        if following:
            logits = self.head(self.norm(state[: len(following)]))
            scores = score(logits, following, request.params.logprobs or 0)
            request.scores |= dict(enumerate(scores, first))

    def _next_tokens(self, requests: list[Request], state: Tensor) -> list[Event]:
        """Head and choice. state: [len(requests), D]."""
        began = time.perf_counter()
        logits = self.head(self.norm(state))
        self.statistics.model_seconds += time.perf_counter() - began
        params = [request.params for request in requests]
        tokens = choose(logits, params, [r.generator for r in requests], [r.tokens for r in requests])
        events = []
        for i, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if not request.params.max_tokens:  # the prompt's scores are all that was asked for
                self.scheduler.finish(request, "length")
                events.append(Event(request, [], "length"))
                continue
            if request.params.logprobs is not None:
                request.scores[len(request.text)] = score(logits[i : i + 1], [token], request.params.logprobs)[0]
            ready = request.append(token, self.context)
            if request.finished:
                self.scheduler.finish(request, request.finished)
            if ready or request.finished:
                events.append(Event(request, ready, request.finished))
            self.statistics.generated_tokens += 1
        return events
