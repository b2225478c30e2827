"""What exits need once their model is trained: the classifier's fit, and a threshold that can be trusted.

`python -m pretrain.evaluate --checkpoint RUN --calibrate text` finds the threshold by Learn then Test (CALM, arXiv
2207.07061, section 4): thresholds are tried from the strictest on; each is the hypothesis that the mean distance
between what it yields and what full depth yields is above `delta`, rejected where a p-value of Hoeffding and Bentkus is
at most `epsilon`; the last one before the first that is not rejected is taken. Then, over prompts like these, the mean
distance is at most `delta` with a probability of at least 1 - `epsilon`.

Shapes: B sequences, T tokens, N tokens that count, D hidden size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import flops
from model.depth import method_of
from model.depth.exits import classifier_loss
from model.inference.engine import Engine
from model.inference.sampling import SamplingParams

if TYPE_CHECKING:
    from model.modeling import MoRForCausalLM

# --- calibration --------------------------------------------------------------------------------------------------

Kind = Literal["text", "risk"]


def hoeffding_bentkus(mean: float, count: int, delta: float) -> float:
    """p-value of "the expected distance is above `delta`", from the mean of `count` distances within 0 and 1."""
    from scipy import stats  # slow to import

    low = min(mean, delta)
    near = low * math.log(low / delta) if low > 0 else 0.0
    far = (1.0 - low) * math.log((1.0 - low) / (1.0 - delta))
    bentkus = math.e * stats.binom.cdf(math.ceil(count * mean), count, delta)
    return float(min(math.exp(-count * (near + far)), bentkus, 1.0))


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """1 - ROUGE-L's F of two texts, by their tokens: 0 for equal ones, 1 where nothing is common in order."""
    if not one and not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for token in one:
        before = row[:]
        for i, candidate in enumerate(other):
            row[i + 1] = before[i] + 1 if token == candidate else max(row[i], before[i + 1])
    return 1.0 - 2.0 * row[-1] / (len(one) + len(other))


@dataclass(frozen=True)
class Trial:
    """A threshold that was tested. risk: mean distance; layers: that the tokens of the answers passed, on average;
    flops: of a forward pass over them against full depth, by the `exact` convention, checks included."""

    threshold: float
    risk: float
    p_value: float
    layers: float
    flops: float


@dataclass(frozen=True)
class Calibration:
    """What was found. threshold: None where even the strictest could not be rejected; trials: in the order tested."""

    kind: Kind
    delta: float
    epsilon: float
    prompts: int
    threshold: float | None
    trials: tuple[Trial, ...]


def thresholds_of(model: MoRForCausalLM) -> list[float]:
    """From the strictest on: confidences fall in steps of 0.05, changes rise by a quarter of a power of ten."""
    if method_of(model.config).confident(model.config):
        return [round(1.0 - 0.05 * step, 2) for step in range(20)]
    return [10.0 ** (-4 + step / 4) for step in range(17)]


def calibrate(
    model: MoRForCausalLM,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    kind: Kind = "text",
    delta: float = 0.1,
    epsilon: float = 0.05,
    thresholds: Sequence[float] | None = None,
) -> Calibration:
    """Find the threshold, and leave the model with it (with its own, where none is found).

    references: what follows each prompt, as long as the answers are to be. kind `text`: distance between the answer and
    full depth's; `risk`: by how much the answer is further from the reference than full depth's is. Raises ValueError
    where the numbers cannot test anything.
    """
    if "full" not in method_of(model.config).modes(model.config):
        raise ValueError(f"--calibrate: needs a model with exits, and this is a {model.config.architecture} model")
    for name, value in (("--delta", delta), ("--epsilon", epsilon)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}: must lie between 0 and 1, got {value}; use 0.1")
    if hoeffding_bentkus(0.0, len(prompts), delta) > epsilon:
        enough = math.ceil(math.log(epsilon) / math.log(1.0 - delta))
        raise ValueError(
            f"--calibration-prompts: {len(prompts)} cannot show a mean distance of at most {delta}, even without any; "
            f"use at least {enough}"
        )
    config, own, mode = model.config, model.config.exit_threshold, model.config.routing_mode
    config.routing_mode = "full"
    whole, _ = answers(model, prompts, references)
    config.routing_mode = "causal"
    found, trials = None, []
    try:
        for threshold in thresholds_of(model) if thresholds is None else thresholds:
            config.exit_threshold = float(threshold)
            early, depths = answers(model, prompts, references)
            risk = fmean(_risk(kind, *texts) for texts in zip(early, whole, references, strict=True))
            p_value = hoeffding_bentkus(risk, len(prompts), delta)
            trials.append(Trial(float(threshold), risk, p_value, *_costs(model, depths, len(prompts[0]))))
            if p_value > epsilon:
                break
            found = float(threshold)
    finally:
        config.exit_threshold, config.routing_mode = own if found is None else found, mode
    return Calibration(kind, delta, epsilon, len(prompts), found, tuple(trials))


