"""The arithmetic of exits: confidences, criteria of looped models, weights of losses, thresholds; no configuration.

Shapes: [..., D] states, [..., V] logits, E exits; R steps of a loop. Layers count from 1 where an equation has i or l.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Confidence: CALM (arXiv 2207.07061, section 3.4) ---------------------------------------------------------------------


def softmax_gap(logits: Tensor) -> Tensor:
    """Difference of the two largest probabilities. [..., V] -> fp32 [...]."""
    best = logits.float().softmax(-1).topk(2, -1).values
    return best[..., 0] - best[..., 1]


def similarity(x: Tensor, previous: Tensor) -> Tensor:
    """Cosine of a token's states at this exit and at the one before. [..., D] each -> fp32 [...]."""
    return F.cosine_similarity(x.float(), previous.float(), dim=-1)


def classifier_loss(logits: Tensor, agrees: Tensor) -> Tensor:
    """Cross-entropy of one exit's classifier with balanced weights. logits: [N, 2] (1: exit), agrees: [N] bool.

    A token that the last layer agrees with weighs the share of the others, and the other way round.
    """
    share = agrees.float().mean()
    weights = torch.where(agrees, 1.0 - share, share)
    return (weights * F.cross_entropy(logits.float(), agrees.long(), reduction="none")).mean()


def decayed(threshold: float, position: Tensor, rate: float, length: int, clipped: bool) -> Tensor:
    """Threshold for the token at `position` (from 0) of an output of at most `length` tokens; fp32.

    clipped, as in the paper: 0.9 lambda + 0.1 exp(-rate t / N), within 0 and 1. Otherwise, as in T5X and FREE: lambda
    (0.9 + 0.1 exp(-rate t / N)).
    """
    falling = torch.exp(-rate * position.double() / length)
    if clipped:
        return (0.9 * threshold + 0.1 * falling).clamp(0.0, 1.0).float()
    return (threshold * (0.9 + 0.1 * falling)).float()


# Losses at exits ------------------------------------------------------------------------------------------------------

# Weight of the loss after layer i. `linear` is CALM's; T5X also has `equal` and `double`; `sum` is LayerSkip's, which
# counts layers from 0; torchtune has `sqrt` and `inverse` as well.
WEIGHTS: dict[str, Callable[[int], float]] = {
    "linear": float,
    "equal": lambda i: 1.0,
    "double": lambda i: 2.0 ** (i - 1),
    "sum": lambda i: i * (i - 1) / 2,
    "sqrt": math.sqrt,
    "inverse": lambda i: 1.0 / i,
}


def loss_weights(kind: str, layers: Sequence[int], scale: float = 1.0) -> list[float]:
    """Weights that add up to 1 of the losses after `layers`, ascending, the last layer at their end.

    scale: e_scale of LayerSkip (arXiv 2404.16710), which multiplies all but the last. kind `enabled_sum`: as `sum`, but
    over the layers given alone, as torchtune computes it.
    """
    if kind == "enabled_sum":
        raw = [float(sum(layers[: n + 1])) for n in range(len(layers))]
    else:
        raw = [WEIGHTS[kind](layer) for layer in layers]
    raw = [scale * weight for weight in raw[:-1]] + raw[-1:]
    total = sum(raw)
    return [weight / total for weight in raw]


def rotated(exits: int, every: int, step: int) -> list[int]:
    """Exits that learn at a step, from 0: each `every`-th, shifted by one with each step."""
    return [exit for exit in range(exits) if (exit - step) % every == 0]


def layer_dropout(largest: float, depth: int, layers: int) -> float:
    """LayerSkip's probability that a sequence skips the layer at `depth` (from 0): p (2^(l / (L - 1)) - 1)."""
    return largest * (2.0 ** (depth / max(layers - 1, 1)) - 1.0)


