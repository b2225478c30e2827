"""Vanilla and recursive models: every token passes every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .base import DepthMethod
from .layout import Stage, looped

if TYPE_CHECKING:
    from ..config import MoRConfig


class Dense(DepthMethod):
    """No gates."""

    name, place = "none", 0
    kinds: ClassVar[dict[str, str | None]] = {"vanilla": "#0072b2", "recursive": "#d55e00"}

    @classmethod
    def architecture(cls, config: MoRConfig) -> str:
        return "recursive" if config.num_recursions > 1 else "vanilla"

    @classmethod
    def check_recursions(cls, config: MoRConfig) -> None:
        """Any sharing fits."""

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        return looped(config, gated=False, first_takes_all=True)
