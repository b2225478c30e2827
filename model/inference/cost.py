"""What an answer cost: the FLOPs of the tokens that ran, by the `exact` convention, forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from model.config import MoRConfig
from model.depth.layout import within
from model.flops import Work, forward_flops, gates_of, linear_flops, work_of
from model.inference.scheduler import Request


def spent(config: MoRConfig, passed: Sequence[int], judged: Sequence[int], heads: int, limit: int | None = None) -> int:
    """FLOPs of a text whose token p read keys behind the gates in the bits of passed[p], and was scored by those in
    judged[p]. heads: tokens that were read out. limit: recursions that the text could take at most.

    As each token was computed once: what a pre-emption had computed again is left out.
    """
    length, gates = len(passed), range(gates_of(config))
    if not length:
        return 0
    read, scored = (np.array(bits, dtype=np.int64)[:, None] >> np.arange(len(gates)) & 1 for bits in (passed, judged))
    counts = read.sum(0).tolist()
    seeing = (read * np.arange(1, length + 1)[:, None]).sum(0).tolist()
    work = work_of(config, length, 1, counts, counts, scored.sum(0).tolist())
    passes = []
    for one in work.passes:
        for stage in within((one.stage,), limit):
            n = one.queries
            pairs = one.pairs
            if stage.gate is not None:
                pairs = seeing[stage.gate] if stage.sees_all else n * (n + 1) // 2
            passes.append(replace(one, stage=stage, pairs=pairs))
    flops = forward_flops(config, Work(work.tokens, tuple(passes), work.offered))
    flops["head"] = linear_flops(heads, config.hidden_size, config.vocab_size)
    return round(sum(flops.values()))


def of_request(config: MoRConfig, request: Request) -> tuple[int, int]:
    """FLOPs that a request took, and those that it would have taken with all of the depth for every token."""
    heads = len(request.text) - len(request.prompt)
    heads += (len(request.prompt) - 1) * request.params.prompt_logprobs
    early = sum(request.heads)
    whole = [(1 << gates_of(config)) - 1] * len(request.passed)
    return spent(config, request.passed, request.judged, heads + early, request.limit), spent(
        config, whole, whole, heads
    )
