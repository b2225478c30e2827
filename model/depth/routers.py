"""What scores tokens, and its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .base import Setting

if TYPE_CHECKING:
    from ..config import MoRConfig

ROUTER = {
    "router": Setting(
        "linear",
        Literal["linear", "mlp", "wide_mlp", "random"],
        "linear, mlp and wide_mlp score a token from its hidden state; random is the control without one",
    ),
    "router_activation": Setting(
        None,
        Literal["sigmoid", "tanh", "softmax", "none"] | None,
        "sigmoid, tanh or none for expert_choice; softmax or sigmoid for token_choice; sigmoid or none (the raw score) "
        "for mixture_of_depths",
    ),
    "router_alpha": Setting(None, float | None, "scale of the gate; null takes 0.1 for expert_choice, else 1.0"),
    "router_temperature": Setting(
        1.0, float, "divides the router's input, which for a linear router is to divide its logits"
    ),
    "z_loss_coefficient": Setting(0.0, float, "weight of the router z-loss; 0 leaves it out"),
}
GATING = {
    "gating": Setting(
        "weighted",
        Literal["weighted", "additive"],
        "weighted: the gate multiplies what is added to the residual stream; additive: it is added as it is",
    )
}


def check_router(config: MoRConfig, activations: tuple[str, ...]) -> None:
    """Raise ValueError where the router's settings do not fit. activations: those that the method can use."""
    if config.router_activation not in activations:
        raise ValueError(
            f"router_activation: {config.router_activation!r} does not fit routing {config.routing!r}; "
            f"use one of {', '.join(map(repr, activations))}"
        )
    if config.router_temperature <= 0:
        raise ValueError(f"router_temperature: must be above 0, got {config.router_temperature}; use 1.0")


def router_shapes(config: MoRConfig, outputs: int) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the matrices of one router; empty where none is learned."""
    h = config.hidden_size
    if config.router == "random":
        return ()
    return ((h, outputs),) if config.router == "linear" else ((h, 2 * h), (2 * h, outputs))
