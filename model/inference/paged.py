"""A pool whose pages lie anywhere: block tables name them, and one call of attention serves all who read a layer.

That of GPUs, where calls cost more than bytes. torch's paged kernel (FA2, from torch 2.12 on) takes 16 bits and pages
of 256 slots; everything else gathers the pages and masks.

Shapes: N tokens of a call, R stretches of consecutive tokens of which each sees one run, P pages of a block table, H
query heads, G key/value heads, Dh head dimension, S = P * page_size slots.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MoRConfig
from model.inference.pool import CallPlan, Pool, Reader, Run, Writer

KERNEL_PAGE = 256  # the only size, but for its multiples, that torch's kernel takes


def kernel_serves(config: MoRConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's paged kernel can read such a pool."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or (config.head_dim or 0) % 8:
        return False
    from torch.nn.attention import varlen  # brings the compiler along

    return "block_table" in inspect.signature(varlen.varlen_attn).parameters


class PagedPool(Pool):
    """Runs of pages in any order. A page more than can be had, the last, takes what nobody is to read."""

    def __init__(
        self, config: MoRConfig, layers: int, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ):
        assert config.num_key_value_heads is not None and config.head_dim is not None
        super().__init__(pages, page_size)
        shape = (layers, pages + 1, page_size, 2, config.num_key_value_heads, config.head_dim)
        # Keys and values of a token side by side, so that one operation writes both.
        self.held = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = list(self.held)
        self.flat = [layer.flatten(0, 1) for layer in self.layers]  # [slots, 2, G, Dh]
        self.scratch = pages * page_size
        self.kernel = page_size % KERNEL_PAGE == 0 and kernel_serves(config, dtype, device)
        self.free = list(range(pages))

    def memory_bytes(self) -> int:
        return self.held.numel() * self.held.element_size()

    def free_pages(self) -> int:
        return len(self.free)

    def reserve(self, run: Run, tokens: int) -> bool:
        more = self.pages_for(run.length + tokens) - run.pages
        if more > len(self.free):
            return False
        for _ in range(more):
            run.table.append(self.free.pop())
        run.pages = len(run.table)
        if run.pages:
            self.runs.add(run)
        return True

    def release(self, run: Run) -> None:
        self.free += run.table
        run.table.clear()
        self.runs.discard(run)
        run.pages = run.length = 0

    def slots(self, run: Run, places: np.ndarray) -> np.ndarray:
        return np.array(run.table, dtype=np.int64)[places // self.page_size] * self.page_size + places % self.page_size


@dataclass
class Look:
    """One call of attention: who of a call's tokens reads what of a pool.

    layer: of the pool, for the first layer of the call. rows: the tokens, R stretches; starts: [R + 1] int32, where
    each begins among them, and the end; longest: tokens of the longest. table: [R, P] int32; seen: [R] int32, slots
    that the last token of each stretch sees, the one before it one less. mask: [N] bool, the tokens that it is for
    where another look is for the others; None: all of `rows`.
    """

    pool: PagedPool
    layer: int
    rows: slice
    starts: Tensor
    longest: int
    table: Tensor
    seen: Tensor
    mask: Tensor | None = None

    def attend(self, query: Tensor, offset: int) -> Tensor:
        """query: [tokens, H, Dh] -> the same shape. offset: layers behind the first."""
        held = self.pool.layers[self.layer + offset]
        if not self.pool.kernel:
            return self._gathered(query, held)
        from torch.nn.attention import varlen

        keys, values = held.unbind(2)
        mixed = torch.empty_like(query)
        varlen.varlen_attn_out(
            mixed,
            query,
            keys,
            values,
            self.starts,
            self.starts,  # asked for, and not looked at beside a block table
            self.longest,
            self.table.shape[1] * self.pool.page_size,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.seen,
            block_table=self.table,
        )
        return mixed

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token its stretch and its place there, and who sees which slot, [R, 1, longest, S]."""
        counts = self.starts.diff()
        stretch = torch.repeat_interleave(counts)
        place = torch.arange(len(stretch), device=counts.device) - self.starts[stretch]
        last = (self.seen - counts)[:, None] + torch.arange(1, self.longest + 1, device=counts.device)
        slots = torch.arange(self.table.shape[1] * self.pool.page_size, device=counts.device)
        return stretch, place, (slots < last[..., None])[:, None]

    @cached_property
    def _mask(self) -> Tensor:
        """[R, 1, 1, S], where each stretch is one token."""
        slots = torch.arange(self.table.shape[1] * self.pool.page_size, device=self.seen.device)
        return (slots < self.seen[:, None])[:, None, None]

    def _gathered(self, query: Tensor, held: Tensor) -> Tensor:
        keys, values = held[self.table].flatten(1, 2).transpose(1, 3).unbind(2)  # [R, G, S, Dh] each
        grouped = query.shape[1] != keys.shape[1]
        if self.longest == 1:
            mixed = F.scaled_dot_product_attention(query[:, :, None], keys, values, self._mask, enable_gqa=grouped)
            return mixed[:, :, 0]
        stretch, place, mask = self._places
        padded = query.new_zeros(len(self.seen), self.longest, *query.shape[1:])
        padded[stretch, place] = query
        mixed = F.scaled_dot_product_attention(padded.transpose(1, 2), keys, values, mask, enable_gqa=grouped)
        return mixed.transpose(1, 2)[stretch, place]


