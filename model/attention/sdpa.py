"""torch's `scaled_dot_product_attention`: flash or cuDNN kernels where no mask is needed, any device where one is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Backend, Call, Seen, rows_like
from .visible import Visible


class SDPA(Backend):
    """Of plain causal rows on a GPU. A mask would be a dense bias there, kept for each layer's backward pass, and cuDNN
    plans anew for each shape; so only whole rows, whose shape stays, come here."""

    name = "sdpa"

    def refuses(self, visible: Visible, call: Call) -> str | None:
        if visible.rows.device.type != "cuda":
            return None
        if not visible.plain or visible.selected:
            return "it would need a dense mask, or plan for each new shape"
        if call.dtype == torch.float32 and call.heads != call.kv_heads:
            return "grouped heads in fp32 would materialise the scores"
        return None

    def form(self, visible: Visible) -> Seen:
        return Seen(self.name, visible.mask())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, dropout: float) -> Tensor:
        return sdpa(query, rows_like(key, query), rows_like(value, query), seen.mask, dropout)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Without a mask causal, or one query that sees everything."""
    causal = False
    if mask is None and query.shape[2] > 1:  # a branch: compiled for all lengths, the comparison itself is no bool
        causal = True
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None and query.is_cuda:
        # The memory-efficient kernel takes a mask but no groups; without this the product would be materialised.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )
