"""Mixture-of-Depths (arXiv 2404.02258): an untied stack, some of whose layers take the top-k of the sequence.

Each routed layer chooses among all tokens, so nothing is nested. What a router is trained to say without looking ahead
is either its own score (`selection: aux_loss`) or that of a small MLP on detached states (`predictor`). Two points that
the paper leaves open are settings: the gate (sigmoid of the score, or the raw score), and what it multiplies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Carry, Scorer, Setting
from .expert_choice import SELECTION, ExpertChoice
from .layout import Stage, stack
from .routers import ROUTER, check_router, elementwise, exact_linear

if TYPE_CHECKING:
    from ..config import MoRConfig


class Predictor(nn.Module):
    """D -> D / 2 -> SiLU -> 1, with biases, in fp32."""

    def __init__(self, hidden: int):
        super().__init__()
        self.first = nn.Linear(hidden, hidden // 2)
        self.last = nn.Linear(hidden // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> logits [...]."""
        with torch.autocast(x.device.type, enabled=False):
            inner = exact_linear(x.float(), self.first.weight.float()) + self.first.bias.float()
            logits = exact_linear(elementwise(F.silu, inner), self.last.weight.float()) + self.last.bias.float()
            return logits.squeeze(-1)


class MixtureOfDepths(ExpertChoice):
    """A router before every `routed_every`-th layer, so that the last layer of an even stack is routed."""

    name, place = "mixture_of_depths", 30
    kinds: ClassVar[dict[str, str | None]] = {"mod": "#e69f00"}
    nested = False
    settings: ClassVar[dict[str, Setting]] = {
        **ROUTER,
        **SELECTION,
        "routed_every": Setting(2, int, "each so many-th layer is routed, the others take every token"),
        "routed_capacity": Setting(0.125, float, "share of the sequence that a routed layer takes"),
        "residual": Setting(
            "delta",
            Literal["delta", "block"],
            "what the gate multiplies: what a layer changes (delta: x + g (layer(x) - x)) or what it gives (block: x + "
            "g layer(x))",
        ),
    }

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        if config.router != "random" and config.selection == "predictor":
            self.predictors = nn.ModuleList(Predictor(config.hidden_size) for _ in range(self.gates))

    @classmethod
    def resolved(cls, config: MoRConfig) -> dict[str, Any]:
        return {"router_activation": "sigmoid", "router_alpha": 1.0}

    @classmethod
    def check_recursions(cls, config: MoRConfig) -> None:
        if config.num_recursions != 1:
            raise ValueError(
                f"num_recursions: mixture_of_depths routes untied layers, got {config.num_recursions}; use 1"
            )

    @classmethod
    def check(cls, config: MoRConfig) -> None:
        check_router(config, ("sigmoid", "none"))
        if config.selection == "aux_router":
            raise ValueError("selection: 'aux_router' is of expert_choice; use 'predictor', or 'aux_loss'")
        if not 2 <= config.routed_every <= config.num_hidden_layers:
            raise ValueError(
                f"routed_every: must lie from 2 to num_hidden_layers {config.num_hidden_layers}, got "
                f"{config.routed_every}; use 2"
            )
        if not 0.0 < config.routed_capacity <= 1.0:
            raise ValueError(f"routed_capacity: must lie in (0, 1], got {config.routed_capacity}; use 0.125")

    @classmethod
    def capacities_of(cls, config: MoRConfig) -> list[float]:
        return [config.routed_capacity] * (config.num_hidden_layers // config.routed_every)

    @classmethod
    def controls(cls, config: MoRConfig) -> dict[str, dict[str, Any]]:
        full = {"routed_capacity": 1.0, "capacity_warmup_steps": 0}
        return {"random_router": {"router": "random"}, "gate_only": full}

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        every = config.routed_every
        return stack(config, lambda depth: None if (depth + 1) % every else depth // every, keys="entered")

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        found = super().scorers(config)
        if found and config.selection == "predictor":
            h = config.hidden_size
            shapes, gates = ((h, h // 2), (h // 2, 1)), range(len(cls.capacities_of(config)))
            found += [Scorer("predictor", gate, shapes, biases=h // 2 + 1, to_input=False) for gate in gates]
        return found

    def decision(self, gate: int, x: Tensor, logits: Tensor) -> Tensor:
        if self.config.router != "random" and self.config.selection == "predictor":
            return self.predictors[gate](x.detach())
        return logits

    def merge(
        self, gate: int, before: Tensor, after: Tensor, logits: Tensor | None, carry: Carry, run: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x + g (layer(x) - x), so that g = 1 is the layer and g = 0 nothing; or x + g layer(x)."""
        result = after - before if self.config.residual == "delta" else after
        return super().merge(gate, before, result, logits, carry, run)

    def coefficients(self) -> dict[str, float]:
        apart = self.config.selection == "predictor"
        return super().coefficients() | ({"selection": 1.0} if apart else {})
