"""MoR, token-choice (arXiv 2507.10524, eq. 2.2): each token chooses its depth once, before the first recursion."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from .base import DepthMethod, Scorer
from .layout import Stage, looped
from .routers import router_shapes

if TYPE_CHECKING:
    from ..config import MoRConfig


class TokenChoice(DepthMethod):
    """One router with an output for each depth."""

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
