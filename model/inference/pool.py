"""A bounded pool of keys and values: each request holds one growing run of pages for each recursion that it entered.

Shapes: N tokens of a call, H query heads, G key/value heads, Dh head dimension, S slots (one token each) of a pool.
A page is `page_size` slots. Here a run of pages is contiguous, so that attention reads it as it lies, without
gathering, in a call for each request; when its neighbour is taken a run moves to where there is room, and when free
pages lie scattered the pool is compacted. `model.inference.paged` has pages that lie anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MoRConfig


@dataclass(eq=False)
class Run:
    """`pages` pages of a pool, of which the leading `length` slots are in use: [first, first + pages), or, where pages
    lie anywhere, those that `table` lists."""

    first: int = 0
    pages: int = 0
    length: int = 0
    table: list[int] = field(default_factory=list)


class Pool:
    """Keys and values of `layers` layers for at most `pages` pages of tokens, allocated once."""

    def __init__(self, pages: int, page_size: int):
        self.page_size, self.pages = page_size, pages
        self.runs: set[Run] = set()
        self.moves = 0

    def memory_bytes(self) -> int:
        """Bytes of the pool, used or not."""
        raise NotImplementedError

    def free_pages(self) -> int:
        raise NotImplementedError

    def pages_for(self, tokens: float) -> int:
        return int(-(-tokens // self.page_size))

    def reserve(self, run: Run, tokens: int) -> bool:
        """Give a run room for `tokens` more; False, and nothing changed, if the pool has not enough free pages."""
        raise NotImplementedError

    def release(self, run: Run) -> None:
        """Give a run's pages back."""
        raise NotImplementedError

    def slots(self, run: Run, places: np.ndarray) -> np.ndarray:
        """Where the tokens lie that stand at `places` [N] of a run, counted from its first."""
        raise NotImplementedError


class PagePool(Pool):
    """Runs of contiguous pages."""

    def __init__(self, config: MoRConfig, layers: int, pages: int, page_size: int, dtype: torch.dtype, device):
        assert config.num_key_value_heads is not None and config.head_dim is not None
        super().__init__(pages, page_size)
        shape = (layers, 1, config.num_key_value_heads, pages * page_size, config.head_dim)
        # Each [layers, 1, G, S, Dh]; zeros, so that the memory is claimed now and not when a request needs it.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.layer_keys, self.layer_values = list(self.keys), list(self.values)
        self.free = np.ones(pages, dtype=bool)

    def memory_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def free_pages(self) -> int:
        return int(self.free.sum())

    def reserve(self, run: Run, tokens: int) -> bool:
        wanted = self.pages_for(run.length + tokens)
        more = wanted - run.pages
        if more <= 0:
            return True
        if self.free_pages() < more:
            return False
        end = run.first + run.pages
        if run.pages == 0 or end + more > self.pages or not self.free[end : end + more].all():
            # What the run holds now is free to be written over by itself: it may move within its own pages.
            self.free[run.first : end] = True
            place = self._place(wanted)
            self.free[run.first : end] = False
            if place is None:
                self._compact(run, more)
            else:
                self._move(run, place)
        self.free[run.first : run.first + wanted] = False
        run.pages = wanted
        self.runs.add(run)
        return True

    def slots(self, run: Run, places: np.ndarray) -> np.ndarray:
        return run.first * self.page_size + places

    def release(self, run: Run) -> None:
        self.free[run.first : run.first + run.pages] = True
        self.runs.discard(run)
        run.first = run.pages = run.length = 0

    def _place(self, wanted: int) -> int | None:
        """First page for a run of `wanted`, in the middle of the longest free stretch, so that neighbours can grow."""
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self.free.view(np.int8), [0]))))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        if not len(lengths) or lengths.max() < wanted:
            return None
        longest = int(lengths.argmax())
        return int(starts[longest] + (lengths[longest] - wanted) // 2)

    def _move(self, run: Run, place: int) -> None:
        if run.length:
            self._copy([(run.first, place, run.length)])
        self.free[run.first : run.first + run.pages] = True
        run.first = place
        self.moves += 1

    def _copy(self, moved: list[tuple[int, int, int]]) -> None:
        """Copy stretches of slots, given as (first page now, first page then, slots)."""
        size, device = self.page_size, self.keys.device
        old = torch.cat([torch.arange(a * size, a * size + n) for a, _, n in moved]).to(device)
        new = torch.cat([torch.arange(b * size, b * size + n) for _, b, n in moved]).to(device)
        for held in (*self.layer_keys, *self.layer_values):
            held[0].index_copy_(1, new, held[0].index_select(1, old))

    def _compact(self, growing: Run, more: int) -> None:
        """Line all runs up again, what remains free shared out as gaps between them; `growing` gets `more` pages."""
        runs = sorted(self.runs | {growing}, key=lambda run: run.first)
        gap = (self.free_pages() - more) // len(runs)
        place, moved = 0, []
        for run in runs:
            if run.length:
                moved.append((run.first, place, run.length))
            run.first = place
            place += run.pages + gap + (more if run is growing else 0)
        if moved:
            self._copy(moved)
        self.free[:] = True
        for run in runs:
            self.free[run.first : run.first + run.pages] = False
        self.moves += 1


@dataclass
class Reader:
    """Consecutive tokens of a call, as many as `seen` has, that attend to the slots of one run.

    seen: how many slots each of them sees, ascending; the last `count` are these tokens' own. layer: of the pool, for
    the first layer of the call. over: the run whose slots replace those of `run` at `places` (`shared_update`), with
    its pool.
    """

    pool: Pool
    layer: int
    run: Run
    seen: list[int]
    over: tuple[PagePool, Run, Tensor] | None = None

    @property
    def count(self) -> int:
        return len(self.seen)


class View:
    """What a reader sees of a contiguous run."""

    def __init__(self, reader: Reader):
        pool, span = reader.pool, reader.seen[-1]
        assert isinstance(pool, PagePool)
        self.layer, self.over, self.seen = reader.layer, reader.over, reader.seen
        first = reader.run.first * pool.page_size
        # Views of all layers at once: one call each, not one a layer.
        self.keys, self.values = pool.keys.narrow(3, first, span), pool.values.narrow(3, first, span)
        self.layer_keys, self.layer_values = self.keys.unbind(0), self.values.unbind(0)
        self.mask: Tensor | None = None
        if reader.count > 1:
            seen = torch.tensor(self.seen, device=self.keys.device)
            self.mask = torch.arange(span, device=seen.device) < seen[:, None]

    def attend(self, query: Tensor, offset: int) -> Tensor:
        """query: [count, G, H / G, Dh] or [count, H, 1, Dh] -> the same shape."""
        keys, values = self.layer_keys[self.layer + offset], self.layer_values[self.layer + offset]
        if self.over is not None:
            keys, values = _overlay(keys, values, self.over, offset)
        if self.mask is None:
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])
        heads = query.flatten(1, 2).transpose(0, 1)[None]
        grouped = heads.shape[1] != keys.shape[1]
        mixed = F.scaled_dot_product_attention(heads, keys, values, attn_mask=self.mask, enable_gqa=grouped)
        return mixed[0].transpose(0, 1).reshape(query.shape)


