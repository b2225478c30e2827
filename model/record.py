"""The record of a pass: which gates each token passed, and what follows from it.

Shapes: B batch, T positions, G gates, counted from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .depth.layout import Stage


@dataclass
class RoutingRecord:
    """What one forward pass routed; detached tensors, made without waiting for the device.

    depth: [B, T] gates that each token passed, 0 .. G; 0 for padding.
    entered, offered: [B, G] tokens per sequence that each gate let in, and that it scored.
    counts: [B, G] queries per sequence in the stage of each gate.
    pairs: [B, G] causal (query, key) pairs that attention covers per sequence and stage, documents ignored.
    load: [G] share of tokens per depth (token-choice), or share that passed each gate.
    statistics: scalars by name. Top-k: `selection_accuracy` (how often the causal decision agrees with top-k). Of every
        gate `score_mean_r`, and `entered_r`; token-choice: `max_violation`, `entropy`. All: `dead_token_share`, the
        share of positions that no sequence of the batch sends through the last gate.
    scores: raw fp32 logits per gate, over its candidates; one entry for token-choice.
    selected: positions [B, K] of the tokens selected per gate (by top-k). heads: tokens read out before the end
        (where padding is left out of the layers, losses at exits count it).
    passed: [B, T, G] bool, which gates each token passed; padding passes none.
    """

    depth: Tensor
    entered: Tensor
    offered: Tensor
    counts: Tensor
    pairs: Tensor
    load: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)
    scores: list[Tensor] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)
    heads: int = 0
    passed: Tensor | None = None


def make_record(entered: Tensor, offered: Tensor, real: Tensor | None, layout: Sequence[Stage]) -> RoutingRecord:
    """Derive counts, pairs, load and shares from who passed which gate.

    entered, offered: [B, T, G] bool; real: [B, T], False for padding, or None; layout: the method's stages.
    """
    exists = torch.ones_like(entered[..., 0]) if real is None else real
    depth, queries, seen = entered.sum(-1), [], []
    for stage in layout:  # gates count up along it
        if stage.gate is None:
            continue
        ran = exists if stage.whole else entered[..., stage.gate]
        queries.append(ran)
        seen.append((ran * (exists if stage.sees_all else ran).cumsum(1)).sum(1))
    counts, pairs = torch.stack(queries, -1).sum(1), torch.stack(seen, -1)
    load = entered.sum((0, 1)) / exists.sum().clamp(min=1)
    reached, there = entered[..., -1].any(0), exists.any(0)
    dead = 1.0 - (reached & there).sum() / there.sum().clamp(min=1)
    statistics = {"dead_token_share": dead}
    return RoutingRecord(depth, entered.sum(1), offered.sum(1), counts, pairs, load, statistics, passed=entered)


def depth_counts(depth: Tensor, gates: int) -> Tensor:
    """[gates + 1] positions that passed 0, 1, ... gates; without waiting for the device, as `bincount` would."""
    return (depth.flatten()[:, None] == torch.arange(gates + 1, device=depth.device)).sum(0)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = max_i load_i / mean load - 1."""
    return load.max() / load.mean() - 1.0


def entropy(load: Tensor) -> Tensor:
    """Entropy in nats of the distribution of tokens over depths."""
    share = load / load.sum()
    return -(share * share.clamp(min=1e-12).log()).sum()
