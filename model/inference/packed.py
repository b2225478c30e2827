"""Decoder layers as the engine applies them: projections of one input side by side, in the CPU's packed form.

A decoding step multiplies few rows by every weight, so its time is that of reading the weights. torch's plain product
brings them into its kernel's order at each call; here that is done once. Packed weights are a copy: the model itself
stays as it is, and changes made to it later are not seen.

Shapes: N tokens of a call, D hidden size, I inputs and O outputs of a projection, H query heads, G key/value heads, Dh
head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import hardware
from model.relaxation import RelaxedLinear, project

if TYPE_CHECKING:
    from model.layers import DecoderLayer

PACKED_ROWS = 32  # the batch that the packed order is chosen for; any other works
FEW_ROWS = 4  # fp32: below this many rows the plain product reads the weights faster


class Product:
    """Projections of one input as one product: [N, I] -> [N, sum of their O].

    Packed on a CPU in fp32, and in bf16 where it has the instructions; elsewhere, and where recursions have deltas of
    their own, one after the other.
    """

    def __init__(self, *projections: nn.Linear):
        self.projections = projections
        first = projections[0].weight
        self.packed, self.bias = None, None
        if hardware.packs(first.dtype, first.device) and not any(
            isinstance(projection, RelaxedLinear) for projection in projections
        ):
            weight = torch.cat([projection.weight.detach() for projection in projections])
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
            biases = [projection.bias.detach() for projection in projections if projection.bias is not None]
            self.bias = torch.cat(biases) if biases else None
            self.fewest = FEW_ROWS if first.dtype == torch.float32 else 1

    def __call__(self, x: Tensor, recursion: int = 0) -> Tensor:
        """x: [N, I]; recursion: 0-based."""
        if self.packed is not None and len(x) >= self.fewest:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        parts = [project(projection, x, recursion) for projection in self.projections]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Norm:
    """The model's RMS norm, of each recursion its own if it has several, in two operations: statistics in fp32."""

    def __init__(self, norm: nn.Module):
        norms: list[Any] = list(norm) if isinstance(norm, nn.ModuleList) else [norm]
        self.weights: list[Tensor] = [one.weight.detach() for one in norms]
        self.eps: float = norms[0].variance_epsilon

    def __call__(self, x: Tensor, recursion: int = 0) -> Tensor:
        """x: [N, D] -> [N, D]."""
        weight = self.weights[recursion] if len(self.weights) > 1 else self.weights[0]
        return weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class PackedLayer:
    """One unique layer, for packed tokens whose keys and values lie in the pool.

    shares: whether some of its uses read keys and need none of their own; the matrices of keys then stand apart.
    """

    def __init__(self, layer: DecoderLayer, shares: bool = False):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.activation = attention.head_dim, mlp.activation
        self.before, self.between = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.heads = attention.q_proj.out_features // attention.head_dim
        keys = (attention.k_proj, attention.v_proj)
        self.query = Product(attention.q_proj) if shares else Product(attention.q_proj, *keys)
        self.keys = Product(*keys) if shares else None
        self.output, self.down = Product(attention.o_proj), Product(mlp.down_proj)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, recursion: int, plan, depth: int) -> Tensor:
        """x: [N, D] -> [N, D]. cos, sin: [N, 1, Dh], see `rotary`; plan: `model.inference.pool.CallPlan`."""
        query, key, value = self._heads(self.before(x, recursion), cos, sin, recursion, plan, depth)
        reading = plan.reading
        kept = x[reading:]  # these give keys alone, and keep their states
        x = x[:reading] + self.output(plan.attend(query[:reading], key, value, depth).flatten(1), recursion)
        inner = self.gate_up(self.between(x, recursion), recursion)
        gate, up = inner.chunk(2, -1)
        x = x + self.down(self.activation(gate) * up, recursion)
        return torch.cat([x, kept]) if len(kept) else x

    def _heads(self, x: Tensor, cos: Tensor, sin: Tensor, recursion: int, plan, depth: int):
        """Queries [N, H, Dh] of all tokens, keys and values [`plan.writers`, G, Dh] of the leading ones, or None."""
        count = plan.writers(depth, len(x))
        projected = self.query(x, recursion).unflatten(-1, (-1, self.head_dim))
        if self.keys is not None:
            query = rotate(projected, cos, sin)
            if not count:
                return query, None, None
            key, value = self.keys(x[:count], recursion).unflatten(-1, (-1, self.head_dim)).chunk(2, 1)
            return query, rotate(key, cos[:count], sin[:count]), value
        groups = (projected.shape[1] - self.heads) // 2
        rotated = rotate(projected[:, : self.heads + groups], cos, sin)
        query, key, value = rotated[:, : self.heads], rotated[:, self.heads :], projected[:, self.heads + groups :]
        return query, key[:count], value[:count]


def rotary(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The model's tables [N, Dh] as `PackedLayer` takes them: for all heads, the sine with its first half negated."""
    first, second = sin.chunk(2, -1)
    return cos.unsqueeze(-2), torch.cat([-first, second], -1).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, as `model.layers` has it but for the sign. x: [N, H, Dh]; cos, sin: see `rotary`."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
