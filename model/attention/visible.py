"""Who sees whom in a call of attention, said once for all layers of a stage; each backend derives its own form of it.

Shapes: B rows of the batch, T positions of a row at hand, S positions of its keys (T and those that a cache holds),
K slots of a row, Q queries and J keys of the whole batch, each in one list.

A query sees the keys of its own row and document that stand no later than itself. Padding is seen by itself alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RUNGS = 32  # sizes that a list of tokens whose number varies may take, between none and all of the batch
STEP = 128  # each of them a multiple of this


def rung(count: int, total: int) -> int:
    """The smallest size of the ladder that holds `count` of `total` tokens."""
    step = ladder_step(total)
    return min(total, max(1, -(-count // step)) * step)


def ladder_step(total: int) -> int:
    return -(-total // (RUNGS * STEP)) * STEP


@dataclass
class Rows:
    """The rows of a forward pass.

    past: positions of each row that a cache holds. real: [B, S] bool, False for padding; None: no padding.
    documents: [B, T] non-decreasing ids; None: a row is one document. num_documents: of all rows together, or more;
    None: the device is asked, and waited for, where it matters.
    """

    batch: int
    length: int
    device: torch.device
    past: int = 0
    real: Tensor | None = None
    documents: Tensor | None = None
    num_documents: int | None = None
    _allowed: Tensor | None = None
    _begins: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether every row is one document without padding, from its first position on."""
        return self.real is None and self.documents is None and not (self.past and self.length > 1)

    def allowed(self) -> Tensor | None:
        """[B, T, S] bool, who may look at whom; None: plain causal."""
        if self.plain or self._allowed is not None:
            return self._allowed
        places = torch.arange(self.length + self.past, device=self.device)
        allowed = places[self.past :, None] >= places
        if self.real is not None:
            # A padded query looks at itself, so that no row of the softmax is empty.
            allowed = (allowed & self.real[:, None]) | (places[self.past :, None] == places)
        if self.documents is not None:
            allowed = allowed & (self.documents[:, :, None] == self.documents[:, None, :])
        self._allowed = allowed.expand(self.batch, -1, -1)
        return self._allowed

    def begins(self) -> Tensor:
        """[B * T]: where, in the list of all positions, the row or document of each begins."""
        if self._begins is None:
            here = torch.arange(self.batch * self.length, device=self.device)
            starts = here % self.length == 0
            if self.documents is not None:
                new = F.pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0), value=True)
                starts = starts | new.flatten()
            self._begins = torch.where(starts, here, 0).cummax(0).values
        return self._begins

    def most_documents(self) -> int:
        """Documents of all rows together, or more."""
        if self.documents is None:
            return self.batch
        if self.num_documents is None:
            here = torch.arange(self.batch * self.length, device=self.device)
            self.num_documents = int((self.begins() == here).sum())
        return self.num_documents


@dataclass
class Visible:
    """The queries of a stage, and whose keys they look at.

    index: [B, K] position of each query's slot, ascending, unused slots last; None: every position, or a list.
    used: [B, K] bool; None: every slot is used.
    flat: [Q] b * T + t of the queries, where they are one list over the batch; the last of them are not `alive` [Q],
        stand for no token, and see whatever they like.
    everyone: the keys are those of every position, not of the queries alone.
    """

    rows: Rows
    everyone: bool = True
    index: Tensor | None = None
    used: Tensor | None = None
    flat: Tensor | None = None
    alive: Tensor | None = None

    @property
    def selected(self) -> bool:
        """Whether there are fewer queries than positions, or may be."""
        return self.index is not None or self.flat is not None

    @property
    def plain(self) -> bool:
        """Whether slots look at themselves and all slots before them in their row, and nothing else matters."""
        return self.rows.plain and self.used is None and self.flat is None and not (self.selected and self.everyone)

    def mask(self) -> Tensor | None:
        """[B, 1, K, S] bool, or of lists [1, 1, Q, J]; None: causal among the slots."""
        if self.flat is not None:
            first, last, counts = self.bounds()
            keys = torch.arange(self._keys(), device=first.device)
            itself = keys == last[:, None]
            seen = (first[:, None] <= keys) & (keys <= last[:, None])
            return (seen if counts is None else (seen & counts) | itself)[None, None]
        allowed = self.rows.allowed()
        if self.index is None:
            return None if allowed is None else allowed[:, None]
        if allowed is None:
            if not self.everyone:
                return None
            positions = torch.arange(self.rows.past + self.rows.length, device=self.index.device)
            return (self.index[..., None] + self.rows.past >= positions)[:, None]
        allowed = allowed.gather(1, self.index[..., None].expand(-1, -1, allowed.shape[2]))
        if not self.everyone:
            allowed = allowed.gather(2, self.index[:, None].expand(-1, self.index.shape[1], -1))
            if self.used is not None:
                itself = torch.eye(self.index.shape[1], dtype=torch.bool, device=self.index.device)
                allowed = (allowed & self.used[:, None]) | itself
        return allowed[:, None]

    def bounds(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """first, last: [Q] the keys, in their list, that each query sees, the last of which is its own; counts: [J]
        bool, keys that others than themselves see, None for all. Without a cache."""
        rows, begins = self.rows, self.rows.begins()
        if self.flat is not None:
            own = self.flat
        elif self.index is not None:
            own = (self.index + torch.arange(rows.batch, device=self.index.device)[:, None] * rows.length).flatten()
        else:
            own = torch.arange(len(begins), device=begins.device)
        if self.everyone or not self.selected:
            return begins[own], own, None if rows.real is None else rows.real.flatten()
        group = begins[own] if self.alive is None else torch.where(self.alive, begins[own], -1)
        here = torch.arange(len(own), device=own.device)
        starts = F.pad(group[1:] != group[:-1], (1, 0), value=True)
        first = torch.where(starts, here, 0).cummax(0).values
        return first, here, None if self.used is None else self.used.flatten()

    def lengths(self) -> tuple[Tensor, int]:
        """Queries that look at themselves alone, as segments one after the other: where each begins, and where the last
        ends, [segments + 1] int32; and a length that none exceeds. Segments at the end may be empty."""
        rows = self.rows
        slots = rows.length if self.index is None else self.index.shape[1]
        if self.flat is None and rows.documents is None:
            ends = torch.arange(rows.batch + 1, dtype=torch.int32, device=rows.device) * slots
            return ends, slots
        segments = rows.most_documents()
        longest = slots
        if self.flat is not None:  # one more of those that stand for no token
            segments, longest = segments + 1, max(rows.length, ladder_step(rows.batch * rows.length))
        segments = -(-segments // 64) * 64
        first, here, _ = self.bounds()
        starts = first == here
        ends = torch.full((segments + 1,), len(first), device=first.device)
        # What starts nothing writes the end of all into the last place, which holds it already.
        place = torch.where(starts, starts.cumsum(0) - 1, segments)
        return ends.scatter_(0, place, torch.where(starts, here, len(first))).int(), longest

    def _keys(self) -> int:
        """J"""
        if self.everyone or not self.selected:
            return self.rows.batch * self.rows.length
        slots = self.flat if self.flat is not None else self.index
        assert slots is not None
        return slots.numel()
