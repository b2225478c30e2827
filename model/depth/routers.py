"""What scores tokens: routers with their settings, gates, and losses on scores.

Shapes: B batch, T positions, D hidden size.
Scores are fp32 whatever the model's precision: in bf16, alpha * sigmoid(s) takes a handful of values, and ties decide.
Equal states score equal, bit for bit, wherever they stand, so that ties go to the earlier token: a matrix kernel adds
the products of a row in an order that depends on the row's place in the matrix, so scores are sums that no order
changes (`exact_linear`, `elementwise`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Router(nn.Module):
    """Scores tokens in fp32: linear D -> outputs, or `mlp` / `wide_mlp` D -> 2D -> GELU -> outputs, without biases.

    compiled: whether its products are compiled, on a GPU.
    """

    compiled = False

    def __init__(self, config: MoRConfig, outputs: int, tempered: bool = True):
        super().__init__()
        wide = config.router in ("mlp", "wide_mlp")
        inner = 2 * config.hidden_size if wide else config.hidden_size
        self.temperature = config.router_temperature if tempered else 1.0
        self.hidden_weight = nn.Parameter(torch.empty(inner, config.hidden_size)) if wide else None
        self.weight = nn.Parameter(torch.empty(outputs, inner))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> fp32 logits [..., outputs]. Under autocast the weights are rounded as FSDP2 rounds them."""
        kind = x.device.type
        weight: Tensor = self.weight
        hidden_weight: Tensor | None = self.hidden_weight
        if torch.is_autocast_enabled(kind):
            weight = weight.to(torch.get_autocast_dtype(kind))
            hidden_weight = None if hidden_weight is None else hidden_weight.to(weight.dtype)
        with torch.autocast(kind, enabled=False):
            product = compiled_exact_linear() if self.compiled and x.is_cuda else exact_linear
            if self.temperature != 1.0:
                x = x.float() / self.temperature
            if hidden_weight is not None:
                x = elementwise(F.gelu, product(x, hidden_weight))
            return product(x, weight)


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight' in fp32, [..., I] and [O, I] -> [..., O]; a row's result depends on that row and the weight alone.

    Rows of both factors are rounded to integers of b bits (times a power of two of the row's own), so that every
    partial sum of their products is an integer below 2^53: fp64 adds those without rounding, in whatever order a
    kernel chooses. b = floor((53 - log2 I) / 2), 21 for I = 960: entries keep 2^-22 of the row's largest. The product
    is one matrix product, counted as such; gradients are those of the plain fp32 product.
    """
    return _ExactLinear.apply(x.float(), weight.float())  # type: ignore[no-any-return]


@functools.cache
def compiled_exact_linear() -> Callable[[Tensor, Tensor], Tensor]:
    """The same as few kernels, for a GPU."""
    return torch.compile(exact_linear)


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        bits = (53 - (x.shape[-1] - 1).bit_length()) // 2
        (rows, unit), (columns, weight_unit) = _integers(x.flatten(0, -2), bits), _integers(weight, bits)
        y = (rows[:, None] * columns).sum(-1) if _adds_up(weight) else rows @ columns.T
        y = y * (unit * weight_unit.T)
        return y.float().unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            rows, states = grad.flatten(0, -2), x.flatten(0, -2)
            grad_x = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_x = (rows[..., None] * weight).sum(1) if _adds_up(weight) else rows @ weight
                grad_x = grad_x.view(x.shape)
            if ctx.needs_input_grad[1]:
                few = _adds_up(weight)
                grad_weight = (rows[..., None] * states[:, None]).sum(0) if few else rows.T @ states
        return grad_x, grad_weight


def _adds_up(weight: Tensor) -> bool:
    """Whether a product by weight' [O, I] is written as a sum: a compiler makes one kernel of that and its operands,
    which for a few outputs is less to read and write than what a product takes."""
    return torch.compiler.is_compiling() and weight.shape[0] <= 4


def _integers(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """fp32 x [N, I] as integers of up to `bits` bits, in fp64, and the power of two [N, 1] that they are counted in."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    exponent = largest.view(torch.int32) >> 23
    power = (exponent << 23).view(torch.float32)  # without its mantissa: power <= largest
    # Scaling by a power of two is exact, and fp32 holds every integer of so few bits. The scale is put together from
    # its exponent: a compiled division need not be exact.
    scale = ((253 + bits - exponent) << 23).view(torch.float32)  # 2 ** (bits - 1) / power
    return (x * scale).round().double(), power.double() * 2.0 ** (1 - bits)


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every entry, the same for equal entries wherever they stand.

    torch's CPU kernels take whole vectors of a dense tensor and its last entries one by one, by functions that differ
    in the last bit. Entries that do not lie side by side are all taken one by one. GPU kernels have one function.
    """
    if x.device.type != "cpu":
        return function(x)
    return function(torch.stack([x, x], -1)[..., 0])


def random_logits(input_ids: Tensor | None, positions: Tensor, recursion: int, outputs: int) -> Tensor:
    """Logits of the control without a router: uniform numbers' logits, [B, T, outputs].

    A hash of token, position and recursion stands for the dice, so that the choice sees nothing of the text around, is
    the same when a block is recomputed, and does not depend on padding, batch or later tokens.
    """
    seed = positions * 2654435761 + (recursion + 1) * 40503
    if input_ids is not None:
        seed = seed + (input_ids + 1) * 2246822519
    state = (seed[..., None] + torch.arange(1, outputs + 1, device=seed.device) * 3266489917) & 0x7FFFFFFF
    for _ in range(2):
        state = ((state ^ (state >> 15)) * 739982445) & 0x7FFFFFFF
    uniform = (state.double() + 0.5) / 2**31
    return elementwise(torch.logit, uniform).float()


def gate_of(logits: Tensor, activation: str, alpha: float) -> Tensor:
    """Expert-choice gate g = alpha * act(s) (eq. 2.1); with activation `none` the score itself is the gate."""
    if activation == "sigmoid":
        return alpha * torch.sigmoid(logits)
    if activation == "tanh":
        return alpha * torch.tanh(logits)
    return logits


def z_loss(logits: Tensor, used: Tensor | None) -> Tensor:
    """Mean of logsumexp(s)^2 over tokens. logits: [..., outputs]."""
    return masked_mean(torch.logsumexp(logits, -1).square(), used)


def masked_mean(x: Tensor, used: Tensor | None) -> Tensor:
    """Mean of x over the entries where `used` is True (all of them if None)."""
    return x.mean() if used is None else torch.where(used, x, 0.0).sum() / used.sum().clamp(min=1)
