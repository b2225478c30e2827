"""A way of spending depth that no paper has, in one file: past a layer, tokens may stop before each further one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.config import MoRConfig
from model.depth.base import Carry, DepthMethod, Scorer, Setting
from model.depth.layout import Stage, stack
from model.depth.routers import Router


class Stopping(DepthMethod):
    """x + sigmoid(s) (layer(x) - x) for those whose score s is at least 0; the others have stopped."""

    name = "stopping"
    settings: ClassVar[dict[str, Setting]] = {"stops_from": Setting(2, int, "first layer that a token may not reach")}

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config, 1) for _ in range(self.gates))

    @classmethod
    def check_recursions(cls, config: MoRConfig) -> None:
        if config.num_recursions != 1:
            raise ValueError(f"num_recursions: stopping has untied layers, got {config.num_recursions}; use 1")

    @classmethod
    def check(cls, config: MoRConfig) -> None:
        if not 0 < config.stops_from < config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise ValueError(f"stops_from: must lie from 1 to {last}, got {config.stops_from}; use {last}")

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        first = config.stops_from
        return stack(config, lambda depth: None if depth < first else depth - first, keys="entered")

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        return [Scorer("router", gate, ((config.hidden_size, 1),)) for gate in range(len(cls.shares(config)))]

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        return [Fraction(1, 2) ** (gate + 1) for gate in range(config.num_hidden_layers - config.stops_from)]

    def score(self, gate: int, x: Tensor, carry: Carry, run: Any) -> Tensor:
        return self.routers[gate](x).squeeze(-1)

    def admit(self, gate: int, logits: Tensor | None, x: Tensor, carry: Carry, run: Any) -> Tensor:
        assert logits is not None
        return logits >= 0

    def merge(
        self, gate: int, before: Tensor, after: Tensor, logits: Tensor | None, carry: Carry, run: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert logits is not None
        return before + torch.sigmoid(logits)[..., None].to(after.dtype) * (after - before), {}
