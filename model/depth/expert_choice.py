"""MoR, expert-choice (arXiv 2507.10524, eq. 2.1): recursion r takes the top-k of the tokens of recursion r - 1."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from .base import DepthMethod, Scorer
from .layout import Stage, looped
from .routers import router_shapes

if TYPE_CHECKING:
    from ..config import MoRConfig


class ExpertChoice(DepthMethod):
    """A router before each recursion."""

    fixed = True

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        return looped(config, gated=True, first_takes_all=False)

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        shapes = router_shapes(config, 1)
        if not shapes:
            return []
        learns = config.gating == "weighted" or config.selection == "aux_loss" or config.z_loss_coefficient > 0
        gates = range(config.num_recursions)
        found = [Scorer("router", gate, shapes, to_weights=learns, to_input=learns) for gate in gates]
        if config.selection == "aux_router":
            found += [Scorer("aux_router", gate, shapes, to_input=False) for gate in gates]
        return found

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        depth = config.num_recursions
        if config.capacity_factors is not None:
            return [Fraction(c).limit_denominator(10**6) for c in config.capacity_factors]
        return [Fraction(depth - r, depth) for r in range(depth)]

    @classmethod
    def selected(cls, config: MoRConfig, gate: int, length: int) -> int:
        """max(1, floor(c_r T)) in floating point, as the model computes it."""
        assert config.capacity_factors is not None
        return max(1, int(config.capacity_factors[gate] * length))
