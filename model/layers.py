"""Building blocks: which tokens are computed, the attention layer, SwiGLU, the decoder layer, the output head.

Shapes: B batch, T positions of a row, K slots of a row, N tokens packed over the batch, S key positions,
D hidden size, H query heads, Hkv key/value heads, Dh head dimension, V vocabulary, R recursions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from .attention import SPAN, attend, spans_of
from .config import MoRConfig
from .relaxation import make_projection, project

KeyValue = tuple[Tensor, Tensor]


@dataclass
class Tokens:
    """The tokens that a stretch of layers computes, and how their hidden states lie in memory.

    index: [B, K] the position of each slot, ascending, unused slots last; None: slot and position are the same (K = T).
    used: [B, K] bool; None: every slot is used.
    packed: [N] flat slot b * K + k of each token, where hidden states are held as [N, D] without unused slots;
        None: hidden states are [B, K, D].
    cos, sin: [B or 1, K, Dh], or [N, Dh] when packed; rotary tables at the tokens' original positions.
    mask: [B, 1, K, S] bool, True where a query may look; None: causal among the slots.
    spans: of the mask (`attention.spans_of`), on a CPU; None: not known.
    """

    cos: Tensor
    sin: Tensor
    index: Tensor | None = None
    used: Tensor | None = None
    packed: Tensor | None = None
    mask: Tensor | None = None
    spans: Tensor | None = None

    def look_through(self, mask: Tensor | None) -> Tokens:
        """Set the mask, and on a CPU its spans, once for all layers, where it has several."""
        self.mask, self.spans = mask, None
        if mask is None or mask.device.type != "cpu" or mask.shape[2] <= SPAN or torch.compiler.is_compiling():
            return self
        self.spans = spans_of(mask)
        return self

    def to_slots(self, x: Tensor) -> Tensor:
        """[N, ...] or [B, K, ...] -> [B, K, ...]; unused slots of a packed batch are zero."""
        if self.packed is None:
            return x
        assert self.index is not None
        batch, slots = self.index.shape
        # index_put, since the gradient of index_copy keeps x.
        padded = x.new_zeros(batch * slots, *x.shape[1:]).index_put((self.packed,), x)
        return padded.view(batch, slots, *x.shape[1:])

    def from_slots(self, x: Tensor) -> Tensor:
        """[B, K, ...] -> [N, ...] or [B, K, ...]; the inverse of `to_slots`."""
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
        cache=None,
        depth: int = 0,
    ) -> tuple[Tensor, KeyValue | None]:
        """x: [B, K, D] or [N, D] -> the same shape, and the keys and values [B, Hkv, S, Dh] that were attended to.

        shared_kv: keys and values of an earlier use. With `keys` "none" they replace this one's own; otherwise the
        tokens at hand replace theirs, for this use only. around: [B, T, D], with `everyone` their `Tokens`: where
        given, keys and values are made of these, the states of every token.
        cache: of generation (`model.cache.MoRCache`); depth: the effective depth of this use.
        """
        if cache is not None:
            return self._cached(x, tokens, recursion, around, everyone, cache, depth)
        query = self._heads(self.q_proj, x, recursion)
        query = tokens.to_slots(_rotate(query, tokens.cos, tokens.sin)).transpose(1, 2)
        if shared_kv is not None and keys == "none":
            key, value = shared_kv
        elif around is not None and everyone is not None:
            key, value = (y.transpose(1, 2) for y in self._key_value(around, everyone, recursion))
        else:
            key, value = (tokens.to_slots(y).transpose(1, 2) for y in self._key_value(x, tokens, recursion))
            if shared_kv is not None:
                key, value = _replace(shared_kv[0], key, tokens), _replace(shared_kv[1], value, tokens)
        mixed = attend(query, key, value, tokens.mask, self.config, self.training, tokens.spans)
        mixed = tokens.from_slots(mixed.transpose(1, 2).flatten(2))
        return project(self.o_proj, mixed, recursion), (key, value)

    def _cached(
        self, x: Tensor, tokens: Tokens, recursion: int, around: Tensor | None, everyone: Tokens | None, cache, depth
    ) -> tuple[Tensor, None]:
        """As `forward`, with keys and values that `cache` stores, finds and shares among recursions."""
        query = _rotate(self._heads(self.q_proj, x, recursion), tokens.cos, tokens.sin)
        key = value = None
        if cache.writes(depth):
            made_of, of = (x, tokens) if around is None or everyone is None else (around, everyone)
            key, value = self._key_value(made_of, of, recursion)
        mixed = cache.attend(query, key, value, tokens, depth).flatten(-2)
        return project(self.o_proj, mixed, recursion), None

    def _key_value(self, x: Tensor, tokens: Tokens, recursion: int) -> KeyValue:
        """Keys and values of the tokens x: [B, K, D] or [N, D] -> [..., Hkv, Dh]."""
        return _rotate(self._heads(self.k_proj, x, recursion), tokens.cos, tokens.sin), self._heads(
            self.v_proj, x, recursion
        )

    def _heads(self, projection: nn.Linear, x: Tensor, recursion: int) -> Tensor:
        return project(projection, x, recursion).unflatten(-1, (-1, self.head_dim))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, computed in the tables' precision, given in that of x: [..., H, Dh]; cos, sin: [..., Dh]."""
    return (x * cos.unsqueeze(-2) + rotate_half(x) * sin.unsqueeze(-2)).to(x.dtype)