def _risk(kind: Kind, early: Sequence[int], whole: Sequence[int], reference: Sequence[int]) -> float:
    if kind == "text":
        return distance(early, whole)
    return max(0.0, distance(early, reference) - distance(whole, reference))


def answers(
    model: MoRForCausalLM, prompts: Sequence[Sequence[int]], references: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[int]]:
    """Greedy answers, as long as the references, and the gates that each of their tokens passed."""
    longest = max(len(prompt) + len(reference) for prompt, reference in zip(prompts, references, strict=True))
    engine = Engine(model, kv_tokens=32 * longest)
    requests = [
        engine.submit(prompt, SamplingParams(max_tokens=len(reference)))
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    for _ in engine.stream():
        pass
    depths = [depth for request in requests for depth in request.depths[len(request.prompt) :]]
    return [request.tokens for request in requests], depths


def _costs(model: MoRForCausalLM, depths: Sequence[int], length: int) -> tuple[float, float]:
    """Mean layers of these tokens, and FLOPs of tokens like them against those of full depth."""
    config, method = model.config, method_of(model.config)
    gates = flops.gates_of(config)
    ends = [sum(len(s.uses) for s in method.stages(config)[: level + 1]) for level in range(gates + 1)]
    shares = [depths.count(level) / max(len(depths), 1) for level in range(gates + 1)]
    entered = flops.entered_of(config, shares, length)
    work = flops.routed_work(config, length, 1, entered)
    full = flops.routed_work(config, length, 1, [length] * gates, training=True)
    plain = sum(v for name, v in flops.forward_flops(config, full).items() if name != "exit_heads")
    layers = sum(share * end for share, end in zip(shares, ends, strict=True))
    return layers, float(sum(flops.forward_flops(config, work).values()) / plain)


def save_calibrated(model: MoRForCausalLM, tokenizer: Tokenizer, folder: Path, results: dict[str, Any]) -> None:
    """The model with what was fitted and found, as a folder to generate from; `calibration.json` says how."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save(str(partial / "tokenizer.json"))
    (partial / "calibration.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


# --- the classifier -----------------------------------------------------------------------------------------------


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


def fit_classifier(model: MoRForCausalLM, batches: Iterable[Tensor], rate: float = 1e-2) -> list[dict[str, Any]]:
    """Fit the exits' classifier, one step of Adam for each batch [B, T], the model left as it is.

    Returns each step's loss and the share of tokens that the exits agree on with the last layer. Raises ValueError for
    a model without one.
    """
    if model.config.exit_measure != "classifier":
        raise ValueError(
            f"--fit-classifier: the model's exit_measure is {model.config.exit_measure!r}; it takes 'classifier'"
        )
    method = model.model.depth
    learned = [method.classifier_weight, method.classifier_bias]
    for tensor in learned:
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(learned, rate)
    lines = []
    for batch in batches:
        fits = list(classifier_losses(model, batch.to(model.device)))
        loss = torch.stack([fit.loss for fit in fits]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agreeing = [fit.agrees.float().mean().item() for fit in fits]
        lines.append({"loss": loss.item(), "agreeing": agreeing})
    for tensor in learned:
        tensor.requires_grad_(False)
    return lines
