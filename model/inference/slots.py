"""Decoding on the device: each running request has a slot, and what becomes of its token is decided where it lies.

A step is the same operations whoever takes part: every call of layers runs for all slots, and masks say whose results
count. So nothing is read from the device but, at the step's end, one small tensor, and on a GPU the whole step is
recorded once as a CUDA graph for each of a ladder of sizes and replayed. Rules are those of `model.inference.engine`,
which takes prompts in by itself, where the host decides.

Shapes: B slots of a step, D hidden size, V vocabulary, G gates, P pages of a block table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.depth.base import DepthMethod
from model.depth.layout import Stage
from model.inference.flight import Rules
from model.inference.fused import taken
from model.inference.packed import Norm, rotary
from model.inference.paged import Look, PagedPlan, PagedPool
from model.inference.pool import Pool, Run
from model.inference.scheduler import Request

if TYPE_CHECKING:
    from model.inference.engine import Engine

GIVEN = ("kind", "id", "position", "prompt")  # what the host says of each slot, before the lengths of its runs
IDLE, FLYING, FRESH = range(3)
MOST_CALLS = 8
TOLD = ("token", "finite", "at", "depth", "passed", "judged", "heads", "wrote", "ran")  # what it is told of each


class Slots:
    """At most `size` requests that decode, one token each."""

    def __init__(self, engine: Engine, size: int):
        self.engine, self.size = engine, size
        config, device = engine.config, engine.model.device
        self.gates, self.end = engine.method.gates, len(engine.layout)
        assert isinstance(engine.everyone, PagedPool) and isinstance(engine.recursed, PagedPool)
        self.pools = engine.everyone, engine.recursed
        self.width = engine.everyone.pages_for(engine.context)
        self.requests: list[Request | None] = [None] * size
        self.flying = np.zeros(size, dtype=bool)
        rows = len(GIVEN) + self.gates
        on_gpu = device.type == "cuda"
        # What the host says of a step goes in one copy.
        self.host = torch.zeros(size * (rows + (1 + self.gates) * self.width), dtype=torch.int32, pin_memory=on_gpu)
        self.device = torch.zeros_like(self.host, device=device)
        self.given, self.tables = (part.numpy() for part in self._parts(self.host))
        self.answer = torch.zeros(size, len(TOLD), dtype=torch.int32, pin_memory=on_gpu)
        self.told = torch.zeros(size, len(TOLD), dtype=torch.int32, device=device)
        self.starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        gate_of = [0 if stage.gate is None else stage.gate for stage in engine.layout]
        self.gate_of = torch.tensor([*gate_of, 0, 0], device=device)
        vocabulary = config.vocab_size
        self.kept = {
            "state": torch.zeros(size, config.hidden_size, dtype=engine.model.dtype, device=device),
            "at": torch.full((size,), self.end + 1, device=device),
            "logits": torch.zeros(size, device=device),
            "scores": torch.full((size, self.gates), torch.nan, device=device),
            **{name: torch.zeros(size, dtype=torch.long, device=device) for name in ("depth", "passed", "judged")},
            "heads": torch.zeros(size, dtype=torch.long, device=device),
            **{name: torch.zeros(size, dtype=torch.bool, device=device) for name in ("offered", "enters", "computes")},
        }
        self.carry: dict[str, Tensor] = {}
        self.head = torch.zeros(size, vocabulary, dtype=engine.model.dtype, device=device)
        self.record = on_gpu  # each size of step as a graph
        # A model with many calls would be compiled for many minutes.
        self.take: Callable[[Any], Any] = taken(device if len(engine.calls) <= MOST_CALLS else torch.device("cpu"))
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.memory = torch.cuda.graph_pool_handle() if on_gpu else None
        self.met: set[int] = set()

    def _parts(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, size] and block tables [1 + G, size, P] in one stretch of memory."""
        rows = len(GIVEN) + self.gates
        given, tables = flat[: rows * self.size], flat[rows * self.size :]
        return given.view(rows, self.size), tables.view(1 + self.gates, self.size, self.width)

    # On the host -----------------------------------------------------------------------------------------------------

    def serves(self, request: Request) -> bool:
        """Whether a request decodes here: its tokens may all go as deep as the engine's."""
        return request.policy == self.engine.policy and request.policy.first is None

    def forget(self) -> None:
        """Free the slots of requests that run no longer."""
        for slot, request in enumerate(self.requests):
            if request is not None and not request.running:
                self.requests[slot] = None
                self.flying[slot] = False

    def waits_for(self, request: Request) -> bool:
        """Whether its next token can start: none is on its way."""
        return request not in self.requests or not self.flying[self.requests.index(request)]

    def enter(self, request: Request) -> None:
        """Start the next token of a request, the last of its text."""
        slot = self.requests.index(request) if request in self.requests else self.requests.index(None)
        place = len(request.text) - 1
        self.requests[slot], self.flying[slot] = request, True
        self.given[: len(GIVEN), slot] = FRESH, request.text[-1], place, len(request.prompt)
        request.runs[0].length = place + 1

    def wanted(self, entering: list[Request]) -> list[tuple[Request, Pool, Run, int]]:
        """Room for the tokens that are to start, and for what all tokens may need behind gates in one step."""
        everyone, recursed = self.pools
        gates = [_gate(stage) for stage in self.engine.layout if stage.gate is not None and _ragged(stage)]
        there = [request for request in self.requests if request is not None and request not in entering]
        found: list[tuple[Request, Pool, Run, int]] = [(request, everyone, request.runs[0], 1) for request in entering]
        found += [(request, recursed, request.runs[1 + gate], 1) for request in (*there, *entering) for gate in gates]
        return found

    def step(self) -> list[tuple[int, Request, dict[str, int]]]:
        """One step of all slots. Returns (slot, request, what is told of it) of the tokens that are done."""
        self.forget()
        used = [slot for slot, request in enumerate(self.requests) if request is not None]
        if not used:
            return []
        self._say()
        count = min(self.size, next(size for size in ladder() if size > used[-1]))
        self.device.copy_(self.host, non_blocking=True)
        self._run(count)
        self.answer[:count].copy_(self.told[:count], non_blocking=True)
        if self.device.is_cuda:
            torch.cuda.current_stream().synchronize()
        answers, done = self.answer.numpy(), []
        for slot in used:
            request = self.requests[slot]
            assert request is not None
            told = dict(zip(TOLD, answers[slot].tolist(), strict=True))
            self.given[0, slot] = FLYING
            for gate in range(self.gates):
                if told["wrote"] >> gate & 1:
                    request.runs[1 + gate].length += 1
                    request.places[1 + gate].append(int(self.given[2, slot]))
            self.engine.statistics.block_tokens += told["ran"]
            if told["at"] == self.end:
                self.given[0, slot] = IDLE
                self.flying[slot] = False
                done.append((slot, request, told))
        return done

    def _say(self) -> None:
        """Lengths and block tables as they are now."""
        for slot, request in enumerate(self.requests):
            if request is None:
                self.given[0, slot] = IDLE
                continue
            for row, run in enumerate(request.runs):
                if row:
                    self.given[len(GIVEN) + row - 1, slot] = run.length
                if run.table:
                    self.tables[row, slot, : len(run.table)] = run.table

    def _run(self, count: int) -> None:
        if not self.record:
            _Step(self, count).run()
        elif count in self.graphs:
            self.graphs[count].replay()
        elif count not in self.met:  # what it compiles and allocates comes before the recording
            self.met.add(count)
            _Step(self, count).run()
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.memory):
                _Step(self, count).run()
            self.graphs[count] = graph
            graph.replay()


