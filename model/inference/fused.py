"""Decoder layers in few launches, for pools with block tables: joined products, and what lies between them compiled.

A decoding step on a GPU is as long as its launches are many, unless they are replayed as a graph. A layer takes ten:
two norms, four products of which two add their result to the states, the rotary embedding of queries, that of keys with
what the pool keeps, attention, and the activation.

Shapes: N tokens of a call, D hidden size, I inputs and O outputs of a projection, H query heads, G key/value heads, Dh
head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.inference.packed import Norm, rotate
from model.inference.paged import PagedPlan
from model.inference.pool import CallPlan
from model.relaxation import RelaxedLinear

if TYPE_CHECKING:
    from model.layers import DecoderLayer


def fits(layer: DecoderLayer) -> bool:
    """Whether its recursions use the same matrices."""
    return not any(isinstance(module, RelaxedLinear) for module in layer.modules())


class FusedLayer:
    """One unique layer, for packed tokens whose keys and values lie in a pool with block tables.

    Weights are joined in a copy: the model itself stays as it is, and changes made to it later are not seen.
    """

    def __init__(self, layer: DecoderLayer):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.activation = attention.head_dim, mlp.activation
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.before, self.between = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.query_key_value = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.output, self.down = _joined(attention.o_proj), _joined(mlp.down_proj)
        self.take = taken(attention.q_proj.weight.device)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, recursion: int, plan: CallPlan, depth: int) -> Tensor:
        """x: [N, D], which is written over. See `model.inference.packed.PackedLayer`."""
        assert isinstance(plan, PagedPlan)
        weight, bias = self.query_key_value
        places = plan.places(depth) if plan.writers(depth, len(x)) else []
        if not places:
            rows = self.heads * self.head_dim
            weight, bias = weight[:rows], None if bias is None else bias[:rows]
        projected = F.linear(self._normed(self.before, x, recursion), weight, bias).unflatten(-1, (-1, self.head_dim))
        for held, slots in places:
            count = len(slots)
            self.take(keep)(projected[:count], cos[:count], sin[:count], self.heads, held, slots)
        query = self.take(rotate)(projected[:, : self.heads], cos, sin)
        x_reading = x[: plan.reading]  # the others give keys alone, and keep their states
        _add(x_reading, plan.read(query[: plan.reading], depth).flatten(1), *self.output)
        inner = F.linear(self._normed(self.between, x_reading, recursion), *self.gate_up)
        _add(x_reading, self.take(activated)(inner, self.activation), *self.down)
        return x

    def _normed(self, norm: Norm, x: Tensor, recursion: int) -> Tensor:
        weights = norm.weights
        return self.take(normed)(x, weights[recursion] if len(weights) > 1 else weights[0], norm.eps)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm as `model.inference.packed.Norm` has it."""
    return weight * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


def keep(projected: Tensor, cos: Tensor, sin: Tensor, heads: int, held: Tensor, slots: Tensor) -> None:
    """Put keys, after their rotary embedding, and values where they belong. projected: [N, H + 2G, Dh], queries first;
    held: [slots, 2, G, Dh]; slots: [N]."""
    key, value = projected[:, heads:].chunk(2, 1)
    held.index_copy_(0, slots, torch.stack([rotate(key, cos, sin), value], 1))


def activated(inner: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """inner: [N, 2I], gates first -> [N, I]."""
    gate, up = inner.chunk(2, -1)
    return activation(gate) * up


def taken(device: torch.device) -> Callable[[Any], Any]:
    """What makes of a function the one that runs on a device: compiled for GPUs, where that can be."""
    if device.type != "cuda":
        return lambda function: function
    from model.attention.flex import can_compile  # brings the compiler along

    return _compiled if can_compile() else lambda function: function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        # A kernel for one token, and one for any number, of every call that the step of slots makes.
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(*arguments)

    return call


def _joined(*projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One matrix [sum of O, I] and one bias."""
    weights = [projection.weight.detach() for projection in projections]
    biases = [projection.bias.detach() for projection in projections if projection.bias is not None]
    return weights[0] if len(weights) == 1 else torch.cat(weights), torch.cat(biases) if biases else None


def _add(x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x += inner @ weight.T + bias, in place: [N, O] += [N, I]."""
    x.addmm_(inner, weight.T)
    if bias is not None:
        x += bias
