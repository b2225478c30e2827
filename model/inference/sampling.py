"""Choosing the next token: greedy or sampled, each request by its own parameters and its own random numbers.

Shapes: M requests that need a token, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Raises ValueError naming the field that cannot be.

    max_tokens: most tokens to generate. temperature: 0 is greedy. top_k: 0 keeps every token. top_p: the likeliest
    tokens that together reach this probability; 1 keeps every token. seed: of the request's own generator; None draws
    one. stop: token sequences that end the text, and are no part of it.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[Sequence[int]] = field(default_factory=tuple)

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature <= 100.0:  # NaN fails too
            raise ValueError(f"temperature: must lie in [0, 100], got {self.temperature}; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 0, got {self.top_k}; 0 keeps every token")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: must lie in (0, 1], got {self.top_p}; 1 keeps every token")
        if any(len(sequence) == 0 for sequence in self.stop):
            raise ValueError("stop: a stop sequence must not be empty")


def choose(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[random.Random]) -> list[int]:
    """One token for each row of logits [M, V]. A row's choice depends on nothing but the row and its own generator."""
    logits = logits.float()
    best, places = logits.max(-1)  # the maximum of a row with a nan is nan
    if not torch.isfinite(best).all():
        raise FloatingPointError("the model's logits are not finite; are the weights trained and of the right type?")
    tokens = places.tolist()
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        uniform = torch.tensor([generators[i].random() for i in drawn], dtype=torch.float64)
        for i, token in zip(
            drawn, _draw(logits[drawn].double().cpu(), [params[i] for i in drawn], uniform), strict=True
        ):
            tokens[i] = token
    return tokens


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> list[int]:
    """Inverse of the cumulated probabilities, by temperature, then top-k, then top-p. logits: [M, V]; uniform: [M]."""
    temperature = torch.tensor([[p.temperature] for p in params], dtype=torch.float64)
    ordered, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([[p.top_k or logits.shape[-1]] for p in params])
    ordered = ordered.masked_fill(torch.arange(logits.shape[-1]) >= top_k, -torch.inf)
    cumulated = ordered.softmax(-1).cumsum(-1)
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64)
    # The nucleus: as many of the likeliest tokens as it takes to reach top_p.
    last = (cumulated < top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    total = cumulated.gather(1, last)
    place = torch.searchsorted(cumulated, uniform[:, None] * total, right=True).minimum(last)
    return order.gather(1, place).squeeze(1).tolist()