class PagedPlan(CallPlan):
    """What each token of one call writes and reads, in block tables.

    keeping: pools, their layers for the first layer of the call, and the slots of the leading tokens, those of the
    scratch page for who writes none. looks: of the leading `reading` tokens, one after the other; those with masks are
    for all. layers, silent: see `CallPlan`.
    """

    def __init__(
        self,
        keeping: list[tuple[PagedPool, int, Tensor]],
        looks: list[Look],
        reading: int,
        layers: dict[int, int],
        silent: frozenset[int] = frozenset(),
    ):
        self.keeping, self.looks, self.layers, self.silent = keeping, looks, layers, silent
        self.written = max((len(slots) for _, _, slots in keeping), default=0)
        self.reading = reading

    def places(self, depth: int) -> list[tuple[Tensor, Tensor]]:
        """[slots, 2, G, Dh] of the layers that the leading tokens write to at a depth, and the slot of each."""
        return [(pool.flat[layer + self.layers[depth]], slots) for pool, layer, slots in self.keeping]

    def read(self, query: Tensor, depth: int) -> Tensor:
        """query: [`reading`, H, Dh] -> the same shape."""
        if not self.looks:
            return query
        offset = self.layers[depth]
        parts = [look.attend(query[look.rows], offset) for look in self.looks]
        if self.looks[0].mask is None:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        mixed = parts[0]
        for look, part in zip(self.looks[1:], parts[1:], strict=True):
            assert look.mask is not None
            mixed = torch.where(look.mask[:, None, None], part, mixed)
        return mixed

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None, depth: int) -> Tensor:
        if key is not None and value is not None:
            both = torch.stack([key, value], 1)
            for held, slots in self.places(depth):
                held.index_copy_(0, slots, both[: len(slots)])
        return self.read(query, depth).flatten(1)


def paged_plan(
    writers: list[Writer], readers: list[Reader], layers: dict[int, int], silent: frozenset[int] = frozenset()
) -> PagedPlan:
    """The plan of what the host knows: see `CallPlan`."""
    count = max((writer.start + writer.count for writer in writers), default=0)
    keeping: dict[tuple[int, int], tuple[PagedPool, int, Tensor]] = {}
    for writer in writers:
        pool, slots = writer.pool, writer.slots
        assert isinstance(pool, PagedPool)
        if writer.count < count:
            _, _, slots = keeping.get((id(pool), writer.layer), (pool, 0, slots.new_full((count,), pool.scratch)))
            slots[writer.start : writer.start + writer.count] = writer.slots
        keeping[id(pool), writer.layer] = pool, writer.layer, slots
    looks, begin = [], 0
    for _, group in itertools.groupby(readers, key=lambda reader: (id(reader.pool), reader.layer)):
        looks.append(_look(list(group), begin))
        begin = looks[-1].rows.stop
    return PagedPlan(list(keeping.values()), looks, begin, layers, silent)


def _look(readers: Sequence[Reader], begin: int) -> Look:
    """Tokens that were chosen among a chunk's may see more slots than one more than the token before them."""
    pool = readers[0].pool
    assert isinstance(pool, PagedPool)
    tables, counts, seen = [], [], []
    for reader in readers:
        ends = [*np.flatnonzero(np.diff(reader.seen) != 1) + 1, reader.count]
        counts += np.diff(ends, prepend=0).tolist()
        seen += [reader.seen[end - 1] for end in ends]
        tables += [reader.run.table] * len(ends)
    width = -(-max(seen) // pool.page_size)
    table = np.full((len(tables), width), pool.pages, dtype=np.int32)
    for row, pages in zip(table, tables, strict=True):
        row[: min(len(pages), width)] = pages[:width]
    device = pool.held.device
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32).to(device)
    ends_at = torch.tensor(seen, dtype=torch.int32).to(device)
    rows = slice(begin, begin + sum(counts))
    return Look(pool, readers[0].layer, rows, starts, max(counts), torch.from_numpy(table).to(device), ends_at)
