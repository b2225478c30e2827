"""Flash attention over segments of one list: rows and documents as cumulative lengths, and no mask at all.

Serves whatever looks at itself alone: whole rows, and selected tokens whose keys are their own, for the tokens of a
document stay neighbours. The kernel is FA2, which torch brings; FA3 takes its place where it is installed and fits.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .base import Backend, Call, Seen, as_list, as_rows
from .visible import Visible

# Before 2.12 groups need no word.
_GROUPS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_FA3 = "flash_attn_interface"
_asked = False


class Varlen(Backend):
    """Segments of a list, causal within themselves."""

    name = "varlen"

    def refuses(self, visible: Visible, call: Call) -> str | None:
        if visible.rows.device.type != "cuda":
            return "its kernel is a GPU's"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return "its kernel takes 16 bits alone"
        if call.dropout:
            return "its kernel knows no dropout"
        if call.head_dim % 8 or call.head_dim > 256:
            return f"its kernel takes head dimensions that 8 divides, up to 256, not {call.head_dim}"
        return self.unfit(visible)

    def unfit(self, visible: Visible) -> str | None:
        """Why segments cannot say who sees whom, on any device."""
        if visible.rows.past:
            return "keys of a cache are no segments"
        if visible.rows.real is not None:
            return "padding may lie anywhere in a row"
        if visible.selected and visible.everyone:
            return "queries and keys are not the same tokens"
        return None

    def form(self, visible: Visible) -> Seen:
        _take_fa3()
        lengths, longest = visible.lengths()
        return Seen(self.name, lengths=lengths, longest=longest)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, dropout: float) -> Tensor:
        assert seen.lengths is not None
        mixed = kernel(as_list(query), as_list(key), as_list(value), seen.lengths, seen.longest)
        return as_rows(mixed, query.shape[0])


def kernel(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """query: [N, H, Dh], key and value: [N, Hkv, Dh], lengths: [segments + 1] -> [N, H, Dh]."""
    groups = _GROUPS if query.shape[1] != key.shape[1] else {}
    mixed: Any = varlen_attn(query, key, value, lengths, lengths, longest, longest, window_size=(-1, 0), **groups)
    return mixed


def _take_fa3() -> None:
    """Have torch call FA3 in place of FA2, once, where the package is there and the GPU is one of its own."""
    global _asked
    if _asked:
        return
    _asked = True
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None or importlib.util.find_spec(_FA3) is None:
        return
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        activate("FA3")
