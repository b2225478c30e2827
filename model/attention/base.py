"""What a backend of attention is: it derives its own form of who sees whom, and says why it refuses.

Shapes: B batch, H query heads, Hkv key/value heads, K queries of a row, S keys of a row, Dh head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .visible import Visible


class Call(NamedTuple):
    """What else a backend has to know of the calls to come: precision, dropout, heads, head dimension."""

    dtype: torch.dtype
    dropout: float
    heads: int
    kv_heads: int
    head_dim: int


@dataclass
class Seen:
    """Who sees whom in the form that one backend takes.

    mask: [B, 1, K, S] bool, True where a query may look; None: causal, which needs K = S, or one query that sees all.
    spans: of the mask (`cpu.spans_of`); None: not known.
    lengths, longest: see `Visible.lengths`. blocks: flex_attention's BlockMask.
    """

    backend: str
    mask: Tensor | None = None
    spans: Tensor | None = None
    lengths: Tensor | None = None
    longest: int = 0
    blocks: Any = None


class Backend:
    """One way of computing attention."""

    name: str

    def refuses(self, visible: Visible, call: Call) -> str | None:
        """Why it cannot serve this call; None: it can."""
        raise NotImplementedError

    def form(self, visible: Visible) -> Seen:
        """Its form of who sees whom, for all layers of a stage."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, dropout: float) -> Tensor:
        """query: [B, H, K, Dh], key and value: [B, Hkv, S, Dh] -> [B, H, K, Dh]."""
        raise NotImplementedError


def as_list(x: Tensor) -> Tensor:
    """[B, H, K, Dh] -> [B * K, H, Dh]; a view of what projections give."""
    return x.transpose(1, 2).flatten(0, 1)


def rows_like(key: Tensor, query: Tensor) -> Tensor:
    """Keys [B, H, S, Dh] as the one row [1, H, B * S, Dh] that a list of queries looks at, where `query` is one."""
    return key if key.shape[0] == query.shape[0] else as_list(key).transpose(0, 1)[None]


def as_rows(x: Tensor, batch: int) -> Tensor:
    """The inverse of `as_list`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
