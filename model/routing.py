"""Routing: each equation of the paper (arXiv 2507.10524, section 2.2.1) in one function, and the record of a pass.

Shapes: B batch, T positions, C candidates of a recursion, K tokens it selects, N tokens packed over the batch,
D hidden size, Nr recursions. Recursions count from 0 in the code (the paper's r - 1).
Scores are fp32 whatever the model's precision: in bf16, alpha * sigmoid(s) takes a handful of values, and ties decide.
Equal states score equal, bit for bit, wherever they stand, so that ties go to the earlier token: a matrix kernel adds
the products of a row in an order that depends on the row's place in the matrix, so scores are sums that no order
changes (`exact_linear`, `elementwise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import MoRConfig
    from .depth.layout import Stage


class Router(nn.Module):
    """Scores tokens in fp32: linear D -> outputs, or `mlp` / `wide_mlp` D -> 2D -> GELU -> outputs, without biases."""

    def __init__(self, config: MoRConfig, outputs: int, tempered: bool = True):
        super().__init__()
        wide = config.router in ("mlp", "wide_mlp")
        inner = 2 * config.hidden_size if wide else config.hidden_size
        self.temperature = config.router_temperature if tempered else 1.0
        self.hidden_weight = nn.Parameter(torch.empty(inner, config.hidden_size)) if wide else None
        self.weight = nn.Parameter(torch.empty(outputs, inner))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> fp32 logits [..., outputs]. Under autocast the weights are rounded as FSDP2 rounds them."""
        kind = x.device.type
        weight: Tensor = self.weight
        hidden_weight: Tensor | None = self.hidden_weight
        if torch.is_autocast_enabled(kind):
            weight = weight.to(torch.get_autocast_dtype(kind))
            hidden_weight = None if hidden_weight is None else hidden_weight.to(weight.dtype)
        with torch.autocast(kind, enabled=False):
            x = x.float()
            if self.temperature != 1.0:
                x = x / self.temperature
            if hidden_weight is not None:
                x = elementwise(F.gelu, exact_linear(x, hidden_weight.float()))
            return exact_linear(x, weight.float())


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight' in fp32, [..., I] and [O, I] -> [..., O]; a row's result depends on that row and the weight alone.

    Rows of both factors are rounded to integers of b bits (times a power of two of the row's own), so that every
    partial sum of their products is an integer below 2^53: fp64 adds those without rounding, in whatever order a
    kernel chooses. b = floor((53 - log2 I) / 2), 21 for I = 960: entries keep 2^-22 of the row's largest. The product
    is one matrix product, counted as such; gradients are those of the plain fp32 product.
    """
    return _ExactLinear.apply(x, weight)  # type: ignore[no-any-return]


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        bits = (53 - (x.shape[-1] - 1).bit_length()) // 2
        (rows, unit), (columns, weight_unit) = _integers(x.flatten(0, -2), bits), _integers(weight, bits)
        y = (rows @ columns.T) * (unit * weight_unit.T)
        return y.float().unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            rows = grad.flatten(0, -2)
            grad_x = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
            grad_weight = rows.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _integers(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """fp32 x [N, I] as integers of up to `bits` bits, in fp64, and the power of two [N, 1] that they are counted in."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)  # without its mantissa: power <= largest
    # Scaling by a power of two is exact, and fp32 holds every integer of so few bits.
    return (x * (2.0 ** (bits - 1) / power)).round_().double(), power.double() * 2.0 ** (1 - bits)


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every entry, the same for equal entries wherever they stand.

    torch's CPU kernels take whole vectors of a dense tensor and its last entries one by one, by functions that differ
    in the last bit. Entries that do not lie side by side are all taken one by one. GPU kernels have one function.
    """
    if x.device.type != "cpu":
        return function(x)
    return function(torch.stack([x, x], -1)[..., 0])


def random_logits(input_ids: Tensor | None, positions: Tensor, recursion: int, outputs: int) -> Tensor:
    """Logits of the control without a router: uniform numbers' logits, [B, T, outputs].

    A hash of token, position and recursion stands for the dice, so that the choice sees nothing of the text around, is
    the same when a block is recomputed, and does not depend on padding, batch or later tokens.
    """
    seed = positions * 2654435761 + (recursion + 1) * 40503
    if input_ids is not None:
        seed = seed + (input_ids + 1) * 2246822519
    state = (seed[..., None] + torch.arange(1, outputs + 1, device=seed.device) * 3266489917) & 0x7FFFFFFF
    for _ in range(2):
        state = ((state ^ (state >> 15)) * 739982445) & 0x7FFFFFFF
    uniform = (state.double() + 0.5) / 2**31
    return elementwise(torch.logit, uniform).float()


# Expert-choice --------------------------------------------------------------------------------------------------------


def capacity(final: float, step: int | None, warmup_steps: int) -> float:
    """Capacity factor at a step: c + (1 - c) * (1 + cos(pi * min(1, step / warmup))) / 2; None: warm-up is over."""
    if step is None or warmup_steps <= 0:
        return final
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / warmup_steps)))


def selection_size(capacity_factor: float, offered: int) -> int:
    """k_r = max(1, floor(c_r * T)), T the full length of the sequence."""
    return max(1, int(capacity_factor * offered))


def gate(logits: Tensor, activation: str, alpha: float) -> Tensor:
    """Expert-choice gate g = alpha * act(s) (eq. 2.1); with activation `none` the score itself is the gate."""
    if activation == "sigmoid":
        return alpha * torch.sigmoid(logits)
    if activation == "tanh":
        return alpha * torch.tanh(logits)
    return logits


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


# Token-choice ---------------------------------------------------------------------------------------------------------


def depth_scores(logits: Tensor, activation: str, alpha: float) -> Tensor:
    """Scores of the Nr depths, alpha * softmax(s) or alpha * sigmoid(s) (eq. 2.2). [..., Nr] -> [..., Nr]."""
    return alpha * (logits.softmax(-1) if activation == "softmax" else elementwise(torch.sigmoid, logits))


def balancing_loss(load: Tensor, scores: Tensor, used: Tensor | None) -> Tensor:
    """Nr * sum_i f_i P_i. load f: [Nr] share of tokens per depth; scores: [B, T, Nr], of which P is the mean."""
    mean = (
        scores.flatten(0, 1).mean(0)
        if used is None
        else (scores * used[..., None]).sum((0, 1)) / used.sum().clamp(min=1)
    )
    return load.shape[0] * (load * mean).sum()


def bias_step(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Loss-free balancing: b + u * sign(mean load - load)."""
    return bias + rate * torch.sign(load.mean() - load)


def depth_counts(depth: Tensor, gates: int) -> Tensor:
    """[gates + 1] positions that passed 0, 1, ... gates; without waiting for the device, as `bincount` would."""
    return (depth.flatten()[:, None] == torch.arange(gates + 1, device=depth.device)).sum(0)


# Both -----------------------------------------------------------------------------------------------------------------


def z_loss(logits: Tensor, used: Tensor | None) -> Tensor:
    """Mean of logsumexp(s)^2 over tokens. logits: [..., outputs]."""
    return masked_mean(torch.logsumexp(logits, -1).square(), used)


def masked_mean(x: Tensor, used: Tensor | None) -> Tensor:
    """Mean of x over the entries where `used` is True (all of them if None)."""
    return x.mean() if used is None else torch.where(used, x, 0.0).sum() / used.sum().clamp(min=1)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = max_i load_i / mean load - 1."""
    return load.max() / load.mean() - 1.0


def entropy(load: Tensor) -> Tensor:
    """Entropy in nats of the distribution of tokens over depths."""
    share = load / load.sum()
    return -(share * share.clamp(min=1e-12).log()).sum()


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