def ladder() -> Sequence[int]:
    """Numbers of slots that a step is made for."""
    return (1, 2, 4, *range(8, 2**16, 8))


class _Rules(Rules):
    """What a method's rules may ask, of all slots; `here`: those whose answers count."""

    def __init__(self, step: _Step, here: Tensor):
        engine = step.slots.engine
        super().__init__(engine, here, engine.policy.limit(engine.config), engine.policy.exact)
        self.now, self.here = step, here

    @property
    def input_ids(self) -> Tensor:  # type: ignore[override]
        return self.now.ids

    @property
    def positions(self) -> Tensor:  # type: ignore[override]
        return self.now.positions

    @property
    def prompt(self) -> Tensor:  # type: ignore[override]
        return self.now.prompts

    def executed(self, depth: Tensor) -> None:
        self.now.depth = torch.where(self.here, depth, self.now.depth)

    def readout(self, x: Tensor) -> Tensor:
        self.now.heads = self.now.heads + self.here
        return self.engine.head(self.norm(x))

    def scored(self, logits: Tensor, used: Tensor | None = None, *, outputs: bool = False) -> None:
        if outputs:
            self.now.scores = torch.where(self.here[:, None], logits.float(), self.now.scores)


class _Step:
    """One step of the first `count` slots. What lies between the calls of layers is compiled on a GPU."""

    state: Tensor
    at: Tensor
    logits: Tensor
    scores: Tensor
    depth: Tensor
    passed: Tensor
    judged: Tensor
    heads: Tensor
    offered: Tensor
    enters: Tensor
    computes: Tensor

    def __init__(self, slots: Slots, count: int):
        self.slots, self.count, self.engine = slots, count, slots.engine
        self.layout, self.method = self.engine.layout, self.engine.method
        given, tables = slots._parts(slots.device)
        self.given, self.tables, self.starts = given[:, :count], tables[:, :count], slots.starts[: count + 1]
        for name, held in slots.kept.items():
            setattr(self, name, held[:count])
        self.carry = {name: held[:count] for name, held in slots.carry.items()}

    def run(self) -> None:
        """All of it; leaves in `slots` what the next step and the host want to know."""
        slots, engine, take = self.slots, self.engine, self.slots.take
        take(_Step._begin)(self)
        for i, call in enumerate(engine.calls):
            take(_Step._before)(self, i)
            self.after = self._layers(call, self.before, self._plan(call))
            take(_Step._behind)(self, i)
        logits = engine.head(take(_norm)(engine.norm, self.state))
        slots.head[: self.count] = logits
        best, tokens = logits.max(-1)
        take(_Step._keep)(self, best, tokens, slots.told[: self.count])
        for name, value in self.carry.items():
            if name not in slots.carry:
                slots.carry[name] = value.new_zeros(slots.size, *value.shape[1:])
            slots.carry[name][: self.count] = value

    def _begin(self) -> None:
        """Fresh tokens before their first stage."""
        engine, given = self.engine, self.given.long()
        kind, self.ids, self.positions, self.prompts = given[: len(GIVEN)]
        self.lengths, fresh = given[len(GIVEN) :], kind == FRESH
        self.at = torch.where(kind == IDLE, self.slots.end + 1, self.at).masked_fill(fresh, 0)
        self.state = torch.where(fresh[:, None], engine.inner.embed_tokens(self.ids), self.state)
        self.scores = self.scores.masked_fill(fresh[:, None], torch.nan)
        self.depth, self.passed = self.depth.masked_fill(fresh, 0), self.passed.masked_fill(fresh, 0)
        self.judged, self.heads = self.judged.masked_fill(fresh, 0), self.heads.masked_fill(fresh, 0)
        self.wrote = self.ran = torch.zeros_like(self.ids)
        cos, sin = engine.inner.rotary_emb(self.state, self.positions[None])
        self.angles = rotary(cos[0], sin[0])
        self._advance(fresh & ~self._decide(0, fresh), 0, 0)

    def _keep(self, best: Tensor, tokens: Tensor, told: Tensor) -> None:
        finite = best.abs() < torch.inf  # which nan is not either
        told.copy_(torch.stack([tokens, finite.long(), *(getattr(self, name) for name in TOLD[2:])], 1))
        for name, held in self.slots.kept.items():
            held[: self.count].copy_(getattr(self, name))

    # Gates -----------------------------------------------------------------------------------------------------------

    def _advance(self, moved: Tensor, first: int, last: int) -> None:
        """Bring tokens `moved` past the stages `first` to `last` where they stand, and past those where they are not
        needed."""
        origin, needless = self.at, torch.zeros_like(moved)
        for at in range(first, self.slots.end):
            if at > last and self.layout[at].gate is None:
                break  # where everyone computes, nobody goes on
            leaves = (moved & (origin == at)) | needless if at <= last else needless
            if self.layout[at].gate == self.engine.last_gate and self.engine.last_gate >= 0 and self.method.mixes:
                self._put(leaves, self.method.end(self.state, self.carry, _Rules(self, leaves)))
            self.at = self.at + leaves
            if at + 1 < self.slots.end:
                needless = leaves & ~self._decide(at + 1, leaves, at > last)

    def _decide(self, at: int, here: Tensor, needless: bool = False) -> Tensor:
        """Who of the tokens `here` takes part in the stage. needless: none of them did in the one before."""
        stage, method = self.layout[at], self.method
        gate = stage.gate
        if gate is None:
            self.enters, self.computes = self.enters | here, self.computes | here
            return here
        if gate == 0:
            self._bring(here, method.begin(self.state, _Rules(self, here)))
            self.offered = self.offered | here
        enters = torch.zeros_like(here)
        if gate == 0 or not (needless and method.nested):
            enters = self._judge(gate, self.offered & here)
        self.enters = torch.where(here, enters, self.enters)
        if method.nested:
            self.offered = torch.where(here, enters, self.offered)
        everyone = stage.whole or stage.uses[0].keys == "everyone"
        self.computes = torch.where(here, here if everyone else enters, self.computes)
        return self.computes & here

    def _judge(self, gate: int, offered: Tensor) -> Tensor:
        """Who of those offered passes a gate."""
        method, rules = self.method, _Rules(self, offered)
        self.judged = self.judged | (offered.long() << gate)
        x = method.prepare(gate, self.state, rules)
        logits = method.score(gate, x, self.carry, rules)
        if logits is not None:
            self.logits = torch.where(offered, logits.to(self.logits.dtype), self.logits)
            scores = self.scores.clone()
            scores[:, gate] = torch.where(offered, logits.float(), scores[:, gate])
            self.scores = scores
        admitted = None if rules.all_in else method.admit(gate, logits, x, self.carry, rules)
        return offered if admitted is None else offered & admitted

    def _bring(self, here: Tensor, changes: dict[str, Tensor]) -> None:
        for name, value in changes.items():
            old = self.carry.get(name)
            mask = here.view(-1, *[1] * (value.dim() - 1))
            self.carry[name] = torch.where(mask, value, torch.zeros_like(value) if old is None else old)

    def _put(self, here: Tensor, state: Tensor) -> None:
        self.state = torch.where(here[:, None], state, self.state)

    # Calls -----------------------------------------------------------------------------------------------------------

    def _before(self, i: int) -> None:
        """What the layers of a call take in: who takes part in each of its stages, and where they write and read."""
        call, method = self.engine.calls[i], self.method
        stages = [self.layout[at] for at in call]
        self.here = [self.computes & (self.at == at) for at in call]
        self.before = self.state
        if type(method).prepare is not DepthMethod.prepare and stages[0].gate is not None:
            for stage, these in zip(stages, self.here, strict=True):
                prepared = method.prepare(_gate(stage), self.state, _Rules(self, these))
                self.before = torch.where(these[:, None], prepared, self.before)
        self.reads = [
            these if _all_read(stage) else these & self.enters for stage, these in zip(stages, self.here, strict=True)
        ]
        self.reading = _any(self.reads)
        self.places = [self._places(*key, members, call) for key, members in self._groups(call).items()]

    def _groups(self, call: list[int]) -> dict[tuple[bool, int], list[int]]:
        """(keys of those who entered alone, layer of the pool) -> places in `call` of the stages that read there."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for i, at in enumerate(call):
            stage, entered = self.layout[at], _ragged(self.layout[at])
            base = 0 if entered or stage.gate is None else self.engine.reads[stage.uses[0].depth]
            groups.setdefault((entered, base), []).append(i)
        return groups

    def _places(
        self, entered: bool, base: int, members: list[int], call: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Whom a group is for, their block tables [B, P], slots that they see, and where they write."""
        pool: PagedPool = self.slots.pools[int(entered)]
        mask = _any([self.here[i] for i in members])
        table, place = self.tables[0], self.positions
        if entered:
            gates, rows = self.slots.gate_of[self.at], torch.arange(self.count, device=mask.device)
            table, place = self.tables[1 + gates, rows], self.lengths[gates, rows]
        stages = [self.layout[call[i]] for i in members]
        writing = [
            self.here[i]
            for i, stage in zip(members, stages, strict=True)
            if stage.gate is None or stage.uses[0].keys != "none"
        ]
        slots = None
        if writing:
            page = table.gather(1, (place // pool.page_size)[:, None])[:, 0]
            slot = page * pool.page_size + place % pool.page_size
            slots = torch.where(_any(writing), slot, pool.scratch)
        # Those who are not meant see one slot, so that nothing is divided by nothing.
        return mask, table, torch.where(mask, place + 1, 1).int(), slots

    def _plan(self, call: list[int]) -> PagedPlan:
        """Of the places found by `_before`: one look for stages that read the same layers of the same pool."""
        keeping, looks = [], []
        for (entered, base), (mask, table, seen, slots) in zip(self._groups(call), self.places, strict=True):
            pool, only = self.slots.pools[int(entered)], mask if len(self.places) > 1 else None
            keeping += [(pool, base, slots)] if slots is not None else []
            looks.append(Look(pool, base, slice(0, self.count), self.starts, 1, table, seen, only))
        stage = self.layout[call[0]]
        if stage.gate is None:
            return PagedPlan(keeping, looks, self.count, self.engine.reads, self.engine.silent)
        return PagedPlan(keeping, looks, self.count, {use.depth: i for i, use in enumerate(stage.uses)})

    def _layers(self, call: list[int], x: Tensor, plan: PagedPlan) -> Tensor:
        engine, x = self.engine, x.clone()
        giving = not all(_all_read(self.layout[at]) for at in call)  # some keep their states, and give keys alone
        for use in self.layout[call[0]].uses:
            old = x.clone() if giving else x
            x = engine.layers[use.layer](x, *self.angles, use.recursion or 0, plan, use.depth)
            x = torch.where(self.reading[:, None], x, old) if giving else x
            if engine.inner.recursion_encoding is not None and use.encoding is not None:
                x = x * engine.inner.recursion_encoding[use.encoding]
        return x

    def _behind(self, i: int) -> None:
        """Give the tokens what their stages made of them, and bring them before the next ones."""
        call, method = self.engine.calls[i], self.method
        if self.layout[call[0]].gate is None:
            self._put(self.here[0], self.after)
        else:
            for at, these, reads in zip(call, self.here, self.reads, strict=True):
                gate, mask = _gate(self.layout[at]), these & self.enters
                rules = _Rules(self, mask)
                state, changes = method.merge(gate, self.before, self.after, self.logits, self.carry, rules)
                self._put(mask, state)
                self._bring(mask, changes)
                self.depth = self.depth + mask
                self.passed = self.passed | (reads.long() << gate)
                self.ran = self.ran + reads
                if _ragged(self.layout[at]):
                    self.wrote = self.wrote | (these.long() << gate)
        self._advance(_any(self.here), call[0], call[-1])


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return norm(x)


def _any(masks: list[Tensor]) -> Tensor:
    """Whether one of them says so."""
    return functools.reduce(torch.logical_or, masks)


def _gate(stage: Stage) -> int:
    assert stage.gate is not None
    return stage.gate


def _ragged(stage: Stage) -> bool:
    """Whether keys of those who entered lie apart."""
    return stage.gate is not None and stage.uses[0].keys == "entered"


def _all_read(stage: Stage) -> bool:
    """Whether all who take part in a stage pass its layers."""
    return stage.gate is None or stage.whole or stage.uses[0].keys != "everyone"
