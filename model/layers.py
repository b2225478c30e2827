"""Building blocks: which tokens are computed, the attention layer, SwiGLU, the decoder layer, the output head.

Shapes: B batch, T positions of a row, K slots of a row, N tokens packed over the batch, S key positions,
D hidden size, H query heads, Hkv key/value heads, Dh head dimension, V vocabulary, R recursions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from .attention import Seen, attend
from .attention.base import as_list, as_rows
from .config import MoRConfig
from .hardware import chunk_rows
from .relaxation import make_projection, project, project_all, project_joined

KeyValue = tuple[Tensor, Tensor]


@dataclass
class Tokens:
    """The tokens that a stretch of layers computes, and how their hidden states lie in memory.

    index: [B, K] the position of each slot, ascending, unused slots last; None: slot and position are the same (K = T).
    used: [B, K] bool; None: every slot is used.
    packed: [N] flat slot b * K + k of each token, where hidden states are held as [N, D] without unused slots;
        None: hidden states are [B, K, D].
    flat: [N] b * T + t of each token, where hidden states are held as [N, D] and attention takes them as one list; the
        last of them may be not `alive` [N] and stand for no token. index, used and packed are None then.
    cos, sin: [B or 1, K, Dh], or [N, Dh] when packed or flat; rotary tables at the tokens' original positions.
    seen: who sees whom, in the form of the backend that computes attention; of a row by itself, plain causal.
    """

    cos: Tensor
    sin: Tensor
    index: Tensor | None = None
    used: Tensor | None = None
    packed: Tensor | None = None
    flat: Tensor | None = None
    alive: Tensor | None = None
    seen: Seen = field(default_factory=lambda: Seen("sdpa"))

    def to_slots(self, x: Tensor) -> Tensor:
        """[N, ...] or [B, K, ...] -> [B, K, ...]; unused slots of a packed batch are zero. A list is one row."""
        if self.flat is not None:
            return x[None]
        if self.packed is None:
            return x
        assert self.index is not None
        batch, slots = self.index.shape
        # index_put, since the gradient of index_copy keeps x.
        padded = x.new_zeros(batch * slots, *x.shape[1:]).index_put((self.packed,), x)
        return padded.view(batch, slots, *x.shape[1:])

    def from_slots(self, x: Tensor) -> Tensor:
        """[B, K, ...] -> [N, ...] or [B, K, ...]; the inverse of `to_slots`."""
        if self.flat is not None:
            return x[0]
        return x if self.packed is None else x.flatten(0, 1).index_select(0, self.packed)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x: [B, C, ...], index: [B, K] -> [B, K, ...]."""
    trailing = x.shape[2:]
    return x.gather(1, index.view(*index.shape, *[1] * len(trailing)).expand(-1, -1, *trailing))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries may be fewer than keys."""

    def __init__(self, config: MoRConfig, shared: bool):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        hidden, bias = config.hidden_size, config.attention_bias
        heads = config.num_attention_heads * self.head_dim
        kv_heads = (config.num_key_value_heads or config.num_attention_heads) * self.head_dim
        self.q_proj = make_projection(config, "q_proj", hidden, heads, bias, shared)
        self.k_proj = make_projection(config, "k_proj", hidden, kv_heads, bias, shared)
        self.v_proj = make_projection(config, "v_proj", hidden, kv_heads, bias, shared)
        self.o_proj = make_projection(config, "o_proj", heads, hidden, bias, shared)

    def forward(
        self,
        x: Tensor,
        tokens: Tokens,
        recursion: int,
        shared_kv: KeyValue | None,
        around: Tensor | None,
        everyone: Tokens | None,
        keys: str,
        keep: bool,
        cache=None,
        depth: int = 0,
    ) -> tuple[Tensor, KeyValue | None]:
        """x: [B, K, D] or [N, D] -> the same shape, and with `keep` the keys and values [B, Hkv, S, Dh] attended to.

        shared_kv: keys and values of an earlier use. With `keys` "none" they replace this one's own; otherwise the
        tokens at hand replace theirs, for this use only. around: [B, T, D], with `everyone` their `Tokens`: where
        given, keys and values are made of these, the states of every token.
        cache: of generation (`model.cache.MoRCache`); depth: the effective depth of this use.
        """
        if cache is not None:
            return self._cached(x, tokens, recursion, around, everyone, cache, depth)
        if shared_kv is not None and keys == "none":
            (query,), (key, value) = self._heads(x, tokens, recursion, 1, self.q_proj), shared_kv
        elif around is not None and everyone is not None:
            (query,) = self._heads(x, tokens, recursion, 1, self.q_proj)
            key, value = (y.transpose(1, 2) for y in self._key_value(around, everyone, recursion))
        else:
            query, key, value = self._heads(x, tokens, recursion, 2, self.q_proj, self.k_proj, self.v_proj)
            key, value = (tokens.to_slots(y).transpose(1, 2) for y in (key, value))
            if shared_kv is not None:
                key, value = _replace(shared_kv[0], key, tokens), _replace(shared_kv[1], value, tokens)
        query = tokens.to_slots(query).transpose(1, 2)
        mixed = attend(query, key, value, tokens.seen, self.config, self.training)
        mixed = tokens.from_slots(mixed.transpose(1, 2).flatten(2))
        # Whatever a compiled layer gives back, used or not, has a gradient made of zeros.
        return project(self.o_proj, mixed, recursion), (key, value) if keep else None

    def _cached(
        self, x: Tensor, tokens: Tokens, recursion: int, around: Tensor | None, everyone: Tokens | None, cache, depth
    ) -> tuple[Tensor, None]:
        """As `forward`, with keys and values that `cache` stores, finds and shares among recursions."""
        (query,) = self._heads(x, tokens, recursion, 1, self.q_proj)
        key = value = None
        if cache.writes(depth):
            made_of, of = (x, tokens) if around is None or everyone is None else (around, everyone)
            key, value = self._key_value(made_of, of, recursion)
        mixed = cache.attend(query, key, value, tokens, depth).flatten(-2)
        return project(self.o_proj, mixed, recursion), None

    def _key_value(self, x: Tensor, tokens: Tokens, recursion: int) -> KeyValue:
        """Keys and values of the tokens x: [B, K, D] or [N, D] -> [..., Hkv, Dh]."""
        key, value = self._heads(x, tokens, recursion, 1, self.k_proj, self.v_proj)
        return key, value

    def _heads(self, x: Tensor, tokens: Tokens, recursion: int, rotated: int, *projections: nn.Linear) -> list[Tensor]:
        """Heads [..., H, Dh] of each projection of x, rotated to the tokens' positions in the first `rotated` of them.

        On a GPU parts of one tensor, so that a single kernel makes them, and another the gradient of their product.
        """
        if x.is_cuda and len(projections) > 1:
            whole = project_joined(projections, x, recursion).unflatten(-1, (-1, self.head_dim))
            counts = tuple(projection.out_features // self.head_dim for projection in projections)
            return list(_Rotated.apply(whole, tokens.cos, tokens.sin, counts, rotated))
        heads = [y.unflatten(-1, (-1, self.head_dim)) for y in project_all(projections, x, recursion)]
        return [_rotate(y, tokens.cos, tokens.sin) for y in heads[:rotated]] + heads[rotated:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, computed in the tables' precision, given in that of x: [..., H, Dh]; cos, sin: [..., Dh]."""
    return (x * cos.unsqueeze(-2) + rotate_half(x) * sin.unsqueeze(-2)).to(x.dtype)


