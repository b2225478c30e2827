"""Attention written out: the reference of every other backend, and the last resort."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Backend, Call, Seen, rows_like
from .visible import Visible


class Explicit(Backend):
    """Scores, softmax in fp32, mean of the values."""

    name = "explicit"

    def refuses(self, visible: Visible, call: Call) -> str | None:
        return None

    def form(self, visible: Visible) -> Seen:
        return Seen(self.name, visible.mask())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, dropout: float) -> Tensor:
        mask = seen.mask
        if mask is None and query.shape[2] > 1:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        key, value = (rows_like(x, query) for x in (key, value))
        groups = query.unflatten(1, (key.shape[1], -1))
        scores = (groups @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.float().softmax(-1).to(query.dtype), dropout)
        return (weights.unflatten(1, (key.shape[1], -1)) @ value.unsqueeze(2)).flatten(1, 2)
