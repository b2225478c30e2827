"""Early exit: a token leaves the layers as soon as the model is sure of it (CALM, arXiv 2207.07061).

Exits stand after given layers, or after each recursion of a shared block; every one is read out by the final norm and
the head. A token leaves at the first exit whose confidence reaches the threshold: the gap of the two best probabilities
(`softmax`), the similarity of its states at this exit and the one before (`state`), or a classifier's probability that
the last layer would say the same (`classifier`, trained afterwards on a frozen model). Its keys in the layers above are
made from the state with which it left (state propagation), so that a pass over a whole text decides, and computes, what
token-by-token decoding would. Prompts take the full depth. In training, nobody leaves; the losses at the exits are
CALM's, or LayerSkip's (arXiv 2404.16710): rotating exits and layer dropout. Further measures, for loops, are Huginn's
(arXiv 2502.05171): they let a token out when it changes no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..sharing import applications
from .base import Carry, DepthMethod, Scorer, Setting
from .exits import (
    decayed,
    divergence,
    draws,
    entropy_change,
    layer_dropout,
    loss_weights,
    pruned_divergence,
    relative_change,
    rotated,
    similarity,
    softmax_gap,
)
from .layout import Stage, looped, stack
from .routers import masked_mean

if TYPE_CHECKING:
    from ..config import MoRConfig

READ = frozenset({"softmax", "kl", "min_p_kl", "entropy"})  # measures that ask the head
COMPARED = frozenset({"state", "kl", "min_p_kl", "entropy", "latent"})  # those with the exit before
STATES = frozenset({"state", "latent"})  # of states alone: the first exit has none before it, and lets nobody out
CHANGES = frozenset({"kl", "min_p_kl", "entropy", "latent"})  # small where a token may leave; others are confidences


SETTINGS = {
    "exit_layers": Setting(
        None,
        list[int] | tuple[int, ...] | None,
        "layers after which tokens may leave; null is after every one. Recursions end in exits of their own",
    ),
    "exit_measure": Setting(
        "softmax",
        Literal["softmax", "state", "classifier", "kl", "min_p_kl", "entropy", "latent"],
        "confidence of a token at an exit: softmax (gap of its two best probabilities), state (cosine of its states at "
        "this exit and the one before), classifier (a probability, fitted once the model is trained); or what must "
        "have become small since the exit before, for loops: kl, min_p_kl, entropy (of the predictions), latent "
        "(relative change of the state)",
    ),
    "exit_threshold": Setting(
        0.9, float, "a token leaves where its confidence reaches this, or where a change falls below it"
    ),
    "exit_first": Setting(1, int, "no token leaves before it has passed this many layers"),
    "exit_decay": Setting(
        "none",
        Literal["none", "paper", "t5x"],
        "thresholds that fall along the output: as in the paper, 0.9 lambda + 0.1 exp(-rate t / N) clipped, or in its "
        "code (t5x), lambda (0.9 + 0.1 exp(-rate t / N)); none keeps lambda",
    ),
    "exit_decay_rate": Setting(4.0, float, "that rate"),
    "exit_decay_length": Setting(0, int, "N, the longest output; 0 where thresholds do not fall"),
    "exit_weights": Setting(
        "linear",
        Literal["linear", "equal", "double", "sum", "enabled_sum", "sqrt", "inverse"],
        "weight of the loss after layer i: linear (i), equal, double (2^(i - 1)), sum (1 + 2 + .. + i - 1), "
        "enabled_sum (sum of the layers up to i whose exits learn), sqrt, inverse; with the last layer's they "
        "add up to 1",
    ),
    "exit_scale": Setting(1.0, float, "multiplies these weights, but for the last layer's"),
    "exit_rotation": Setting(
        1, int, "each so many-th exit learns in a step, the next ones in the step after; 1 is all of them"
    ),
    "layer_dropout": Setting(
        0.0,
        float,
        "probability p that a sequence skips the last layer in training; layer l of L, from 0, is skipped with "
        "p (2^(l / (L - 1)) - 1)",
    ),
    "layer_dropout_steps": Setting(
        0, int, "optimizer steps over which p grows from 0 by the same curve; 0: from the start"
    ),
}


class EarlyExit(DepthMethod):
    """A gate after each exit, which those pass that go on."""

    name, place = "early_exit", 60
    kinds: ClassVar[dict[str, str | None]] = {"early_exit": "#882255"}
    settings: ClassVar[dict[str, Setting]] = SETTINGS
    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.mixes = False
        self.layers_at = self.exits_of(config)
        if config.exit_measure == "classifier":  # not learned with the model, so no parameter: see `pretrain.exits`
            self.register_buffer("classifier_weight", torch.zeros(2, config.hidden_size))
            self.register_buffer("classifier_bias", torch.zeros(2))

    # --- from the configuration alone ---------------------------------------------------------------------------------

    @classmethod
    def resolved(cls, config: MoRConfig) -> dict[str, Any]:
        every = list(range(1, config.num_hidden_layers)) if config.num_recursions == 1 else None
        return {"exit_layers": every}

    @classmethod
    def check_recursions(cls, config: MoRConfig) -> None:
        if config.num_recursions > 1 and config.sharing not in ("cycle", "middle_cycle"):
            raise ValueError(f"sharing: exits cannot use {config.sharing!r}; use 'middle_cycle' or 'cycle'")

    @classmethod
    def check(cls, config: MoRConfig) -> None:
        if config.kv_strategy not in ("recursion_wise", "propagated"):
            raise ValueError(
                f"kv_strategy: {config.kv_strategy!r} does not fit early_exit, where every layer has keys of every "
                "token, of those that left from the state with which they did; use 'propagated'"
            )
        _check_layers(config)
        last, exits_at = config.num_hidden_layers, cls.exits_of(config)
        if not 1 <= config.exit_first <= exits_at[-1]:
            raise ValueError(
                f"exit_first: must lie from 1 to the last exit, after layer {exits_at[-1]} of {last}, got "
                f"{config.exit_first}; use 1"
            )
        if not 1 <= config.exit_rotation <= len(exits_at):
            raise ValueError(
                f"exit_rotation: must lie from 1 to the {len(exits_at)} exits, got {config.exit_rotation}; use 1"
            )
        if config.exit_scale <= 0:
            raise ValueError(f"exit_scale: must be above 0, got {config.exit_scale}; use 1.0")
        if not 0.0 <= config.layer_dropout < 1.0:
            raise ValueError(f"layer_dropout: must lie in [0, 1), got {config.layer_dropout}; use 0.1")
        if config.layer_dropout_steps < 0 or (config.layer_dropout_steps and not config.layer_dropout):
            raise ValueError(
                f"layer_dropout_steps: {config.layer_dropout_steps} needs a layer_dropout above 0; use 0, or "
                "layer_dropout 0.1"
            )
        if config.exit_threshold < 0 and config.exit_measure != "state":
            raise ValueError(f"exit_threshold: must not be below 0, got {config.exit_threshold}; use 0.9")
        if config.exit_decay != "none" and config.exit_measure in CHANGES:
            raise ValueError(
                f"exit_decay: {config.exit_decay!r} lowers a confidence, which {config.exit_measure!r} is not; "
                "use 'none'"
            )
        if (config.exit_decay == "none") != (config.exit_decay_length == 0):
            works = "256, the longest output" if config.exit_decay != "none" else "0"
            raise ValueError(
                f"exit_decay_length: {config.exit_decay_length} does not fit exit_decay {config.exit_decay!r}; "
                f"use {works}"
            )

    @classmethod
    def exits_of(cls, config: MoRConfig) -> list[int]:
        """Layers that a token has passed at each exit, ascending."""
        if config.num_recursions == 1:
            return list(config.exit_layers or ())
        ends = {use.recursion: use.depth + 1 for use in applications(config) if use.recursion is not None}
        return [ends[recursion] for recursion in range(config.num_recursions - 1)]

    @classmethod
    def levels(cls, config: MoRConfig) -> int:
        return len(cls.exits_of(config)) + 1

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        """What follows a loop belongs to its last recursion: who left before skips it. Keys are everyone's."""
        exits_at = cls.exits_of(config)
        if config.num_recursions == 1:
            found = stack(config, lambda depth: sum(end <= depth for end in exits_at) - 1, keys="everyone")
        else:
            found = looped(config, gated=False, first_takes_all=True)
        uses = [use for stage in found for use in stage.uses]
        edges = [0, *exits_at, len(uses)]
        return tuple(
            Stage(tuple(uses[start:end]), level - 1 if level else None, call=level, level=level)
            for level, (start, end) in enumerate(itertools.pairwise(edges))
        )

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        if config.exit_measure != "classifier":
            return []
        return [Scorer("classifier", gate, ((config.hidden_size, 2),), counted=False) for gate in _judging(cls, config)]

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        """In training everyone goes on. What leaves while decoding is known once it has been measured."""
        return [Fraction(1)] * len(cls.exits_of(config))

    @classmethod
    def scored(cls, config: MoRConfig, tokens: Any) -> list[Any]:
        return [0 for _ in cls.exits_of(config)]

    @classmethod
    def heads(cls, config: MoRConfig, tokens: Any) -> Any:
        return tokens * Fraction(len(cls.exits_of(config)), config.exit_rotation)

    @classmethod
    def checks(cls, config: MoRConfig, offered: Sequence[Any]) -> Any:
        if config.exit_measure not in READ:
            return 0
        times = 2 if config.exit_measure in COMPARED else 1
        return times * sum(offered[gate] for gate in _judging(cls, config))

    @classmethod
    def modes(cls, config: MoRConfig) -> tuple[str, ...]:
        return ("causal", "full")

    @classmethod
    def confident(cls, config: MoRConfig) -> bool:
        return config.exit_measure not in CHANGES

    @classmethod
    def shown(cls, config: MoRConfig, record: Any) -> Tensor | None:
        """Confidences of the tokens that each exit asked, NaN elsewhere; of changes, exp(-change)."""
        result = torch.full((*record.depth.shape, len(cls.exits_of(config))), torch.nan, device=record.depth.device)
        for gate, scores in zip(_judging(cls, config), record.scores, strict=False):
            asked = (record.depth >= gate).flatten().nonzero().squeeze(1)
            values = scores.clamp(0.0, 1.0) if cls.confident(config) else torch.exp(-scores)
            result[..., gate].view(-1)[asked] = values[: len(asked)]
        return result

    # --- rules --------------------------------------------------------------------------------------------------------

    def begin(self, x: Tensor, run: Any) -> dict[str, Tensor]:
        """Every token's threshold; where states are compared, the one at the exit before."""
        if not self._decides(run):
            return {}
        carry = {"threshold": self.thresholds(run.positions, run.prompt, run.threshold).expand(x.shape[:-1])}
        return carry | ({"before": x} if self.config.exit_measure in COMPARED else {})

    def thresholds(self, positions: Tensor, prompt: Tensor | None, threshold: float | None = None) -> Tensor:
        """fp32, as positions. prompt: how many positions of the text are the prompt's, who stay at any confidence.
        threshold: None takes the configured one."""
        config, threshold = self.config, self.config.exit_threshold if threshold is None else threshold
        first = torch.zeros_like(positions) if prompt is None else prompt
        if config.exit_decay == "none":
            found = torch.full(positions.shape, threshold, device=positions.device)
        else:
            # The first token of an output comes from the prompt's last position, and is itself read at position 1.
            place = (positions - first).clamp(min=0) + (0 if prompt is None else 1)
            length, clipped = config.exit_decay_length, config.exit_decay == "paper"
            found = decayed(threshold, place, config.exit_decay_rate, length, clipped)
        return torch.where(positions < first, -torch.inf if config.exit_measure in CHANGES else torch.inf, found)

    def score(self, gate: int, x: Tensor, carry: Carry, run: Any) -> Tensor | None:
        """The confidence of the tokens at an exit; in training, the exit's loss."""
        if run.keep_exits:
            run.exit(0.0)
        elif self.training:
            for exit, weight in self.losses_at(run.step):
                if exit == gate:
                    run.exit(weight)
        if not self._decides(run) or self.layers_at[gate] < self.config.exit_first:
            return None
        return self.confidence(gate, x, carry, run)

    def confidence(self, gate: int, x: Tensor, carry: Carry, run: Any) -> Tensor:
        """x: [..., D] -> fp32 [...]. The head's products are made for some rows at a time."""
        measure = self.config.exit_measure
        previous = carry["before"] if measure in COMPARED else x
        if measure == "classifier":
            return self.classify(run.norm(x)).softmax(-1)[..., 1]
        if measure in STATES:
            if gate == 0:
                return torch.full(x.shape[:-1], float(measure in CHANGES), device=x.device)
            return (similarity if measure == "state" else relative_change)(x, previous)
        rows = max(64, 2**22 // self.config.vocab_size)
        parts = zip(x.flatten(0, -2).split(rows), previous.flatten(0, -2).split(rows), strict=True)
        found = [self._ask(part, old if gate else None, run) for part, old in parts]
        return torch.cat(found).view(x.shape[:-1])

    def _ask(self, x: Tensor, previous: Tensor | None, run: Any) -> Tensor:
        """A measure of the predictions. x, previous: [N, D] -> [N]."""
        logits = run.readout(x)
        if self.config.exit_measure == "softmax":
            return softmax_gap(logits)
        rule = {"kl": divergence, "min_p_kl": pruned_divergence, "entropy": entropy_change}
        return rule[self.config.exit_measure](logits, None if previous is None else run.readout(previous))

    def classify(self, normed: Tensor) -> Tensor:
        """[..., D] normed states -> fp32 logits [..., 2]; 1 is to leave."""
        return normed.float() @ self.classifier_weight.float().T + self.classifier_bias.float()

    def admit(self, gate: int, logits: Tensor | None, x: Tensor, carry: Carry, run: Any) -> Tensor | None:
        if logits is None or (gate == 0 and self.config.exit_measure in STATES):
            return None
        if self.config.exit_measure in CHANGES:
            return logits >= carry["threshold"]
        return logits < carry["threshold"]

    def merge(
        self, gate: int, before: Tensor, after: Tensor, logits: Tensor | None, carry: Carry, run: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        compared = self._decides(run) and self.config.exit_measure in COMPARED
        return after, {"before": before} if compared else {}

    def _decides(self, run: Any) -> bool:
        return not self.training and run.mode == "causal" and not run.all_in

    # --- training -----------------------------------------------------------------------------------------------------

    def losses_at(self, step: int | None) -> list[tuple[int, float]]:
        """Exits that learn at a step and the weights of their losses; the last layer has what is left of 1."""
        config = self.config
        learning = rotated(self.gates, config.exit_rotation, step or 0)
        layers = [*(self.layers_at[exit] for exit in learning), config.num_hidden_layers]
        return list(zip(learning, loss_weights(config.exit_weights, layers, config.exit_scale), strict=False))

    def kept(self, depth: int, run: Any) -> Tensor | None:
        """Rows [B, 1] that pass the layer at `depth`; None: all. A row that skips it is computed and not used."""
        config = self.config
        chance = layer_dropout(config.layer_dropout, depth, config.num_hidden_layers)
        if not self.training or chance == 0.0:
            return None
        if config.layer_dropout_steps:
            chance *= 2.0 ** min(1.0, (run.step or 0) / config.layer_dropout_steps) - 1.0
        if run.input_ids is None:
            raise ValueError("input_ids: layer_dropout draws from them; give them, not inputs_embeds")
        return (draws(run.input_ids, depth) >= chance)[:, None]

    def describe(self, record: Any, run: Any) -> None:
        """Share of the tokens that goes on at each exit, and layers that a token passed on average."""
        super().describe(record, run)
        if not record.scores:
            record.offered = torch.zeros_like(record.offered)
        # Written on the device: a list would be copied there, and waited for.
        passed = [record.depth.new_full((), layers) for layers in (*self.layers_at, self.config.num_hidden_layers)]
        layers = torch.stack(passed)[record.depth].float()
        record.statistics["mean_layers"] = masked_mean(layers, run.real)


def _judging(method: type[EarlyExit], config: MoRConfig) -> list[int]:
    """Exits that may let tokens out."""
    return [gate for gate, layer in enumerate(method.exits_of(config)) if layer >= config.exit_first]


def _check_layers(config: MoRConfig) -> None:
    given, last = config.exit_layers, config.num_hidden_layers
    if config.num_recursions > 1:
        if given is not None:
            raise ValueError(f"exit_layers: recursions end in exits of their own, got {given}; leave it out")
        return
    listed = list(given or ())
    if not listed or listed != sorted(set(listed)) or not (listed[0] >= 1 and listed[-1] < last):
        works = [max(1, last // 4), max(2, last // 2)] if last > 2 else [1]
        raise ValueError(f"exit_layers: must rise, from 1 to at most {last - 1}, got {given}; use {works}")