class _Rotated(torch.autograd.Function):
    """Heads [..., H, Dh] of several projections, the first `rotated` of which are rotated, as parts of one tensor.

    Its own gradient: torch's would go through each part and half of a head by itself.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, counts: tuple[int, ...], rotated: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.heads = sum(counts[:rotated])
        y = torch.where(_head_numbers(x) < ctx.heads, _rotate(x, cos, sin), x)
        return tuple(y[..., sum(counts[:i]) : sum(counts[: i + 1]), :] for i in range(len(counts)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = torch.cat(grads, -2)
        back = _rotate(grad, cos, -sin.roll(sin.shape[-1] // 2, -1))
        # The other way round than above: what both passes need the compiler would keep, and make by itself.
        return torch.where(_head_numbers(grad) >= ctx.heads, grad, back), None, None, None, None


def _head_numbers(x: Tensor) -> Tensor:
    """[H, 1] of x [..., H, Dh]."""
    return torch.arange(x.shape[-2], device=x.device)[:, None]


def _replace(shared: Tensor, own: Tensor, tokens: Tokens) -> Tensor:
    """Put the tokens' own keys or values [B, Hkv, K, Dh] at their positions into the shared ones [B, Hkv, T, Dh]."""
    if tokens.flat is not None and tokens.alive is not None:
        everyone, mine = as_list(shared), as_list(own)
        mine = torch.where(tokens.alive[:, None, None], mine, everyone.index_select(0, tokens.flat))
        return as_rows(everyone.index_put((tokens.flat,), mine), shared.shape[0])
    if tokens.index is None:
        return own
    index = tokens.index[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
    if tokens.used is not None:
        # Unused slots may repeat a position that a used slot writes: send them to one extra row, which is cut off.
        length = shared.shape[2]
        index = torch.where(tokens.used[:, None, :, None], index, length)
        return F.pad(shared, (0, 0, 0, 1)).scatter(2, index, own)[:, :, :length]
    return shared.scatter(2, index, own)


class SwiGLU(nn.Module):
    """Feed-forward layer down(act(gate(x)) * up(x))."""

    def __init__(self, config: MoRConfig, shared: bool):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = make_projection(config, "gate_proj", hidden, inner, bias, shared)
        self.up_proj = make_projection(config, "up_proj", hidden, inner, bias, shared)
        self.down_proj = make_projection(config, "down_proj", inner, hidden, bias, shared)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, recursion: int) -> Tensor:
        gate, up = project_all((self.gate_proj, self.up_proj), x, recursion)
        return project(self.down_proj, self.activation(gate) * up, recursion)


