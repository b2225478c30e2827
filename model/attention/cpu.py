"""Attention on a CPU, whose time follows the pairs that a mask leaves.

Shapes: B batch, H query heads, Hkv key/value heads, K queries of a row, S keys, Dh head dimension.

torch's CPU kernels compute every key that they are given, masked or not, and their bf16 backward pass is slow. So
masked attention goes block by block of queries, each with the keys of its span alone; and where a CPU multiplies bf16
matrices fast (AMX), gradients are made of large products (`_gradients`).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hardware import cpu
from .base import Backend, Call, Seen, rows_like
from .sdpa import sdpa
from .visible import Visible

SPAN = 64  # queries of one span
KERNEL_BLOCK = 3 * SPAN  # queries that torch's kernel takes at once; it is slower below this many
PRODUCT_BLOCK = 2 * SPAN  # queries of one product of `_gradients`
HAS_AMX = cpu().amx_bf16  # a constant, as compiled models need it
PRODUCT_SIZE = 2**21  # most entries of one product, so that it stays in the cache
NAMESPACE = re.sub(r"\W", "_", __name__)  # of the operators; a copy of this file, in a model's folder, has its own

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Block(NamedTuple):
    """Queries `start` to `end`; some of them see keys `low` to `high`, all of them see keys `low` to `clear`."""

    start: int
    end: int
    low: int
    clear: int
    high: int


def spans_of(mask: Tensor) -> Tensor:
    """`low`, `clear`, `high` of every `SPAN` queries, over all rows: [ceil(K / SPAN), 3]. mask: [B, 1, K, S] bool."""
    spans = []
    for part in mask.flatten(0, 1).split(SPAN, 1):
        queries = part.flatten(0, 1)
        seen = queries.any(0).nonzero()
        low, high = int(seen[0]), int(seen[-1]) + 1
        hidden = queries[:, low:high].all(0).logical_not().nonzero()
        spans.append((low, low + int(hidden[0]) if len(hidden) else high, high))
    return torch.tensor(spans)


class CPU(Backend):
    """A mask, and torch's kernels or the operators below."""

    name = "cpu"

    def refuses(self, visible: Visible, call: Call) -> str | None:
        return None if visible.rows.device.type == "cpu" else "it is for CPUs"

    def form(self, visible: Visible) -> Seen:
        mask = visible.mask()
        return Seen(self.name, mask, spans_where_useful(mask))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, dropout: float) -> Tensor:
        key, value = rows_like(key, query), rows_like(value, query)
        mask, spans = seen.mask, seen.spans
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        if dtype == torch.bfloat16 and not dropout and _operators_wanted():
            return _attention(query.to(dtype), key.to(dtype), value.to(dtype), mask, spans)[0]
        if mask is None or spans is None or query.shape[2] <= KERNEL_BLOCK:
            return sdpa(query, key, value, mask, dropout)
        return _sdpa_by_block(query, key, value, mask, spans, dropout)


def spans_where_useful(mask: Tensor | None) -> Tensor | None:
    """`spans_of` a mask that has several; None otherwise, and where a compiler cannot ask for values."""
    if mask is None or mask.shape[2] <= SPAN or torch.compiler.is_compiling():
        return None
    return spans_of(mask)


def _operators_wanted() -> bool:
    """Where they are fast and gradients are needed, unless torch's flash attention is off, as in `measured_flops`."""
    flash = torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()  # dynamo cannot ask
    return HAS_AMX and torch.is_grad_enabled() and flash


