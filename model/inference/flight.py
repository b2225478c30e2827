"""Tokens between their first layer and their last: what the engine knows of each, and what a method's rules may ask.

Shapes: M tokens in flight, N tokens at hand, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.inference.scheduler import Request

if TYPE_CHECKING:
    from model.inference.engine import Engine


@dataclass(eq=False)
class Flight:
    """Consecutive tokens of one request: one when decoding, else a chunk of a prompt.

    start: position of the first; ends: whether the text ends with the last, so that the next token is wanted; at: the
    stage that they pass next; offset: where they stand among all the tokens in flight.
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

    def indices(self) -> np.ndarray:
        return np.arange(self.offset, self.offset + self.count)


@dataclass
class InFlight:
    """All tokens in flight, [M] each.

    ids, positions, prompts (length of the request's), state [M, D], logits (of the gate that judged last); carry: what
    the method has them carry, by name; on the host: offered (the next gate sees it), enters (it takes the result of the
    next stage), computes (it takes part in that stage, be it for its keys alone), depth (gates passed), limit
    (recursions that it may take), most (that any token of its text may), exact (it takes all that it may), passed and
    judged (gates behind which it passed layers, and that scored it, as bits); heads (times it was read out on the way);
    scores [M, G]: raw, of each gate, NaN where there is none.
    """

    ids: Tensor
    positions: Tensor
    prompts: Tensor
    state: Tensor
    logits: Tensor
    offered: np.ndarray
    enters: np.ndarray
    computes: np.ndarray
    depth: np.ndarray
    limit: np.ndarray
    most: np.ndarray
    exact: np.ndarray
    passed: np.ndarray
    judged: np.ndarray
    heads: np.ndarray
    scores: Tensor
    carry: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def new(
        cls, ids: Tensor, positions: Tensor, prompts: Tensor, state: Tensor, gates: int, allowed: np.ndarray
    ) -> InFlight:
        """gates: how many there are; allowed: [3, M] limit, most and exact."""
        count = len(ids)
        offered, enters, computes = (np.zeros(count, dtype=bool) for _ in range(3))
        depth, passed, judged, heads = (np.zeros(count, dtype=np.int64) for _ in range(4))
        logits = torch.zeros(count, device=state.device)
        scores = torch.full((count, gates), torch.nan, device=state.device)
        limit, most, exact = allowed
        flags = offered, enters, computes, depth, limit, most, exact.astype(bool), passed, judged, heads
        return cls(ids, positions, prompts, state, logits, *flags, scores)

    def select(self, index: np.ndarray) -> InFlight:
        """The tokens `index`, in this order."""
        on_device = torch.from_numpy(index).to(self.ids.device)
        values: dict[str, Any] = {}
        for name, value in self._columns().items():
            values[name] = value[index if isinstance(value, np.ndarray) else on_device]
        return InFlight(**values, carry={name: value[on_device] for name, value in self.carry.items()})

    def join(self, other: InFlight) -> InFlight:
        """These tokens, then the others."""
        values: dict[str, Any] = {}
        for name, value in self._columns().items():
            join: Any = np.concatenate if isinstance(value, np.ndarray) else torch.cat
            values[name] = join([value, getattr(other, name)])
        joined = InFlight(**values)
        for name in {*self.carry, *other.carry}:
            parts = [one.carry.get(name) for one in (self, other)]
            like = next(part for part in parts if part is not None)
            empty = (like.new_zeros(len(one.ids), *like.shape[1:]) for one in (self, other))
            joined.carry[name] = torch.cat([e if part is None else part for part, e in zip(parts, empty, strict=True)])
        return joined

    def _columns(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "carry"}

    def bring(self, index: Tensor, changes: dict[str, Tensor]) -> None:
        """Have the tokens `index` carry these [N, *]."""
        for name, value in changes.items():
            if name not in self.carry:
                self.carry[name] = value.new_zeros(len(self.ids), *value.shape[1:])
            self.carry[name].index_copy_(0, index, value)


class Carried:
    """What the tokens `index` carry, gathered when asked for."""

    def __init__(self, air: InFlight, index: Tensor):
        self.air, self.index = air, index

    def __getitem__(self, name: str) -> Tensor:
        return self.air.carry[name][self.index]


class Rules:
    """What a method's rules may ask of the engine, as they do of `model.decoder.Run` (`model.depth.base`)."""

    step, load, real, routing_only, keep_exits, cached = None, None, None, False, False, True

    def __init__(self, engine: Engine, index: Tensor, limit: int | None = None, exact: bool = False):
        """limit, exact: of the tokens `index`; None where a rule asks for neither."""
        self.engine, self.index, self.all_in, self.mode = engine, index, exact, engine.mode
        self.last = engine.last_gate if limit is None else engine.last_gates[limit]
        self.threshold = engine.policy.threshold

    @cached_property
    def input_ids(self) -> Tensor:
        return self.engine.tokens.ids[self.index]

    @cached_property
    def positions(self) -> Tensor:
        return self.engine.tokens.positions[self.index]

    @cached_property
    def prompt(self) -> Tensor:
        return self.engine.tokens.prompts[self.index]

    def executed(self, depth: Tensor) -> None:
        """[N] steps that tokens made use of, where these are not the gates that they passed."""
        self.engine.tokens.depth[self.index.cpu().numpy()] = depth.cpu().numpy()

    def readout(self, x: Tensor) -> Tensor:
        """Norm and head: [N, D] -> [N, V]."""
        self.engine.tokens.heads[self.index.cpu().numpy()] += 1
        return self.engine.head(self.norm(x))

    def norm(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.engine.norm(x)

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Losses and figures are of training."""

    loss = exit = figure = nothing

    def scored(self, logits: Tensor, used: Tensor | None = None, *, outputs: bool = False) -> None:
        """Note the scores [N, G] of all gates; those of one gate the engine knows."""
        if outputs:
            self.engine.tokens.scores[self.index] = logits.float()
