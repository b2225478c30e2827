"""What an answer cost: the FLOPs of the tokens that ran, by the `exact` convention, forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import numpy as np

from model.config import MoRConfig
from model.depth.layout import within
from model.flops import Work, forward_flops, gates_of, linear_flops, work_of
from model.inference.scheduler import Request


class Prices:
    """FLOPs of texts of one model. The equations are linear in what is counted (`work_of`), so that each is asked once
    for one of each kind and not for every text: an answer is priced in microseconds.

    What is counted, G gates: tokens, their causal pairs, tokens behind each gate, their pairs, tokens that each gate
    scored, and tokens that were read out: [3 + 3 G].
    """

    def __init__(self, config: MoRConfig):
        self.config, self.gates = config, gates_of(config)
        gated = {stage.gate: stage for one in self._work([0] * (3 + 3 * self.gates)).passes for stage in (one.stage,)}
        self.sees_all = np.array([gated[gate].sees_all for gate in range(self.gates)], dtype=bool)
        self._of_units = lru_cache(None)(self._units)

    def _work(self, counted: Sequence[int]) -> Work:
        tokens, pairs, *gated, _ = counted
        behind, seeing, scored = (gated[i * self.gates : (i + 1) * self.gates] for i in range(3))
        work = work_of(self.config, tokens, 1, behind, seeing, scored, 0)
        passes = (one if one.stage.gate is not None else replace(one, pairs=pairs) for one in work.passes)
        return replace(work, passes=tuple(passes))

    def _units(self, limit: int | None) -> list[Fraction]:
        """FLOPs of one of each kind, in a model of at most so many recursions."""
        found = []
        for unit in np.eye(3 + 3 * self.gates, dtype=int).tolist():
            work = self._work(unit)
            kept = [replace(one, stage=stage) for one in work.passes for stage in within((one.stage,), limit)]
            flops = forward_flops(self.config, replace(work, passes=tuple(kept)))
            flops["head"] = linear_flops(unit[-1], self.config.hidden_size, self.config.vocab_size)
            found.append(Fraction(sum(flops.values())))
        return found

    def spent(self, passed: Sequence[int], judged: Sequence[int], heads: int, limit: int | None = None) -> int:
        """FLOPs of a text whose token p read keys behind the gates in the bits of passed[p], and was scored by those in
        judged[p]. heads: tokens that were read out. limit: recursions that the text could take at most.

        As each token was computed once: what a pre-emption had computed again is left out.
        """
        length = len(passed)
        if not length:
            return 0
        bits = np.arange(self.gates)
        read, scored = (np.array(column, dtype=np.int64)[:, None] >> bits & 1 for column in (passed, judged))
        behind = read.sum(0)
        seeing = np.where(self.sees_all, np.arange(1, length + 1) @ read, behind * (behind + 1) // 2)
        triangle = length * (length + 1) // 2
        counted = [length, triangle, *behind.tolist(), *seeing.tolist(), *scored.sum(0).tolist(), heads]
        return round(sum(count * price for count, price in zip(counted, self._of_units(limit), strict=True)))

    def of_request(self, request: Request) -> tuple[int, int]:
        """FLOPs that a request took, and those that it would have taken with all of the depth for every token."""
        heads = len(request.text) - len(request.prompt)
        heads += (len(request.prompt) - 1) * request.params.prompt_logprobs
        whole = [(1 << self.gates) - 1] * len(request.passed)
        took = self.spent(request.passed, request.judged, heads + sum(request.heads), request.limit)
        return took, self.spent(whole, whole, heads)