def draws(input_ids: Tensor, depth: int) -> Tensor:
    """A uniform number [B] for each row, from its tokens [B, T] and the depth, so that it is the same when a block is
    recomputed, on whichever rank the row lies, and after a resume."""
    positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    state = ((input_ids + 1) * (positions * 2654435761 & 0x7FFFFFFF)).sum(1) + (depth + 1) * 2246822519
    state = state & 0x7FFFFFFF
    for _ in range(2):
        state = ((state ^ (state >> 15)) * 739982445) & 0x7FFFFFFF
    return (state.double() + 0.5) / 2**31


# Learned exits of looped models: Ouro (arXiv 2510.25741) --------------------------------------------------------------


def exit_distribution(gates: Tensor) -> Tensor:
    """p_r = g_r prod_{j<r} (1 - g_j), the last step taking the rest. gates: [R, ...] in 0..1 -> [R, ...]."""
    stay = torch.cumprod(1.0 - gates, 0)
    before = torch.cat([torch.ones_like(stay[:1]), stay[:-1]])
    return torch.cat([(gates * before)[:-1], before[-1:]])


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats over the first dimension. [R, ...] -> [...]."""
    return -(p * p.clamp(min=1e-20).log()).sum(0)


def exit_step(p: Tensor, quantile: float) -> Tensor:
    """The first step, from 1, by which the exit probability adds up to `quantile`; the last where none does."""
    reached = p.cumsum(0) >= quantile
    reached[-1] = True
    return reached.long().argmax(0) + 1


def expected_exit_loss(losses: Tensor, p: Tensor, beta: float) -> Tensor:
    """Stage I: mean over tokens of sum_r p_r CE_r - beta H(p). losses, p: [R, ...]."""
    return ((p * losses).sum(0) - beta * entropy(p)).mean()


def improvement_labels(losses: Tensor, slope: float, offset: float) -> Tensor:
    """Stage II's target of going on at steps 2 .. R: sigmoid(k (max(0, CE_{r-1} - CE_r) - gamma)). [R, ...] -> [R - 1,
    ...]."""
    return torch.sigmoid(slope * ((losses[:-1] - losses[1:]).clamp(min=0.0) - offset))


def improvement_loss(gates: Tensor, labels: Tensor) -> Tensor:
    """Stage II: BCE of 1 - g_r against the labels. gates: [R, ...], labels: [R - 1, ...] of steps 2 .. R."""
    return F.binary_cross_entropy(1.0 - gates[1:], labels)


# Criteria that nothing was trained for: Huginn (arXiv 2502.05171) -----------------------------------------------------


def divergence(logits: Tensor, previous: Tensor | None) -> Tensor:
    """KL(previous || current) of the predictions; of the first step against the uniform distribution. -> [...]."""
    current = logits.float().log_softmax(-1)
    uniform = torch.full_like(current, -math.log(current.shape[-1]))
    before = uniform if previous is None else previous.float().log_softmax(-1)
    return (before.exp() * (before - current)).sum(-1)


def pruned_divergence(logits: Tensor, previous: Tensor | None, share: float = 0.1) -> Tensor:
    """The same of distributions whose entries below `share` of the largest are set to 1 / V, and renormalised."""

    def prune(values: Tensor) -> Tensor:
        p = values.float().softmax(-1)
        p = torch.where(p < share * p.amax(-1, keepdim=True), 1.0 / p.shape[-1], p)
        return (p / p.sum(-1, keepdim=True)).log()

    return divergence(prune(logits), None if previous is None else prune(previous))


def entropy_change(logits: Tensor, previous: Tensor | None) -> Tensor:
    """Absolute change of the predictions' entropy; the first step has none, but Huginn's
    code starts from an entropy of 100. -> [...]."""

    def of(values: Tensor) -> Tensor:
        p = values.float().log_softmax(-1)
        return -(p.exp() * p).sum(-1)

    now = of(logits)
    return (now - (100.0 if previous is None else of(previous))).abs()


def relative_change(x: Tensor, previous: Tensor) -> Tensor:
    """||x - previous|| / ||x||. [..., D] each -> fp32 [...]."""
    x, previous = x.float(), previous.float()
    return (x - previous).norm(dim=-1) / x.norm(dim=-1)
