"""MoR, expert-choice (arXiv 2507.10524, eq. 2.1): recursion r takes the top-k of the tokens of recursion r - 1."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import Carry, DepthMethod, Scorer, Setting
from .capacity import compiled_judged, factor_at, judged
from .layout import Stage, looped
from .routers import GATING, ROUTER, Router, check_router, gate_of, random_logits, router_shapes, z_loss

if TYPE_CHECKING:
    from ..config import MoRConfig

SELECTION = {
    "selection": Setting(
        "aux_loss",
        Literal["aux_loss", "aux_router", "predictor", "none"],
        "how a top-k is decided without looking ahead: aux_loss (the router's own score, trained by BCE), aux_router "
        "(expert_choice: a second router, trained on detached states), predictor (mixture_of_depths: the same, a small "
        "MLP), none (no causal decision can be made)",
    ),
    "selection_coefficient": Setting(
        0.001, float, "weight of that BCE in the loss; auxiliary router and predictor train apart from the model"
    ),
    "capacity_warmup_steps": Setting(
        0, int, "optimizer steps over which every capacity falls from 1 to its value (cosine)"
    ),
}


class ExpertChoice(DepthMethod):
    """A router before each recursion."""

    name, place = "expert_choice", 10
    kinds: ClassVar[dict[str, str | None]] = {"mor_expert": "#009e73"}
    fixed = True
    settings: ClassVar[dict[str, Setting]] = {
        **ROUTER,
        **GATING,
        **SELECTION,
        "capacity_factors": Setting(
            None,
            list[float] | tuple[float, ...] | None,
            "c_1 .. c_Nr, the share of the sequence that recursion r takes; null is (Nr - r + 1) / Nr",
        ),
    }

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.capacities = self.capacities_of(config)
        if config.router != "random":
            self.routers = nn.ModuleList(Router(config, 1) for _ in range(self.gates))
            if config.selection == "aux_router":
                self.aux_routers = nn.ModuleList(Router(config, 1, tempered=False) for _ in range(self.gates))

    @classmethod
    def resolved(cls, config: MoRConfig) -> dict[str, Any]:
        depth = config.num_recursions
        capacities = [(depth - r) / depth for r in range(depth)]
        return {"router_activation": "sigmoid", "router_alpha": 0.1, "capacity_factors": capacities}

    @classmethod
    def check(cls, config: MoRConfig) -> None:
        check_router(config, ("sigmoid", "tanh", "none"))
        if config.selection == "predictor":
            raise ValueError("selection: 'predictor' is of mixture_of_depths; use 'aux_router', or 'aux_loss'")
        default = [round((config.num_recursions - r) / config.num_recursions, 4) for r in range(config.num_recursions)]
        capacities = list(config.capacity_factors or ())
        if len(capacities) != config.num_recursions:
            raise ValueError(
                f"capacity_factors: {len(capacities)} values for num_recursions {config.num_recursions}; use {default}"
            )
        if any(not 0.0 < c <= 1.0 for c in capacities):
            raise ValueError(f"capacity_factors: each must lie in (0, 1], got {capacities}; use {default}")
        if any(later > earlier for earlier, later in itertools.pairwise(capacities)):
            falling = sorted(capacities, reverse=True)
            raise ValueError(
                f"capacity_factors: must not rise, since each recursion chooses among the tokens of the one before, "
                f"got {capacities}; use {falling}"
            )

    @classmethod
    def capacities_of(cls, config: MoRConfig) -> list[float]:
        """Share of the sequence that each gate takes, [G]."""
        return [float(c) for c in config.capacity_factors or ()]

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        return looped(config, gated=True, first_takes_all=False)

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        shapes = router_shapes(config, 1)
        if not shapes:
            return []
        learns = config.gating == "weighted" or config.selection == "aux_loss" or config.z_loss_coefficient > 0
        gates = range(len(cls.capacities_of(config)))
        found = [Scorer("router", gate, shapes, to_weights=learns, to_input=learns) for gate in gates]
        if config.selection == "aux_router":
            found += [Scorer("aux_router", gate, shapes, to_input=False) for gate in gates]
        return found

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        return [Fraction(c).limit_denominator(10**6) for c in cls.capacities_of(config)]

    @classmethod
    def controls(cls, config: MoRConfig) -> dict[str, dict[str, Any]]:
        full = {"capacity_factors": [1.0] * config.num_recursions, "capacity_warmup_steps": 0}
        untied = {
            "routing": "mixture_of_depths",
            "num_recursions": 1,
            "routed_capacity": 1.0,
            "residual": "block",
            "router_activation": config.router_activation,
            "router_alpha": config.router_alpha,
            "selection": "none" if config.selection == "none" else "aux_loss",
        }
        dropped = dict.fromkeys(("gating", "capacity_factors", "capacity_warmup_steps", "kv_strategy", "relaxation"))
        return {"random_router": {"router": "random"}, "gate_only": full, "gate_on_vanilla": dropped | untied}

    @classmethod
    def selected(cls, config: MoRConfig, gate: int, length: int) -> int:
        """max(1, floor(c_r T)) in floating point, as the model computes it."""
        return max(1, int(cls.capacities_of(config)[gate] * length))

    @classmethod
    def modes(cls, config: MoRConfig) -> tuple[str, ...]:
        return ("topk",) if cls.refuses(config, "causal") else ("causal", "topk")

    @classmethod
    def refuses(cls, config: MoRConfig, mode: str) -> str | None:
        if mode == "causal" and config.selection == "none" and config.router != "random":
            return (
                "'causal' needs a router that was trained to decide without looking ahead, and selection is 'none'; "
                "use routing_mode='topk', or train with selection 'aux_loss' or 'aux_router'"
            )
        return None

    # --- rules --------------------------------------------------------------------------------------------------------

    def begin(self, x: Tensor, run: Any) -> dict[str, Tensor]:
        if self.config.router != "random":
            return {}
        dice = [random_logits(run.input_ids, run.positions, gate, 1) for gate in range(self.gates)]
        return {"dice": torch.cat(dice, -1).expand(*x.shape[:-1], -1)}

    def score(self, gate: int, x: Tensor, carry: Carry, run: Any) -> Tensor:
        if self.config.router != "random":
            return self.routers[gate](x).squeeze(-1)
        # Shifted so that a score of at least 0, the causal decision, comes with the share that the capacity keeps.
        before = self.capacities[gate - 1] if gate and self.nested else 1.0
        left_out = max(1.0 - self.capacities[gate] / before, 1e-6)
        return carry["dice"][..., gate] - math.log(left_out / (1.0 - left_out))

    def admit(self, gate: int, logits: Tensor | None, x: Tensor, carry: Carry, run: Any) -> Tensor:
        """By the token's own score (section 3.1); a recursion of capacity 1 takes all, as it does in training."""
        assert logits is not None
        if self.capacities[gate] == 1.0:
            return torch.ones_like(logits, dtype=torch.bool)
        return self.decision(gate, x, logits) >= 0

    def decision(self, gate: int, x: Tensor, logits: Tensor) -> Tensor:
        """The scores that decide without looking ahead. x: [..., D], logits: [...] -> [...]."""
        if self.config.router != "random" and self.config.selection == "aux_router":
            return self.aux_routers[gate](x.detach()).squeeze(-1)
        return logits

    def size(self, gate: int, step: int | None) -> float:
        if not self.training or self.config.capacity_warmup_steps == 0:
            # Without a look at the step: a compiled model would be specialised to it.
            return self.capacities[gate]
        return factor_at(self.capacities[gate], step, self.config.capacity_warmup_steps)

    def merge(
        self, gate: int, before: Tensor, after: Tensor, logits: Tensor | None, carry: Carry, run: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """h + g * block(h) (eq. 2.1); additive gating leaves the gate out."""
        assert logits is not None
        if self.config.gating == "additive":
            return before + after, {}
        if self.config.router == "random":
            logits = torch.zeros_like(logits)
        activation, alpha = str(self.config.router_activation), float(self.config.router_alpha or 0.0)
        add = _compiled_gated() if self.compiled and after.is_cuda else gated
        return add(before, after, logits, activation, alpha), {}

    # --- training -----------------------------------------------------------------------------------------------------

    def losses(self, gate: int, x: Tensor, logits: Tensor, chosen: Tensor, used: Tensor | None, run: Any) -> None:
        """The selection's BCE and the z-loss, and how often the causal decision agrees with the selection."""
        config, learned = self.config, self.config.router != "random"
        decision = self.decision(gate, x, logits)
        teaches = self.training and learned
        if config.selection != "none":
            judge = compiled_judged() if self.compiled and decision.is_cuda else judged
            loss, accuracy = judge(decision, chosen, used)
            if teaches:
                run.loss("selection", loss)
            run.figure("selection_accuracy", accuracy)
        if teaches and config.z_loss_coefficient > 0:
            run.loss("z", z_loss(logits[..., None], used))

    def apart(self) -> list[nn.Parameter]:
        return list(self.aux_routers.parameters()) if hasattr(self, "aux_routers") else []

    def coefficients(self) -> dict[str, float]:
        apart = self.config.selection == "aux_router"  # it trains nothing else, so its weight would be a learning rate
        selection = 1.0 if apart else self.config.selection_coefficient
        return {"selection": selection, "z": self.config.z_loss_coefficient}


def gated(before: Tensor, after: Tensor, logits: Tensor, activation: str, alpha: float) -> Tensor:
    """before + g * after. before, after: [..., D], logits: [...]."""
    return before + gate_of(logits, activation, alpha)[..., None].to(after.dtype) * after


@functools.cache
def _compiled_gated() -> Callable[..., Tensor]:
    return torch.compile(gated)
