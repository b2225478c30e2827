"""The engine: continuous depth-wise batching (paper section 2.2.3), everything counted from request to token.

Stages that share their layers form a call (`model.depth.layout`). In a step every call runs once, in order; a token
passes each call that it needs, and waits for the next step when its next stage belongs to a call that has run. So one
call of a shared block serves tokens at different recursions, and a request's next token enters with the next step, so
that no slot of the block stands empty; where no layers are shared, the same rule is ordinary continuous batching.
Prompts go the same way in chunks, beside the decoding of other requests. What lets a token in, and what becomes of its
state, are the rules of the model's method (`model.depth.base`), those of its causal pass.

Shapes: M tokens in flight, N tokens of one call, D hidden size, V vocabulary. Stages and gates count from 0.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.depth import stages_of
from model.depth.base import DepthMethod
from model.depth.layout import Stage, Use, last_gate, within
from model.inference.flight import Carried, Flight, InFlight, Rules
from model.inference.fused import FusedLayer, fits
from model.inference.packed import Norm, PackedLayer, Product, rotary
from model.inference.paged import KERNEL_PAGE, PagedPlan, PagedPool, kernel_serves, paged_plan
from model.inference.policy import DepthPolicy
from model.inference.pool import CallPlan, PagePool, Pool, Reader, Run, Writer
from model.inference.sampling import NOT_FINITE, SamplingParams, choose, score
from model.inference.scheduler import Event, Request, Scheduler, gate_share
from model.inference.slots import Slots

if TYPE_CHECKING:
    from model.config import MoRConfig
    from model.modeling import MoRForCausalLM


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


def recursion_of(stage: Stage) -> int:
    """The recursion or level of a stage, which a token may be kept from; 0 for layers outside of them."""
    return max(use.recursion or 0 for use in stage.uses) if stage.level is None else stage.level


def pageable(config: MoRConfig) -> bool:
    """Whether block tables can say what tokens see: `shared_update` lays some keys over others of the same places."""
    return not any(use.keys == "entered" and use.source is not None for s in stages_of(config) for use in s.uses)


class Engine:
    """Serves requests with one model.

    max_batch: requests that run at once. kv_tokens: tokens of text that the pool holds at the expected depth; the pool
    is allocated once. prefill_tokens: prompt tokens that enter in one step. max_waiting: requests that may wait, None
    for any number. depth: see `DepthPolicy`; a request may have its own, of no
    more recursions. paged: whether pages lie anywhere (`model.inference.paged`), by default on GPUs; page_size: None
    takes 256 slots where torch's paged kernel reads them, else 16. To be used from one thread.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        max_batch: int = 32,
        kv_tokens: int = 32 * 512,
        page_size: int | None = None,
        prefill_tokens: int = 128,
        max_waiting: int | None = None,
        depth: DepthPolicy | None = None,
        paged: bool | None = None,
    ):
        config = model.config
        paged = (model.device.type == "cuda" and pageable(config)) if paged is None else paged
        if page_size is None:
            page_size = KERNEL_PAGE if paged and kernel_serves(config, model.dtype, model.device) else 16
        sizes = {
            "max_batch": max_batch,
            "kv_tokens": kv_tokens,
            "page_size": page_size,
            "prefill_tokens": prefill_tokens,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if paged and not pageable(config):
            raise ValueError("paged: kv_strategy shared_update lays keys over others; leave it out, or use False")
        self.model, self.inner, self.config = model.eval(), model.model, config
        # As configured; refuses a model that cannot decide without looking ahead.
        full = "full" in (config.routing_mode, (depth or DepthPolicy()).mode)
        self.mode = self.inner._mode("full" if full and (depth is None or depth.mode != "exit") else "causal")
        self.policy = (depth or DepthPolicy()).checked(config)
        # A plain attribute: those of a transformers configuration are slow to read.
        self.context = config.max_position_embeddings
        self.method: DepthMethod = self.inner.depth
        self._lay_out()
        silent = {use.layer for stage in self.layout for use in stage.uses if use.keys == "none"}
        self.plan: Callable[..., CallPlan] = paged_plan if paged else CallPlan
        self.layers: list[PackedLayer | FusedLayer] = [
            FusedLayer(layer) if paged and fits(layer) else PackedLayer(layer, i in silent)
            for i, layer in enumerate(self.inner.layers)
        ]
        self.norm, self.head = Norm(self.inner.norm), Product(model.lm_head)
        share, pages = gate_share(config, self.policy), -(-kv_tokens // page_size)
        ragged = [len(s.uses) for s in self.layout if s.gate is not None and s.uses[0].keys == "entered"]
        layers = max(ragged, default=0)
        kind: type[PagedPool | PagePool] = PagedPool if paged else PagePool
        # Of pages as large as the kernel's, a run leaves half of the last one empty.
        empty = max_batch // 2 if page_size >= KERNEL_PAGE else 0
        recursed = round(pages * share) + empty * len(ragged)
        self.everyone = kind(config, len(self.layer_of_use), pages + empty, page_size, model.dtype, model.device)
        self.recursed = kind(config, layers, recursed, page_size, model.dtype, model.device)
        self.scheduler = Scheduler(config, self.everyone, self.recursed, self.policy, max_batch, max_waiting)
        self.slots = Slots(self, max_batch) if paged else None
        self.prefill_tokens = prefill_tokens
        self.flights: list[Flight] = []
        self.air: InFlight | None = None
        self.statistics = Statistics()

    def _lay_out(self) -> None:
        """Stages, calls, and which layer of the pool of every token's keys each depth writes and reads."""
        layout = within(self.method.layout, self.policy.limit(self.config))
        self.layout: list[Stage] = []
        self.calls: list[list[int]] = []
        for stage in layout:
            before = self.layout[-1] if self.layout else None
            plain = before is not None and before.gate is None and stage.gate is None
            if before is not None and plain and recursion_of(before) == recursion_of(stage):
                self.layout[-1] = replace(before, uses=(*before.uses, *stage.uses))  # one call for all of them
                continue
            if before is not None and before.gate is not None and stage.gate is not None and stage.call == before.call:
                self.calls[-1].append(len(self.layout))
            else:
                self.calls.append([len(self.layout)])
            self.layout.append(stage)
        self.last_gate = last_gate(layout)
        recursions = range(self.policy.limit(self.config) + 1)
        self.last_gates = [last_gate(within(layout, limit)) for limit in recursions]  # of tokens that may take so many
        # Layers of the pool are those of the whole model, whatever the depth policy leaves out.
        uses = [use for stage in self.method.layout for use in stage.uses]
        owned = [use.depth for use in uses if use.keys == "everyone"]
        self.layer_of_use = {depth: i for i, depth in enumerate(owned)}
        self.silent = frozenset(use.depth for use in uses if use.keys == "none")
        self.reads = self.layer_of_use | {
            use.depth: self.layer_of_use[use.source] for use in uses if use.source is not None
        }

    def _policies_fit(self) -> bool:
        """Whether a request may have a depth of its own: no call makes several recursions of layers that all pass."""
        plain = [stage for stage in self.layout if stage.gate is None and stage.level is None]
        return all(len({use.recursion or 0 for use in stage.uses}) == 1 for stage in plain)

    # Requests --------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Request:
        """Queue a request. Raises ValueError for one that cannot be served, QueueFull when too many wait."""
        params = params or SamplingParams()
        if params.depth is not None and params.depth != self.policy and not self._policies_fit():
            raise ValueError(
                f"depth: {params.depth}: this model repeats layer by layer; only the engine's own depth fits"
            )
        return self.scheduler.submit(prompt, params)

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
        """Take tokens in, run every call once, take finished tokens out. Returns what can be handed out."""
        began = time.perf_counter()
        self.scheduler.admit()
        self._enter()
        for call in self.calls:
            self._run_call(call)
        done = [flight for flight in self.flights if flight.at == len(self.layout)]
        events = self._leave(done) if done else []
        events += self._decode() if self.slots is not None else []
        self.statistics.steps += 1
        self.statistics.seconds += time.perf_counter() - began
        return events

    def _retain(self, wanted: Callable[[Flight], bool]) -> None:
        """Forget the flights that are not wanted."""
        kept = [flight for flight in self.flights if wanted(flight)]
        if len(kept) == len(self.flights):
            return
        index = [flight.indices() for flight in kept]
        self.air = self.air.select(np.concatenate(index)) if kept and self.air is not None else None
        self.flights, offset = kept, 0
        for flight in kept:
            flight.offset, offset = offset, offset + flight.count

    def _reserve(self, wanted: list[tuple[Request, Pool, Run, int]]) -> None:
        """Room in the pool for tokens of these requests, the oldest first; if there is none, the youngest requests are
        sent back, perhaps one of these."""
        for request, pool, run, tokens in sorted(wanted, key=lambda item: item[0].order):
            while request.running and not pool.reserve(run, tokens):
                self.scheduler.preempt()
                self.statistics.preemptions += 1
        self._retain(lambda flight: flight.request.running)

    def _call(self, uses: Sequence[Use], hidden: Tensor, positions: Tensor, plan: CallPlan) -> Tensor:
        """Apply layers to packed tokens. hidden: [N, D]; positions: [N]."""
        began = time.perf_counter()
        cos, sin = self.inner.rotary_emb(hidden, positions[None])
        cos, sin = rotary(cos[0], sin[0])
        if isinstance(plan, PagedPlan):
            hidden = hidden.clone()  # which its layers write over
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
        decoding: list[Request] = []
        if self.slots is not None:
            self.slots.forget()
        budget = self.prefill_tokens
        for request in self.scheduler.running:
            pending = len(request.text) - request.done
            count = 1 if pending == 1 else min(pending, budget)
            if request in flying or not count:
                continue
            if self.slots is not None and pending == 1 and self.slots.serves(request):
                decoding += [request] if self.slots.waits_for(request) else []
                continue
            if pending > 1:
                budget -= count
            entering.append(Flight(request, request.done, count, count == pending))
        wanted: list[tuple[Request, Pool, Run, int]] = [] if self.slots is None else self.slots.wanted(decoding)
        wanted += [(flight.request, self.everyone, flight.request.runs[0], flight.count) for flight in entering]
        self._reserve(wanted)
        for request in decoding:
            if self.slots is not None and request.running:
                self.slots.enter(request)
                self.statistics.prompt_tokens += len(request.text) <= len(request.prompt)
        entering = [flight for flight in entering if flight.request.running]
        if not entering:
            return
        ids, positions, prompts, allowed = [], [], [], []
        for flight in entering:
            request = flight.request
            limits = request.limits(flight.start, flight.count, self.context)
            allowed.append([limits, np.full_like(limits, request.limit), np.full_like(limits, request.policy.exact)])
            end = flight.start + flight.count
            ids.append(np.array(flight.request.text[flight.start : end]))
            positions.append(np.arange(flight.start, end))
            prompts.append(np.full(flight.count, len(flight.request.prompt)))
            flight.request.runs[0].length = end
            self.statistics.prompt_tokens += flight.count if flight.start < len(flight.request.prompt) else 0
        known = [self._indices(parts) for parts in (ids, positions, prompts)]
        self._join(entering, known[0], known[1], known[2], np.concatenate(allowed, axis=1))

    def _join(
        self, entering: list[Flight], ids: Tensor, positions: Tensor, prompts: Tensor, allowed: np.ndarray
    ) -> None:
        """Embeddings of new flights, which then stand before the first stage. allowed: see `InFlight.new`."""
        state = self.inner.embed_tokens(ids)
        fresh = InFlight.new(ids, positions, prompts, state, self.method.gates, allowed)
        offset = len(self.tokens.ids) if self.air is not None else 0
        for flight in entering:
            flight.offset, offset = offset, offset + flight.count
        self.air = fresh if self.air is None else self.air.join(fresh)
        self.flights += entering
        self._arrive(entering)

    @property
    def tokens(self) -> InFlight:
        """The tokens in flight, where there are any."""
        assert self.air is not None
        return self.air

    # Gates -----------------------------------------------------------------------------------------------------------

    def _advance(self, flights: list[Flight]) -> None:
        """Bring flights that have passed their stage, or that nobody needs there, before the next one."""
        ending = [flight for flight in flights if self.layout[flight.at].gate == self.last_gate]
        if ending and self.last_gate >= 0 and self.method.mixes:
            air = self.tokens
            for _, index, rules in self._alike(np.concatenate([flight.indices() for flight in ending])):
                air.state.index_copy_(0, index, self.method.end(air.state[index], Carried(air, index), rules))
        for flight in flights:
            flight.at += 1
        self._arrive([flight for flight in flights if flight.at < len(self.layout)])

    def _arrive(self, flights: list[Flight]) -> None:
        """Decide who takes part in the stage that flights stand before; they go on where that is nobody."""
        if not flights:
            return
        began = time.perf_counter()
        for at in sorted({flight.at for flight in flights}):
            indices = np.concatenate([flight.indices() for flight in flights if flight.at == at])
            self._decide(self.layout[at], indices)
        self.statistics.model_seconds += time.perf_counter() - began
        computes = self.tokens.computes
        needless = [flight for flight in flights if not computes[flight.place].any()]
        if needless:
            self._advance(needless)

    def _alike(self, indices: np.ndarray) -> Iterator[tuple[Tensor | slice, Tensor, Rules]]:
        """The tokens `indices`, together those that may go as deep: their rows, themselves, their rules."""
        limit, exact = self.tokens.limit[indices], self.tokens.exact[indices]
        kinds = 2 * limit + exact
        if (kinds == kinds[:1]).all():
            index = self._indices([indices])
            yield slice(None), index, Rules(self, index, int(limit[0]), bool(exact[0]))
            return
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            index = self._indices([indices[rows]])
            yield self._indices([rows]), index, Rules(self, index, int(kind) // 2, bool(kind % 2))

    def _decide(self, stage: Stage, indices: np.ndarray) -> None:
        """Which of the tokens `indices` pass the gate of a stage, and which take part in it."""
        air, method, gate, recursion = self.tokens, self.method, stage.gate, recursion_of(stage)
        if gate is None:
            air.enters[indices] = air.computes[indices] = air.most[indices] > recursion
            return
        if gate == 0:
            for _, index, rules in self._alike(indices):
                air.bring(index, method.begin(air.state[index], rules))
            air.offered[indices] = True
        offered = indices[air.offered[indices] & (air.limit[indices] > recursion)]
        air.enters[indices] = False
        air.judged[offered] |= 1 << gate
        for rows, index, rules in self._alike(offered) if len(offered) else ():
            own = Carried(air, index)
            x = method.prepare(gate, air.state[index], rules)
            logits = method.score(gate, x, own, rules)
            if logits is not None:
                air.logits.index_copy_(0, index, logits.to(air.logits.dtype))
                air.scores[index, gate] = logits.float()
            admitted = None if rules.all_in else method.admit(gate, logits, x, own, rules)
            air.enters[offered[rows]] = True if admitted is None else admitted.cpu().numpy()
        if method.nested:
            air.offered[indices] = air.enters[indices]
        # Others look at keys of every token, made by passing the stage, or from the states with which tokens stopped.
        everyone = stage.whole or stage.uses[0].keys == "everyone"
        air.computes[indices] = (air.most[indices] > recursion) if everyone else air.enters[indices]

    # Calls -----------------------------------------------------------------------------------------------------------

    def _run_call(self, call: list[int]) -> None:
        """One call of the layers that the stages `call` share, on every token that stands before one of these."""
        waiting = [flight for flight in self.flights if flight.at in call]
        if not waiting:
            return
        computes = self.tokens.computes
        wanted: list[tuple[Request, Pool, Run, int]] = []
        for flight in waiting:
            stage = self.layout[flight.at]
            if stage.gate is not None and stage.uses[0].keys == "entered":
                run, tokens = flight.request.runs[1 + stage.gate], int(computes[flight.place].sum())
                wanted.append((flight.request, self.recursed, run, tokens))
        if wanted:
            self._reserve(wanted)
        flights = sorted((flight for flight in self.flights if flight.at in call), key=lambda flight: flight.at)
        if flights:
            if self.layout[call[0]].gate is None:
                self._pass_everyone(flights, self.layout[call[0]])
            else:
                self._pass_gates(flights)
            self._advance(flights)

    def _pass_everyone(self, flights: list[Flight], stage: Stage) -> None:
        """Layers that every token passes."""
        air, index = self.tokens, self._indices([flight.indices() for flight in flights])
        everyone = len(index) == len(air.ids) and len(flights) == len(self.flights)
        state = air.state if everyone and flights == self.flights else air.state[index]
        positions = air.positions if state is air.state else air.positions[index]
        fresh = self._call(stage.uses, state, positions, self._plan_everyone(flights))
        if state is air.state:
            air.state = fresh
        else:
            air.state.index_copy_(0, index, fresh)

    def _pass_gates(self, flights: list[Flight]) -> None:
        """The shared layers on flights in order of their stages, and the results put in place."""
        air, method = self.tokens, self.method
        reading, giving = [], []  # of each flight: tokens that pass the layers, and tokens that give keys alone
        for flight in flights:
            computes, whole = air.computes[flight.place], self.layout[flight.at].whole
            reads = computes if whole else computes & air.enters[flight.place]
            reading.append(np.flatnonzero(reads))
            giving.append(np.flatnonzero(computes & ~reads))
        plan = self._plan_gates(flights, reading, giving)
        rows = [
            flight.offset + own for own_of in (reading, giving) for flight, own in zip(flights, own_of, strict=True)
        ]
        indices = np.concatenate(rows)
        index = torch.from_numpy(indices).to(self.model.device)
        before = air.state[index]
        groups = self._groups(flights, reading)
        if type(method).prepare is not DepthMethod.prepare:
            for at, start, count in [*groups, *self._groups(flights, giving, plan.reading)]:
                part = slice(start, start + count)
                before[part] = method.prepare(self._gate(at), before[part], Rules(self, index[part]))
        after = self._call(self.layout[flights[0].at].uses, before, air.positions[index], plan)
        self.statistics.block_tokens += plan.reading
        for at, start, count in groups:
            part = slice(start, start + count)
            air.passed[indices[part]] |= 1 << self._gate(at)
            self._merge(self._gate(at), indices[part], index[part], before[part], after[part])

    def _gate(self, at: int) -> int:
        gate = self.layout[at].gate
        assert gate is not None
        return gate

    def _groups(self, flights: list[Flight], chosen: list[np.ndarray], start: int = 0) -> list[tuple[int, int, int]]:
        """(stage, first row, number of rows) of each stage's tokens in a call, from row `start` on."""
        found = []
        for at in sorted({flight.at for flight in flights}):
            count = sum(len(own) for flight, own in zip(flights, chosen, strict=True) if flight.at == at)
            if count:
                found.append((at, start, count))
            start += count
        return found

    def _merge(self, gate: int, indices: np.ndarray, index: Tensor, before: Tensor, after: Tensor) -> None:
        """Give the tokens that a gate let in the result of its stage."""
        air, enters = self.tokens, self.tokens.enters[indices]
        if not enters.all():
            going = torch.from_numpy(np.flatnonzero(enters)).to(index.device)
            indices, index, before, after = indices[enters], index[going], before[going], after[going]
        if not len(indices):
            return
        for rows, alike, rules in self._alike(indices):
            own, logits = Carried(air, alike), air.logits[alike]
            state, changes = self.method.merge(gate, before[rows], after[rows], logits, own, rules)
            air.state.index_copy_(0, alike, state)
            air.bring(alike, changes)
        air.depth[indices] += 1

    def _plan_gates(self, flights: list[Flight], reading: list[np.ndarray], giving: list[np.ndarray]) -> CallPlan:
        """Who writes and reads where. flights: by stage; reading, giving: tokens of each that take part."""
        readers: list[Reader] = []
        writing: list[tuple[Pool, int, np.ndarray]] = []
        for flight, own in zip(flights, reading, strict=True):
            use, run_of_all, count = self.layout[flight.at].uses[0], flight.request.runs[0], len(own)
            positions, over = flight.start + own, None
            base = self.reads.get(use.depth, 0)
            if use.keys == "everyone":
                writing.append((self.everyone, base, self.everyone.slots(run_of_all, positions)))
            elif use.keys == "entered":
                run = flight.request.runs[1 + self._gate(flight.at)]
                held = flight.request.places[1 + self._gate(flight.at)]
                writing.append((self.recursed, 0, self.recursed.slots(run, np.arange(run.length, run.length + count))))
                held += positions.tolist()
                seen = list(range(run.length + 1, run.length + count + 1))
                run.length += count
                if use.source is None:
                    readers.append(Reader(self.recursed, 0, run, seen))
                    continue
                assert isinstance(self.recursed, PagePool)
                over = (self.recursed, run, torch.tensor(held, device=self.model.device))
            if count:
                readers.append(Reader(self.everyone, base, run_of_all, (positions + 1).tolist(), over))
        for flight, own in zip(flights, giving, strict=True):
            base = self.reads.get(self.layout[flight.at].uses[0].depth, 0)
            writing.append((self.everyone, base, self.everyone.slots(flight.request.runs[0], flight.start + own)))
        uses = self.layout[flights[0].at].uses
        return self.plan(self._writers(writing), readers, {use.depth: i for i, use in enumerate(uses)})

    def _writers(self, writing: list[tuple[Pool, int, np.ndarray]]) -> list[Writer]:
        """One writer for neighbours that write to the same layers of the same pool."""
        writers, begin = [], 0
        for (_, layer), parts in itertools.groupby(writing, key=lambda part: (id(part[0]), part[1])):
            stretch = list(parts)
            index = self._indices([slots for _, _, slots in stretch])
            if len(index):
                writers.append(Writer(begin, len(index), stretch[0][0], layer, index))
                begin += len(index)
        return writers

    def _plan_everyone(self, flights: list[Flight]) -> CallPlan:
        """The plan of layers that see every token: slot and position of a token are the same."""
        readers, slots = [], []
        for flight in flights:
            run, end = flight.request.runs[0], flight.start + flight.count
            slots.append(self.everyone.slots(run, np.arange(flight.start, end)))
            seen = list(range(flight.start + 1, end + 1))
            readers.append(Reader(self.everyone, 0, run, seen))
        index = self._indices(slots)
        writer = Writer(0, len(index), self.everyone, 0, index)
        return self.plan([writer], readers, self.reads, self.silent)

    # Out -------------------------------------------------------------------------------------------------------------

    def _leave(self, done: list[Flight]) -> list[Event]:
        """Head and next token of flights that passed all stages."""
        air = self.tokens.select(np.concatenate([flight.indices() for flight in done]))
        self._retain(lambda flight: flight not in done)
        state = air.state
        ends, begin = [], 0
        for flight in done:
            request, end = flight.request, begin + flight.count
            if request.params.prompt_logprobs:
                self._score_prompt(flight, state[begin:end])
            request.done += flight.count
            request.depths[flight.start :] = air.depth[begin:end].tolist()
            request.passed[flight.start :] = air.passed[begin:end].tolist()
            request.judged[flight.start :] = air.judged[begin:end].tolist()
            request.heads[flight.start :] = air.heads[begin:end].tolist()
            if request.params.gates:
                request.gates[flight.start :] = air.scores[begin:end].tolist()
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
        return self._hand_out(requests, tokens, logits)

    def _decode(self) -> list[Event]:
        """A step of the slots, and the next token of requests whose token is done."""
        assert self.slots is not None
        began = time.perf_counter()
        done = self.slots.step()
        self.statistics.model_seconds += time.perf_counter() - began
        if not done:
            return []
        requests, tokens = [request for _, request, _ in done], [told["token"] for _, _, told in done]
        for slot, request, told in done:
            request.done += 1
            request.depths[request.done - 1 :] = [told["depth"]]
            request.passed[request.done - 1 :] = [told["passed"]]
            request.judged[request.done - 1 :] = [told["judged"]]
            request.heads[request.done - 1 :] = [told["heads"]]
            if request.params.gates:
                request.gates[request.done - 1 :] = self.slots.kept["scores"][slot : slot + 1].tolist()
        logits, params = None, [request.params for request in requests]
        if not all(p.greedy and not p.adjusts and p.logprobs is None for p in params):
            logits = self.slots.head[torch.tensor([slot for slot, _, _ in done], device=self.model.device)]
            tokens = choose(logits, params, [r.generator for r in requests], [r.tokens for r in requests])
        elif not all(told["finite"] for _, _, told in done):
            raise FloatingPointError(NOT_FINITE)
        return self._hand_out(requests, tokens, logits)

    def _hand_out(self, requests: list[Request], tokens: list[int], logits: Tensor | None) -> list[Event]:
        """The next token of each request. logits: [len(requests), V], where one wants their scores."""
        events = []
        for i, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if not request.params.max_tokens:  # the prompt's scores are all that was asked for
                self.scheduler.finish(request, "length")
                events.append(Event(request, [], "length"))
                continue
            if request.params.logprobs is not None and logits is not None:
                request.scores[len(request.text)] = score(logits[i : i + 1], [token], request.params.logprobs)[0]
            ready = request.append(token, self.context)
            if request.finished:
                self.scheduler.finish(request, request.finished)
            if ready or request.finished:
                events.append(Event(request, ready, request.finished))
            self.statistics.generated_tokens += 1
        return events
