"""Top-k by capacity: how many tokens a gate takes, which ones, and the loss that teaches to foresee it (section 2.2.1).

Shapes: B batch, C candidates of a gate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .routers import masked_mean


def factor_at(final: float, step: int | None, warmup_steps: int) -> float:
    """Capacity factor at a step: c + (1 - c) * (1 + cos(pi * min(1, step / warmup))) / 2; None: warm-up is over."""
    if step is None or warmup_steps <= 0:
        return final
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / warmup_steps)))


def selection_size(capacity_factor: float, offered: int) -> int:
    """k_r = max(1, floor(c_r * T)), T the full length of the sequence."""
    return max(1, int(capacity_factor * offered))


def document_quota(documents: Tensor, size: Tensor | int, offered: Tensor | int) -> tuple[Tensor, Tensor]:
    """Share a capacity of `size` tokens out among the documents of a row, from the left, by length only.

    documents: [B, C] non-decreasing ids of the candidates; size, offered: [B, 1] or numbers, slots to fill and tokens
    offered. With S and E the offered tokens before and up to a document's end, its quota is
    floor(size * E / offered) - floor(size * S / offered): never more than it offers, summing to `size`, and the same
    whatever the documents say. Returns (quota [B, C], first [B, C]): of each candidate's document, the quota and the
    place of its first candidate.
    """
    first = torch.searchsorted(documents, documents)
    end = torch.searchsorted(documents, documents, right=True)
    return end * size // offered - first * size // offered, first


def selected_mask(logits: Tensor, documents: Tensor | None, used: Tensor | None, size: Tensor | int) -> Tensor:
    """Top-k of the raw scores, per document. logits: [B, C] -> bool [B, C]; ties go to the earlier token.

    documents: [B, C] non-decreasing or None for one; used: [B, C], False for padding, which is never selected and
    stands last; size: tokens to select in a row, a number or [B, 1].
    """
    if used is not None:
        logits = logits.masked_fill(~used, -torch.inf)
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    if documents is None:
        rank = _ranks(order)
        return rank < size if used is None else (rank < size) & used
    if used is not None:
        documents = documents.masked_fill(~used, torch.iinfo(documents.dtype).max)
    offered = logits.shape[1] if used is None else used.sum(1, keepdim=True).clamp(min=1)
    documents = documents.contiguous()
    quota, first = document_quota(documents, size, offered)
    by_document = torch.sort(documents.gather(1, order), dim=1, stable=True).indices
    rank = _ranks(order.gather(1, by_document)) - first
    return rank < quota if used is None else (rank < quota) & used


def _ranks(order: Tensor) -> Tensor:
    """The inverse permutation of each row."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def slots_of(selected: Tensor, used: Tensor | None, slots: int) -> Tensor:
    """Candidates [B, slots] in causal order: the selected, then unused ones to fill the row."""
    key = (~selected).long() if used is None else torch.where(selected, 0, torch.where(used, 2, 1))
    return torch.sort(key, dim=1, stable=True).indices[:, :slots]


def selection_loss(logits: Tensor, selected: Tensor, used: Tensor | None) -> Tensor:
    """BCE between sigmoid(s) and "was selected", mean over the tokens offered (section 2.2.1)."""
    loss = F.binary_cross_entropy_with_logits(logits, selected.float(), reduction="none")
    return masked_mean(loss, used)


def judged(logits: Tensor, selected: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
    """The selection loss, and the share of the tokens offered whose causal decision, s >= 0, is the selection's."""
    agrees = (logits.detach() >= 0) == selected
    return selection_loss(logits, selected, used), masked_mean(agrees.float(), used)


@functools.cache
def compiled_judged() -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """The same as few kernels, for a GPU."""
    return torch.compile(judged)