def _replace(shared: Tensor, own: Tensor, tokens: Tokens) -> Tensor:
    """Put the tokens' own keys or values [B, Hkv, K, Dh] at their positions into the shared ones [B, Hkv, T, Dh]."""
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
        gate = self.activation(project(self.gate_proj, x, recursion))
        return project(self.down_proj, gate * project(self.up_proj, x, recursion), recursion)


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
        recursion: int = 0,
        cache=None,
        depth: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x: [B, K, D] or [N, D] -> the same shape, and the keys and values that were attended to (None with a cache).

        The other arguments are those of `Attention.forward`.
        """
        shared_kv = None if shared_key is None or shared_value is None else (shared_key, shared_value)
        around = None if around is None else _norm(self.input_layernorm, around, recursion)
        normed = _norm(self.input_layernorm, x, recursion)
        mixed, kv = self.self_attn(normed, tokens, recursion, shared_kv, around, everyone, keys, cache, depth)
        x = x + mixed
        key, value = (None, None) if kv is None else kv
        return x + self.mlp(_norm(self.post_attention_layernorm, x, recursion), recursion), key, value


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
    """Output head; with targets it returns the summed cross-entropy without ever holding all logits in fp32."""

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
            return _SummedCrossEntropy.apply(x, weight, targets, weights)
        assert weights is None
        rows = chunk_rows(weight.shape[0], x.device)
        chunks = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.stack([cross_entropy_sum(F.linear(part, weight), target) for part, target in chunks]).sum()


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose fp32 logits take about 64 MiB, or 16 on the CPU.

    glibc hands blocks beyond 32 MiB back to the system each time, and fresh pages cost more than the arithmetic.
    """
    return max(64, (2**22 if device.type == "cpu" else 2**24) // vocabulary)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [N, V], targets: [N] (-100 ignored) -> fp32 scalar."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


class _SummedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy chunk by chunk; gradients are made in the forward pass, so nothing is recomputed."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        rows = chunk_rows(weight.shape[0], x.device)
        total = x.new_zeros((), dtype=torch.float32)
        grads_x, grad_weight = [], torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        scales = targets if weights is None else weights
        for part, target, scale in zip(x.split(rows), targets.split(rows), scales.split(rows), strict=True):
            logits = F.linear(part, weight).float()
            counted = (target != -100).unsqueeze(-1)
            if weights is not None:
                counted = counted * scale.unsqueeze(-1)
            label = target.clamp(min=0).unsqueeze(-1)
            # In place from here: the logits become exp(logits - max), then the gradient, softmax minus one-hot.
            logits -= logits.amax(-1, keepdim=True)
            label_logit = logits.gather(-1, label)
            norm = logits.exp_().sum(-1, keepdim=True)
            total = total + ((norm.log() - label_logit) * counted).sum()
            logits.mul_(counted / norm)
            logits.scatter_add_(-1, label, -counted.to(logits.dtype))
            grad = logits.to(weight.dtype)
            grads_x.append(grad @ weight)
            grad_weight += grad.T @ part
        ctx.save_for_backward(torch.cat(grads_x), grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_x * scale.to(grad_x.dtype), grad_weight * scale.to(grad_weight.dtype), None, None