@torch.compiler.disable
def _sdpa_by_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, spans: Tensor, dropout: float) -> Tensor:
    parts = []
    for start, end, low, _, high in _blocks(query, key, mask, spans, KERNEL_BLOCK):
        keys, values = key[:, :, low:high], value[:, :, low:high]
        parts.append(sdpa(query[:, :, start:end], keys, values, mask[:, :, start:end, low:high], dropout))
    return torch.cat(parts, 2)


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None, spans: Tensor | None, size: int) -> list[Block]:
    """Queries in blocks of `size`, a multiple of `SPAN`, with the keys of each."""
    count, keys = query.shape[2], key.shape[2]
    ranges = [(start, min(start + size, count)) for start in range(0, count, size)]
    if mask is None:
        return [Block(start, end, 0, *((start, end) if count > 1 else (keys, keys))) for start, end in ranges]
    blocks, listed = [], (spans_of(mask) if spans is None else spans).tolist()
    for start, end in ranges:
        low, clear, high = zip(*listed[start // SPAN : -(-end // SPAN)], strict=True)
        blocks.append(Block(start, end, min(low), min(clear) if min(low) == max(low) else min(low), max(high)))
    return blocks


# bf16 on a CPU --------------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spans: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention without dropout -> output [B, H, K, Dh] and fp32 logarithm of the softmax's denominator [B, H, K]."""
    output, log_sum = _attention_shapes(query, key, value, mask, spans)
    size = query.shape[2] if mask is None else KERNEL_BLOCK
    for start, end, low, clear, high in _blocks(query, key, mask, spans, size):
        hidden = None
        if mask is not None:
            hidden = F.pad(_hidden(mask[:, :, start:end, clear:high], query.dtype), (clear - low, 0))
        output[:, :, start:end], log_sum[:, :, start:end] = _flash(
            query[:, :, start:end],
            key[:, :, low:high],
            value[:, :, low:high],
            is_causal=mask is None and query.shape[2] > 1,
            attn_mask=hidden,
        )
    return output, log_sum


@_attention.register_fake
def _attention_shapes(query, key, value, mask, spans):
    batch, heads, queries, width = query.shape
    output = query.new_empty(batch, queries, heads, width).transpose(1, 2)  # as the output projection takes it
    return output, query.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    spans: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output, [B, H, K, Dh]."""
    batch, heads, queries, _ = query.shape
    grads = _gradient_shapes(grad, query, key, value, output, log_sum, mask, spans)
    delta = (grad.transpose(1, 2).float() * output.transpose(1, 2)).sum(-1).transpose(1, 2)
    blocks = _blocks(query, key, mask, spans, PRODUCT_BLOCK)
    rows = max(1, PRODUCT_SIZE // (heads * min(PRODUCT_BLOCK, queries) * key.shape[2]))
    for first in range(0, batch, rows):
        part = slice(first, first + rows)
        tensors = tuple(x[part] for x in (grad, query, key, value, log_sum, delta))
        _gradients_of_rows(tensors, None if mask is None else mask[part], blocks, tuple(x[part] for x in grads))
    return grads


@_gradients.register_fake
def _gradient_shapes(grad, query, key, value, output, log_sum, mask, spans):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _gradients_of_rows(
    tensors: tuple[Tensor, ...], mask: Tensor | None, blocks: list[Block], results: tuple[Tensor, ...]
) -> None:
    """`_gradients` of some rows, written into `results`.

    tensors: dO, query, key, value, log_sum and delta = sum(dO * O), [B, H, K]. With the softmax P = exp(s - log_sum),
    dV = P' dO and dS = P * (dO V' - delta). Both differences come out of the product itself: its left factor has minus
    the subtrahend in two more columns, the value in bf16 and what that leaves out, and its right factor has ones there.
    Products are keys by queries; heads that share a key stand side by side. Keys are scaled by a power of two, which
    loses no digit of theirs, and what is left of the scale, `rest`, multiplies scores less their log_sum, which are
    small where it counts.
    """
    grad, query, key, value, log_sum, delta = tensors
    (batch, heads, _, width), kv_heads, dtype = query.shape, key.shape[1], query.dtype
    group, scale = heads // kv_heads, width**-0.5
    exact = 2.0 ** math.floor(math.log2(scale))
    rest = scale / exact
    left, left_grad = _widened(query, *_in_two(-log_sum / rest, dtype)), _widened(grad, *_in_two(-delta, dtype))
    keys, values = (_widened(x, 1.0, 1.0).flatten(0, 1) for x in (key * exact, value))
    grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
    longest = max((block.end - block.start) * (block.high - block.low) for block in blocks)
    memory = [query.new_empty(batch * heads * longest) for _ in range(2)]  # fresh pages cost more than the arithmetic
    for start, end, low, clear, high in blocks:
        count = end - start
        shape = batch * kv_heads, high - low, group * count
        scores, changes = (x[: math.prod(shape)].view(shape) for x in memory)
        queries, grads = (x[:, :, start:end].reshape(shape[0], shape[2], -1) for x in (left, left_grad))
        torch.bmm(keys[:, low:high], queries.transpose(1, 2), out=scores)
        if clear < high:
            seen = _past(count) if mask is None else mask[:, :, start:end, clear:high]
            hidden = _hidden(seen.transpose(-2, -1), dtype).repeat(*[1] * (seen.dim() - 1), group)
            scores.view(batch, kv_heads, high - low, group * count)[:, :, clear - low :] += hidden
        weights = (scores if rest == 1 else scores.mul_(rest)).exp_()
        torch.bmm(values[:, low:high], grads.transpose(1, 2), out=changes).mul_(weights)
        grad_value[:, low:high] += torch.bmm(weights, grads)
        grad_key[:, low:high] += torch.bmm(changes, queries)
        block = torch.bmm(changes.transpose(1, 2), keys[:, low:high])[..., :width]
        results[0][:, :, start:end] = block.view(batch, heads, count, width) * rest
    results[1].copy_(grad_key[..., :width].view(key.shape) * scale)
    results[2].copy_(grad_value[..., :width].view(value.shape))


def _widened(x: Tensor, *columns: Tensor | float) -> Tensor:
    """x: [..., Dh] with `columns` [...] appended, and zeros up to a multiple of 16 of them all."""
    width = x.shape[-1]
    wide = x.new_zeros(*x.shape[:-1], -(-(width + len(columns)) // 16) * 16)
    wide[..., :width] = x
    for i, column in enumerate(columns, width):
        wide[..., i] = column
    return wide


def _in_two(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x rounded to `dtype`, and what that leaves out."""
    rounded = x.to(dtype)
    return rounded, x - rounded


def _hidden(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores: 0 where a query sees a key, -inf where not."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _past(queries: int) -> Tensor:
    """Who sees whom among `queries` tokens of a causal row."""
    return torch.ones(queries, queries, dtype=torch.bool).tril()


def _remember(ctx, inputs, output) -> None:
    query, key, value, mask, spans = inputs
    ctx.save_for_backward(query, key, value, *output, mask, spans)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return *_gradients(grad, *ctx.saved_tensors), None, None


_attention.register_autograd(_backward, setup_context=_remember)
