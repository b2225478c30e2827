"""The start of a run's ranks; the one file that knows every strategy."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from pretrain.parallel.fsdp2 import FSDP2
from pretrain.parallel.settings import ParallelSettings, resolve_strategy
from pretrain.parallel.strategy import DDP, Parallel, Precision
from pretrain.parallel.zero import Zero

# Longest wait within a save, whose ranks may write at very different speeds; a rank that is gone ends it at once.
SAVE_TIMEOUT = timedelta(days=2)
STRATEGIES: dict[str, type[Parallel]] = {
    "single": Parallel,
    "ddp": DDP,
    "fsdp2": FSDP2,
    "zero1": Zero,
    "zero2": Zero,
    "zero3": Zero,
}


def start_parallel(
    settings: ParallelSettings,
    precision: Precision | Literal["auto"] = "fp32",
    seed: int = 0,
    first: Callable[[], None] | None = None,
) -> Parallel:
    """Join the other ranks (gloo on CPU, NCCL on GPU) and seed this one so that all build the same model.

    precision: `auto` leaves it to `pretrain.precision.settle`, once the ranks have met.
    first: what rank 0 does before the ranks join, while the others wait without a time limit.
    Raises UserError where the ranks or the strategy asked for are not those that were started.
    """
    settings = resolve_strategy(settings, os.environ)
    parallel = STRATEGIES[settings.strategy](settings, "fp32", seed)
    if precision != "auto":
        parallel.compute_in(precision)
    store: dist.Store | None = None
    if "WORLD_SIZE" in os.environ:
        store, _, _ = next(dist.rendezvous("env://", parallel.rank, parallel.world_size))
        parallel.store = dist.PrefixStore("pretrain", store)
    if first is not None:
        parallel.on_main("the start", first)
    if store is not None:
        backend = "cpu:gloo,cuda:nccl" if parallel.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=settings.timeout_seconds),
            store=dist.PrefixStore("ranks", store),
            rank=parallel.rank,
            world_size=parallel.world_size,
        )
        # collectives of background threads (checkpoints) must never interleave with those of training
        parallel.background_group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        assert dist.get_world_size() == parallel.world_size
    torch.manual_seed(seed)
    return parallel
