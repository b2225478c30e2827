"""flex_attention over lists: selected queries that look at the keys of every position, padding, and fp32 on a GPU.

Queries and keys of the whole batch are one list each. A query sees a stretch of the keys, from the first of its row and
document to itself, so the blocks that a block of queries needs follow from the least and largest of its bounds, on the
device, without a mask of all pairs.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import Backend, Call, Seen, as_list, as_rows
from .visible import Visible

BLOCK = 128
# torch's own choice keeps more than 255 registers a thread can hold, and spills.
OPTIONS = {"fwd_BLOCK_N": 64, "fwd_num_warps": 8}
_compiled: list[Callable[..., Any]] = []


def can_compile() -> bool:
    """Whether this machine can compile kernels for a GPU."""
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("gcc", "cc", "clang")))


class Flex(Backend):
    """Stretches of a list of keys."""

    name = "flex"

    def refuses(self, visible: Visible, call: Call) -> str | None:
        if visible.rows.device.type != "cuda":
            return "its kernels train on GPUs alone"
        if not can_compile():
            return "it needs Triton and a C compiler"
        if call.dropout:
            return "it knows no dropout"
        if call.dtype == torch.float64:
            return "it takes no fp64"
        return self.unfit(visible)

    def unfit(self, visible: Visible) -> str | None:
        """Why stretches cannot say who sees whom, on any device."""
        return "keys of a cache are no list" if visible.rows.past else None

    def form(self, visible: Visible) -> Seen:
        return Seen(self.name, blocks=block_mask(*visible.bounds(), keys=visible._keys()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, dropout: float) -> Tensor:
        rows = query.shape[0]
        query, key, value = (as_list(x).transpose(0, 1)[None] for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        options = OPTIONS if query.is_cuda else None
        mixed = _flex()(query, key, value, block_mask=seen.blocks, enable_gqa=grouped, kernel_options=options)
        return as_rows(mixed[0].transpose(0, 1), rows)


def _flex() -> Callable[..., Any]:
    """flex_attention, compiled by itself where its caller is not."""
    from torch.nn.attention import flex_attention as module

    flex_attention: Callable[..., Any] = module.flex_attention
    if torch.compiler.is_compiling():
        return flex_attention
    if not _compiled:
        _compiled.append(torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention)
    return _compiled[0]


def block_mask(first: Tensor, last: Tensor, counts: Tensor | None, keys: int):
    """The BlockMask of queries that see keys `first` to `last`, [Q]; counts: [keys] bool, keys that others see."""
    from torch.nn.attention.flex_attention import BlockMask

    device = first.device
    blocks = torch.arange(-(-len(first) // BLOCK) * BLOCK, device=device).clamp(max=len(first) - 1).view(-1, BLOCK)
    begin = torch.arange(0, keys, BLOCK, device=device)
    end = begin + BLOCK - 1
    lows, highs = first[blocks], last[blocks]
    some = (end >= lows.amin(1, True)) & (begin <= highs.amax(1, True))
    whole = (begin >= lows.amax(1, True)) & (end <= highs.amin(1, True))
    if counts is not None:
        whole = torch.zeros_like(whole)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (first[query] <= key) & (key <= last[query])
        return seen if counts is None else (seen & counts[key]) | (key == last[query])

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(first), keys)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[queries, keys] bool in blocks -> how many each block of queries needs, and which, those first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts[None, None], torch.sort(blocks.int(), dim=-1, descending=True, stable=True).indices.int()[None, None]