class DecoderLayer(GradientCheckpointingLayer):
    """One unique layer: pre-norm attention and feed-forward, registered once and applied at each depth that shares it.

    With `share_norms=False` a shared layer owns one pair of norms per recursion. What carries gradients goes in by
    position and comes out flat, as transformers' checkpointing of layers asks.
    """

    def __init__(self, config: MoRConfig, shared: bool):
        super().__init__()
        self.self_attn = Attention(config, shared)
        self.mlp = SwiGLU(config, shared)
        repeats = config.num_recursions if shared and not config.share_norms else 0
        self.input_layernorm = _make_norm(config, repeats)
        self.post_attention_layernorm = _make_norm(config, repeats)

    def forward(
        self,
        x: Tensor,
        shared_key: Tensor | None = None,
        shared_value: Tensor | None = None,
        around: Tensor | None = None,
        *,
        tokens: Tokens,
        everyone: Tokens | None = None,
        keys: str = "everyone",
        keep: bool = False,
        recursion: int = 0,
        cache=None,
        depth: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x: [B, K, D] or [N, D] -> two of the same shape, whose sum is the result, and with `keep` the keys and values
        that were attended to (None with a cache). The other arguments are those of `Attention.forward`.

        The sum is the caller's: what a compiled layer gives back is kept for its backward pass as it is, where it would
        add the residual up again from two tensors, for each of the two norms.
        """
        shared_kv = None if shared_key is None or shared_value is None else (shared_key, shared_value)
        around = None if around is None else _norm(self.input_layernorm, around, recursion)
        normed = _norm(self.input_layernorm, x, recursion)
        mixed, kv = self.self_attn(normed, tokens, recursion, shared_kv, around, everyone, keys, keep, cache, depth)
        x = x + mixed
        key, value = (None, None) if kv is None else kv
        return x, self.mlp(_norm(self.post_attention_layernorm, x, recursion), recursion), key, value


if "__call__" in vars(GradientCheckpointingLayer):  # as in transformers 5.17: hooks run again with what they wrap

    def _checkpointed(self, *args, _forward=DecoderLayer.forward, **kwargs):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(_forward, self, **kwargs), *args)
        return _forward(self, *args, **kwargs)

    DecoderLayer.forward = functools.wraps(DecoderLayer.forward)(_checkpointed)  # type: ignore[method-assign]
    DecoderLayer.__call__ = nn.Module.__call__  # type: ignore[method-assign]


class RMSNorm(LlamaRMSNorm):
    """RMS norm in fp32, in the precision of x at its end; autocast rounds its weight to that too, as FSDP2 does."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> the same."""
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def _make_norm(config: MoRConfig, repeats: int) -> nn.Module:
    if not repeats:
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return nn.ModuleList(RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(repeats))


def _norm(norm: nn.Module, x: Tensor, recursion: int) -> Tensor:
    return norm[recursion](x) if isinstance(norm, nn.ModuleList) else norm(x)


class LMHead(nn.Linear):
    """Output head; with targets it returns the summed cross-entropy without ever holding all logits in fp32.

    compiled: whether what stands between its products is compiled, on a GPU.
    """

    compiled = False

    def forward(  # type: ignore[override]
        self, x: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """x: [..., D] -> logits [..., V]; with targets [...] (-100 ignored): fp32 scalar, the summed cross-entropy.

        weights: [N] of each token's term in that sum; only in training.
        """
        if targets is None:
            return super().forward(x)
        x, targets = x.flatten(0, -2), targets.flatten()
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _SummedCrossEntropy.apply(x, weight, targets, weights, self.compiled)
        assert weights is None
        rows = chunk_rows(weight.shape[0], x.device.type)
        chunks = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.stack([cross_entropy_sum(F.linear(part, weight), target) for part, target in chunks]).sum()


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [N, V], targets: [N] (-100 ignored) -> fp32 scalar."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


class _SummedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy chunk by chunk; gradients are made in the forward pass, so nothing is recomputed."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, compiled: bool = False
    ) -> Tensor:
        rows = chunk_rows(weight.shape[0], x.device.type)
        compiled = compiled and x.is_cuda
        change: Callable[..., tuple[Tensor, Tensor]] = _compiled_change() if compiled else _loss_and_change
        losses: list[Tensor] = []
        grad_x: Tensor | None = None
        grad_weight: Tensor | None = None
        scales = targets if weights is None else weights
        chunks = zip(x.split(rows), targets.split(rows), scales.split(rows), strict=True)
        for place, (part, target, scale) in enumerate(chunks):
            loss, grad = change(torch.mm(part, weight.t()), target, None if weights is None else scale)
            losses.append(loss)
            if grad_x is None:  # no sooner than it is needed: the first logits take the most
                grad_x = torch.empty_like(x)
            torch.mm(grad, weight, out=grad_x[place * rows : (place + 1) * rows])
            grad_weight = _add_product(grad_weight, grad, part)
        assert grad_x is not None and grad_weight is not None
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_x * scale.to(grad_x.dtype), grad_weight * scale.to(grad_weight.dtype), None, None, None


def _loss_and_change(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [N, V], target [N] (-100 ignored), weights [N] -> cross-entropies [N] in fp32, and the gradient [N, V] of
    their sum, softmax minus one-hot; in few passes over memory."""
    dtype, logits = logits.dtype, logits.float()
    counted = (target != -100).unsqueeze(-1)
    if weights is not None:
        counted = counted * weights.unsqueeze(-1)
    label = target.clamp(min=0).unsqueeze(-1)
    # In place from here: the logits become exp(logits - max), then the gradient.
    logits -= logits.amax(-1, keepdim=True)
    label_logit = logits.gather(-1, label)
    norm = logits.exp_().sum(-1, keepdim=True)
    loss = ((norm.log() - label_logit) * counted).squeeze(-1)
    logits.mul_(counted / norm)
    logits.scatter_add_(-1, label, -counted.to(logits.dtype))
    return loss, logits.to(dtype)


def _loss_and_change_to_compile(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`_loss_and_change` as a compiler makes one kernel of it: nothing in place, no scatter, no gather."""
    wide, counted, label = logits.float(), (target != -100).unsqueeze(-1), target.clamp(min=0).unsqueeze(-1)
    if weights is not None:
        counted = counted * weights.unsqueeze(-1)
    log_norm = wide.logsumexp(-1, keepdim=True)
    hit = torch.arange(wide.shape[-1], device=wide.device) == label
    loss = (log_norm - torch.where(hit, wide, 0.0).sum(-1, keepdim=True)) * counted
    return loss.squeeze(-1), (((wide - log_norm).exp() - hit.to(wide.dtype)) * counted).to(logits.dtype)


@functools.cache
def _compiled_change() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_change_to_compile)


def _add_product(total: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """total, in place, + grad' x in fp32, grad: [N, V], x: [N, D] -> [V, D]; on a GPU the product itself adds up so."""
    if grad.is_cuda and grad.dtype != torch.float32:
        if total is None:
            return torch.mm(grad.t(), x, out_dtype=torch.float32)
        return torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    if total is None:
        total = torch.zeros(grad.shape[1], x.shape[1], dtype=torch.float32, device=grad.device)
    total += grad.T @ x
    return total
