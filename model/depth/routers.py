"""What scores tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import MoRConfig


def router_shapes(config: MoRConfig, outputs: int) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the matrices of one router; empty where none is learned."""
    h = config.hidden_size
    if config.router == "random":
        return ()
    return ((h, outputs),) if config.router == "linear" else ((h, 2 * h), (2 * h, outputs))