@dataclass
class Writer:
    """Tokens [start, start + count) of a call store their keys and values in `slots` [count] of a pool."""

    start: int
    count: int
    pool: Pool
    layer: int
    slots: Tensor


class CallPlan:
    """What each token of one call of consecutive layers writes and reads.

    readers: in the order of the tokens, of which each but the last ones has one; those give keys alone. layers:
    effective depth -> how far its layer lies behind the one that writers and readers name. silent: the depths that read
    keys of an earlier depth and write none.
    """

    def __init__(
        self,
        writers: list[Writer],
        readers: list[Reader],
        layers: dict[int, int],
        silent: frozenset[int] = frozenset(),
    ):
        self.layers, self.silent = layers, silent
        self.writing, self.readers = writers, readers
        self.views: list[View] = []
        self.written = max((writer.start + writer.count for writer in writers), default=0)
        self.counts = [reader.count for reader in readers]
        self.reading = sum(self.counts)

    def writers(self, depth: int, count: int) -> int:
        """How many tokens, from the first, need keys and values of their own."""
        return 0 if depth in self.silent else self.written

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None, depth: int) -> Tensor:
        """query: [N, H, Dh]; key, value: [`writers`, G, Dh] or None. Returns [N, H * Dh]."""
        offset = self.layers[depth]
        if key is not None and value is not None:
            for writer in self.writing:
                own = slice(writer.start, writer.start + writer.count)
                layer, pool = writer.layer + offset, writer.pool
                assert isinstance(pool, PagePool)
                pool.layer_keys[layer][0].index_copy_(1, writer.slots, key[own].transpose(0, 1))
                pool.layer_values[layer][0].index_copy_(1, writer.slots, value[own].transpose(0, 1))
        if not self.readers:
            return query.flatten(1)
        if not self.views:
            self.views = [View(reader) for reader in self.readers]
        # The heads of a group may be as many queries to the same keys, which fp32 likes better and bf16 worse.
        groups = query.shape[1] if query.dtype.itemsize < 4 else self.views[0].keys.shape[2]
        parts = query.unflatten(1, (groups, -1)).split(self.counts)
        mixed = [view.attend(part, offset) for view, part in zip(self.views, parts, strict=True)]
        return torch.cat(mixed).flatten(1)


def _overlay(keys: Tensor, values: Tensor, over: tuple[PagePool, Run, Tensor], offset: int) -> tuple[Tensor, Tensor]:
    pool, run, places = over
    first, keys, values = run.first * pool.page_size, keys.clone(), values.clone()
    keys[0].index_copy_(1, places, pool.layer_keys[offset][0].narrow(1, first, len(places)))
    values[0].index_copy_(1, places, pool.layer_values[offset][0].narrow(1, first, len(places)))
    return keys, values
