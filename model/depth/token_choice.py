"""MoR, token-choice (arXiv 2507.10524, eq. 2.2): each token chooses its depth once, before the first recursion."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..record import entropy, max_violation
from .base import Carry, DepthMethod, Scorer, Setting
from .layout import Stage, looped
from .routers import GATING, ROUTER, Router, check_router, elementwise, random_logits, router_shapes, z_loss

if TYPE_CHECKING:
    from ..config import MoRConfig


class TokenChoice(DepthMethod):
    """One router with an output for each depth."""

    name, place = "token_choice", 20
    kinds: ClassVar[dict[str, str | None]] = {"mor_token": "#cc79a7"}
    previews = True
    chooses_depth = True
    settings: ClassVar[dict[str, Setting]] = {
        **ROUTER,
        **GATING,
        "balancing": Setting(
            "loss",
            Literal["loss", "loss_free", "none"],
            "loss, loss_free (a bias on the choice of depth, never on the gate) or none",
        ),
        "balancing_coefficient": Setting(0.1, float, "weight of the balancing loss"),
        "bias_update_rate": Setting(0.001, float, "u of the loss-free update b <- b + u * sign(mean load - load)"),
        "balancing_warmup_steps": Setting(0, int, "optimizer steps during which every token takes the full depth"),
    }
    router_bias: Tensor | None

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        if config.router != "random":
            self.routers = nn.ModuleList([Router(config, self.gates)])
        bias = torch.zeros(self.gates) if config.balancing == "loss_free" else None
        self.register_buffer("router_bias", bias)

    @classmethod
    def resolved(cls, config: MoRConfig) -> dict[str, Any]:
        return {"router_activation": "softmax", "router_alpha": 1.0}

    @classmethod
    def check(cls, config: MoRConfig) -> None:
        check_router(config, ("softmax", "sigmoid"))

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        return looped(config, gated=True, first_takes_all=True)

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        shapes = router_shapes(config, config.num_recursions)
        learns = config.gating == "weighted" or config.balancing == "loss" or config.z_loss_coefficient > 0
        return [Scorer("router", 0, shapes, to_weights=learns, to_input=learns)] if shapes else []

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        """Under perfect balance."""
        depth = config.num_recursions
        return [Fraction(depth - r, depth) for r in range(depth)]

    @classmethod
    def controls(cls, config: MoRConfig) -> dict[str, dict[str, Any]]:
        return {"random_router": {"router": "random"}}

    @classmethod
    def follows_load(cls, config: MoRConfig) -> bool:
        return config.balancing == "loss_free"

    @classmethod
    def needs_load(cls, config: MoRConfig) -> bool:
        return config.balancing == "loss"

    @classmethod
    def shown(cls, config: MoRConfig, record: Any) -> Tensor:
        """The probability of each depth."""
        return depth_scores(record.scores[0], str(config.router_activation), 1.0)

    @classmethod
    def summarize(cls, totals: dict[str, Any]) -> dict[str, float]:
        load = totals["load"]
        return {"max_violation": max(load) * len(load) / sum(load) - 1}

    # --- rules --------------------------------------------------------------------------------------------------------

    def begin(self, x: Tensor, run: Any) -> dict[str, Tensor]:
        """Every token's depth (from 0), its gate, and its state before the recursions."""
        config = self.config
        if config.router == "random":
            logits = random_logits(run.input_ids, run.positions, 0, self.gates).expand(*x.shape[:-1], -1)
        else:
            logits = self.routers[0](x)
        scores = depth_scores(logits, str(config.router_activation), float(config.router_alpha or 0.0))
        choice = self.choose(scores.detach(), run.step).clamp(max=run.last)
        if run.all_in:
            choice = torch.full_like(choice, run.last)
        run.scored(logits, outputs=True)
        self._losses(logits, scores, choice, run)
        return {"choice": choice, "base": x, "gate": scores.gather(-1, choice[..., None])}

    def choose(self, scores: Tensor, step: int | None) -> Tensor:
        """Depths from 0, [..., G] -> [...]: the best score plus bias; the deepest for all during warm-up."""
        warmup = self.config.balancing_warmup_steps if self.training else 0
        if warmup > 0 and step is not None and step < warmup:
            return scores.new_full(scores.shape[:-1], self.gates - 1, dtype=torch.long)
        return (scores if self.router_bias is None else scores + self.router_bias).argmax(-1)

    def counts(self, carry: dict[str, Tensor], run: Any) -> Tensor:
        passes = carry["choice"][..., None] >= torch.arange(self.gates, device=carry["choice"].device)
        return (passes if run.real is None else passes & run.real[..., None]).sum((0, 1))

    def admit(self, gate: int, logits: Tensor | None, x: Tensor, carry: Carry, run: Any) -> Tensor | None:
        return None if gate == 0 else carry["choice"] >= gate

    def end(self, x: Tensor, carry: Carry, run: Any) -> Tensor:
        """The last recursion's output, gated, is added to the state before the first (eq. 2.2)."""
        gate = carry["gate"].to(x.dtype) * x if self.config.gating == "weighted" else x
        return carry["base"] + gate

    # --- training -----------------------------------------------------------------------------------------------------

    def _losses(self, logits: Tensor, scores: Tensor, choice: Tensor, run: Any) -> None:
        config = self.config
        if not self.training or config.router == "random" or run.routing_only:
            return
        if config.balancing == "loss":
            load = self.load(choice, run.real) if run.load is None else run.load
            run.loss("balancing", balancing_loss(load.float(), scores, run.real))
        if config.z_loss_coefficient > 0:
            run.loss("z", z_loss(logits, run.real))

    def load(self, choice: Tensor, real: Tensor | None) -> Tensor:
        """[G] share of tokens per depth. choice, real: [B, T]."""
        chosen = choice[..., None] == torch.arange(self.gates, device=choice.device)
        if real is None:
            return chosen.flatten(0, -2).sum(0) / choice.numel()
        return (chosen & real[..., None]).sum((0, 1)) / real.sum().clamp(min=1)

    def coefficients(self) -> dict[str, float]:
        return {"balancing": self.config.balancing_coefficient, "z": self.config.z_loss_coefficient}

    def describe(self, record: Any, run: Any) -> None:
        depths = torch.arange(1, self.gates + 1, device=record.depth.device)
        tokens = record.depth.numel() if run.real is None else run.real.sum().clamp(min=1)
        record.load = (record.depth[..., None] == depths).sum((0, 1)) / tokens
        record.statistics["max_violation"] = max_violation(record.load)
        record.statistics["entropy"] = entropy(record.load)

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        """Loss-free balancing: b + u * sign(mean load - load)."""
        bias = self.router_bias
        if bias is not None:
            bias.copy_(bias_step(bias, load.to(bias), self.config.bias_update_rate))


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
