"""Relaxation of weight sharing: per-depth low-rank deltas (LoRA, DoRA) on shared projections.

Shapes: R recursions that use the layer, r rank, I input features, O output features.
The delta of recursion d is scaling * B[d] @ A[d], with scaling = lora_alpha / lora_rank (arXiv 2410.20672, section 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoRConfig


class RelaxedLinear(nn.Linear):
    """A shared projection with one low-rank delta per recursion, and with DoRA one magnitude per output and recursion.

    Parameters: `weight` [O, I] shared, `lora_A` [R, r, I], `lora_B` [R, O, r], and with DoRA `lora_magnitude` [R, O].
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, config: MoRConfig):
        super().__init__(in_features, out_features, bias=bias)
        repeats, rank = config.num_recursions, min(config.lora_rank, in_features, out_features)
        self.scaling = config.lora_alpha / config.lora_rank
        self.dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(repeats, rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(repeats, out_features, rank))
        self.lora_magnitude = nn.Parameter(torch.empty(repeats, out_features)) if config.relaxation == "dora" else None

    def forward(self, x: Tensor, recursion: int) -> Tensor:  # type: ignore[override]
        """x: [..., I], recursion: 0-based. Returns [..., O]."""
        A, B = self.lora_A[recursion], self.lora_B[recursion]
        if self.lora_magnitude is None:
            return F.linear(x, self.weight, self.bias) + F.linear(F.linear(self.dropout(x), A), B) * self.scaling
        return self._dora(x, A, B, self.lora_magnitude[recursion])

    def _dora(self, x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        """DoRA (arXiv 2402.09353, eq. 5 and section 4.3): direction of W + delta, own magnitude, norm held constant."""
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.weight + self.scaling * (B @ A), dim=1)
        scale = magnitude / norm.to(magnitude.dtype)
        dropped = self.dropout(x)
        low_rank = F.linear(F.linear(dropped, A), B) * self.scaling
        plain = F.linear(x, self.weight)
        if self.training and self.dropout.p > 0.0:
            # Dropout touches what the delta adds, not the shared weight's own output.
            y = plain + (scale - 1) * F.linear(dropped, self.weight) + scale * low_rank
        else:
            y = scale * (plain + low_rank)
        # The magnitudes are fp32: under autocast they would make wider outputs than a plain projection's.
        return (y if self.bias is None else y + self.bias).to(plain.dtype)

    @torch.no_grad()
    def effective_weight(self, recursion: int) -> Tensor:
        """[O, I]: the weight of a plain projection that gives, without dropout, what this one gives at a recursion."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        A, B = self.lora_A[recursion].to(dtype), self.lora_B[recursion].to(dtype)
        weight = self.weight.to(dtype) + self.scaling * (B @ A)
        if self.lora_magnitude is not None:
            norm = torch.linalg.vector_norm(weight, dim=1)
            weight = weight * (self.lora_magnitude[recursion].to(dtype) / norm)[:, None]
        return weight.to(self.weight.dtype)

    @torch.no_grad()
    def reset_delta(self) -> None:
        """Start from the shared weight alone: A random, B zero, magnitude the norm of the weight's rows."""
        nn.init.kaiming_uniform_(self.lora_A.view(-1, self.in_features), a=5**0.5)
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(torch.linalg.vector_norm(self.weight, dim=1).expand_as(self.lora_magnitude))

    @torch.no_grad()
    def fit_delta(self, recursion: int, target: Tensor) -> None:
        """Set A and B of one recursion: the effective weight comes as near to `target` [O, I] as the rank allows.

        Truncated SVD of target - weight (arXiv 2410.20672, section 3.3), divided by the scaling that forward applies.
        """
        difference = (target - self.weight).float() / self.scaling
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        rank = self.lora_A.shape[1]
        self.lora_A[recursion].copy_(vh[:rank])
        self.lora_B[recursion].copy_(u[:, :rank] * s[:rank])
        if self.lora_magnitude is not None:
            effective = self.weight + self.scaling * (self.lora_B[recursion] @ self.lora_A[recursion])
            self.lora_magnitude[recursion].copy_(torch.linalg.vector_norm(effective, dim=1))


def make_projection(
    config: MoRConfig, name: str, in_features: int, out_features: int, bias: bool, shared: bool
) -> nn.Linear:
    """A projection of one layer, relaxed if its layer is shared and the configuration names it."""
    if shared and config.relaxation in ("lora", "dora") and name in config.lora_targets:
        return RelaxedLinear(in_features, out_features, bias, config)
    return nn.Linear(in_features, out_features, bias=bias)


def project_all(projections: tuple[nn.Linear, ...], x: Tensor, recursion: int) -> list[Tensor]:
    """Apply projections of one input, [..., I] -> [..., O] each.

    On a GPU as one product of their weights side by side, unless one of them is more than a weight (a delta, an
    adapter, ZeRO-3's gathering); parameters stay as they are.
    """
    if x.is_cuda and go_together(projections):
        return list(project_together(projections, x).split([projection.out_features for projection in projections], -1))
    return [project(projection, x, recursion) for projection in projections]


def project_joined(projections: tuple[nn.Linear, ...], x: Tensor, recursion: int) -> Tensor:
    """`project_all` as one tensor [..., all of O]."""
    if go_together(projections):
        return project_together(projections, x)
    return torch.cat([project(projection, x, recursion) for projection in projections], -1)


def go_together(projections: tuple[nn.Linear, ...]) -> bool:
    """Whether there are several, each a weight and nothing else, all with a bias or none."""
    if len(projections) == 1:
        return False
    plain = all(type(p) is nn.Linear and not p._forward_pre_hooks and not p._forward_hooks for p in projections)
    return plain and len({projection.bias is None for projection in projections}) == 1


def project_together(projections: tuple[nn.Linear, ...], x: Tensor) -> Tensor:
    """One product in place of several, [..., all of O]."""
    weights: list[Tensor] = [projection.weight for projection in projections]
    biases: list[Tensor] = [projection.bias for projection in projections if projection.bias is not None]
    return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)


def project(projection: nn.Linear, x: Tensor, recursion: int) -> Tensor:
    """Apply a projection at a recursion. x: [..., I] -> [..., O]."""
    return projection(x, recursion) if isinstance(projection, RelaxedLinear) else projection(x)
