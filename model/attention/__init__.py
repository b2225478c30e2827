"""Attention: one object says who sees whom (`Visible`), the first backend that does not refuse computes it.

Shapes: B batch, H query heads, Hkv key/value heads, K queries of a row, S keys, Dh head dimension.

| backend | serves | form |
|---|---|---|
| cpu | CPUs | mask, and the span of keys of each block of queries |
| sdpa | whole causal rows on GPUs, other devices | none, or a mask |
| varlen | GPUs, 16 bits: what looks at itself alone, in documents or not, selected or not | cumulative lengths |
| flex | GPUs: selected queries over everyone's keys, padding, fp32 | BlockMask |
| explicit | the reference; `attn_implementation="eager"` | mask |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import MoRConfig
from .base import Backend, Call, Seen
from .cpu import CPU, spans_where_useful
from .explicit import Explicit
from .flex import Flex
from .sdpa import SDPA
from .varlen import Varlen
from .visible import Visible

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CPU(), SDPA(), Varlen(), Flex(), Explicit())}
_only: list[str] = []


@contextmanager
def only(name: str) -> Iterator[None]:
    """Within, every pass takes this backend, or raises ValueError with why it refuses."""
    _only.append(name)
    try:
        yield
    finally:
        _only.pop()


def see(visible: Visible, config: MoRConfig, dtype: torch.dtype, training: bool) -> Seen:
    """Who sees whom, for the layers of a stage, in the form of the backend that will compute it. dtype: of queries."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    call = Call(
        dtype, _dropout(config, training), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )
    name = "explicit" if config._attn_implementation == "eager" else (_only[-1] if _only else None)
    if name is not None:
        refused = BACKENDS[name].refuses(visible, call)
        if refused is not None:
            raise ValueError(f"attention: backend {name!r} cannot serve this call: {refused}")
        return BACKENDS[name].form(visible)
    backend = next(backend for backend in BACKENDS.values() if backend.refuses(visible, call) is None)
    return backend.form(visible)


def through(mask: Tensor | None, config: MoRConfig, device: torch.device) -> Seen:
    """Who sees whom as a cache knows it, by a mask [B, 1, K, S]; None: see `Seen`."""
    if config._attn_implementation == "eager":
        return Seen("explicit", mask)
    return Seen("cpu", mask, spans_where_useful(mask)) if device.type == "cpu" else Seen("sdpa", mask)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen, config: MoRConfig, training: bool) -> Tensor:
    """Scaled dot-product attention. query: [B, H, K, Dh], key and value: [B, Hkv, S, Dh] -> [B, H, K, Dh]."""
    return BACKENDS[seen.backend].attend(query, key, value, seen, _dropout(config, training))


def _dropout(config: MoRConfig, training: bool) -> float:
    return float(config.attention_dropout or 0.0) if training else 0.0
