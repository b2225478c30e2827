"""Choosing the next token: greedy or sampled, each request by its own parameters and its own random numbers.

Shapes: M requests that need a token, N tokens of one request, V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.inference.policy import DepthPolicy

GREEDY_BELOW = 1e-5  # a temperature under which the likeliest token is all that is left
MAX_LOGPROBS = 20
# What OpenAI's completions take.
PENALTY, BIAS = 2.0, 100.0
NOT_FINITE = "the model's logits are not finite; are the weights trained and of the right type?"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Raises ValueError naming the field that cannot be.

    max_tokens: most tokens to generate; 0, with prompt_logprobs, scores the prompt alone. temperature: 0 is greedy, and
    so is anything below 1e-5. top_k: 0 keeps every token. top_p: the likeliest tokens that together reach this
    probability; 1 keeps every token. seed: of the request's own generator, any integer; None draws one. stream: which
    of the independent streams of that seed, so that choices of one seed differ. stop: token sequences that end the
    text, and are no part of it.
    presence_penalty, frequency_penalty: taken off the logit of a token that the answer holds, once, and for each time
    that it stands there. logit_bias: token id -> added to its logit.
    logprobs: keep the log-probability of each generated token with this many of the likeliest ones, 0 to 20; None keeps
    nothing. prompt_logprobs: the same of the prompt's tokens. All are the model's own: fp32 log-softmax of its logits,
    before penalties, biases and temperature.
    depth: how many recursions its tokens take; None: the engine's own policy. gates: keep the gates' raw scores.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[Sequence[int]] = field(default_factory=tuple)
    stream: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    depth: DepthPolicy | None = None
    gates: bool = False

    def __post_init__(self):
        if self.max_tokens < (0 if self.prompt_logprobs else 1):
            raise ValueError(
                f"max_tokens: must be at least 1, got {self.max_tokens}"
                + ("" if self.max_tokens else "; 0 needs prompt_logprobs")
            )
        if not 0.0 <= self.temperature <= 100.0:  # NaN fails too
            raise ValueError(f"temperature: must lie in [0, 100], got {self.temperature}; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 0, got {self.top_k}; 0 keeps every token")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: must lie in (0, 1], got {self.top_p}; 1 keeps every token")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"seed: must be an integer, got {self.seed!r}")
        if any(len(sequence) == 0 for sequence in self.stop):
            raise ValueError("stop: a stop sequence must not be empty")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -PENALTY <= getattr(self, name) <= PENALTY:
                raise ValueError(f"{name}: must lie in [-2, 2], got {getattr(self, name)}")
        for token, bias in self.logit_bias.items():
            if not -BIAS <= bias <= BIAS:
                raise ValueError(f"logit_bias: of token {token} must lie in [-100, 100], got {bias}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs: must lie in [0, {MAX_LOGPROBS}], got {self.logprobs}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before the choice."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)

    def generator(self) -> random.Random:
        """The request's own random numbers: different for every seed, of either sign, and every stream of it."""
        # Random(-1) is Random(1), and seed + 1 is another request's seed; a text is hashed.
        return random.Random() if self.seed is None else random.Random(f"{self.seed}/{self.stream}")


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a token where it stands, and the likeliest tokens there, best first, each (id, value)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Log-probabilities of `tokens` [N] under logits [N, V], with the `top` likeliest of each row."""
    values = logits.float().log_softmax(-1)
    own = values.gather(1, torch.tensor(tokens, device=values.device)[:, None])[:, 0].tolist()
    if not top:
        return [TokenScore(value) for value in own]
    best, ids = (part.tolist() for part in values.topk(min(top, values.shape[-1]), dim=-1))
    pairs = (tuple(zip(row, value, strict=True)) for row, value in zip(ids, best, strict=True))
    return [TokenScore(value, row) for value, row in zip(own, pairs, strict=True)]


def choose(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[random.Random],
    answers: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """One token for each row of logits [M, V]. A row's choice depends on nothing but the row, its own generator and,
    with penalties, its answer so far."""
    logits = _adjust(logits.float(), params, answers)
    best, places = logits.max(-1)  # the maximum of a row with a nan is nan
    if not torch.isfinite(best).all():
        raise FloatingPointError(NOT_FINITE)
    tokens = places.tolist()
    drawn = [i for i, p in enumerate(params) if not p.greedy]
    if drawn:
        uniform = torch.tensor([generators[i].random() for i in drawn], dtype=torch.float64)
        for i, token in zip(
            drawn, _draw(logits[drawn].double().cpu(), [params[i] for i in drawn], uniform), strict=True
        ):
            tokens[i] = token
    return tokens


def _adjust(logits: Tensor, params: Sequence[SamplingParams], answers: Sequence[Sequence[int]] | None) -> Tensor:
    """Logits after penalties and biases; the given ones where no request has any."""
    changed = [i for i, p in enumerate(params) if p.adjusts]
    if not changed:
        return logits
    logits = logits.clone()
    for i in changed:
        row, param = logits[i], params[i]
        counts = Counter(answers[i] if answers is not None else ())
        changes = {t: -param.presence_penalty - param.frequency_penalty * n for t, n in counts.items()}
        for token, bias in param.logit_bias.items():
            changes[token] = changes.get(token, 0.0) + bias
        if changes:
            index = torch.tensor(list(changes), device=row.device)
            row[index] += torch.tensor(list(changes.values()), dtype=row.dtype, device=row.device)
    return logits


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> list[int]:
    """Inverse of the cumulated probabilities, by temperature, then top-k, then top-p. logits: [M, V]; uniform: [M]."""
    temperature = torch.tensor([[p.temperature] for p in params], dtype=torch.float64)
    # Against the best one, so that no quotient overflows.
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([[p.top_k or logits.shape[-1]] for p in params])
    ordered = ordered.masked_fill(torch.arange(logits.shape[-1]) >= top_k, -torch.inf)
    cumulated = ordered.softmax(-1).cumsum(-1)
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64)
    # The nucleus: as many of the likeliest tokens as it takes to reach top_p.
    last = (cumulated < top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    total = cumulated.gather(1, last)
    place = torch.searchsorted(cumulated, uniform[:, None] * total, right=True).minimum(last)
    return order.gather(1, place).squeeze(1).tolist()
