"""What exits need once their model is trained: the classifier's fit, and a threshold that can be trusted.

Shapes: B sequences, T tokens, N tokens that count, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.depth.exits import classifier_loss
from model.modeling import MoRForCausalLM


@dataclass(frozen=True)
class ExitFit:
    """The classifier at one exit: its logits [N, 2], what it is to say [N] (the last layer's best token is the exit's
    own), and its loss, which alone carries a gradient."""

    logits: Tensor
    agrees: Tensor
    loss: Tensor


def classifier_losses(model: MoRForCausalLM, input_ids: Tensor, real: Tensor | None = None) -> Iterator[ExitFit]:
    """CALM's second phase (arXiv 2207.07061, section 3.4.1; labels and weights as in T5X): exit by exit, the model left
    as it is. input_ids: [B, T]; real: [B, T], 0 for padding."""
    inner = model.model
    with torch.no_grad():
        output = inner(input_ids, attention_mask=real, routing_mode="full", keep_exits=True)
        chosen = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real.bool()
        last = _best(model, output.last_hidden_state[chosen])
    for state, _ in output.exits:
        with torch.no_grad():
            normed = inner.norm(state[chosen])
            agrees = _best(model, normed) == last
        logits = inner.depth.classify(normed)
        yield ExitFit(logits, agrees, classifier_loss(logits, agrees))


def _best(model: MoRForCausalLM, normed: Tensor) -> Tensor:
    """The most likely next token. [N, D] -> [N], some rows at a time."""
    return torch.cat([model.lm_head(part).argmax(-1) for part in normed.split(256)])
