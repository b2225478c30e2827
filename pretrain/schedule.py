"""Learning-rate schedules, as pure functions of how much of the budget is spent.

The rate of a step is decided before the step, from the share of the budget that earlier steps spent: nothing has to be
undone when routing makes a step cheaper or dearer than expected, and a run that resumes computes the same rate again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["trapezoid", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of its peak.

    kind: `trapezoid` (warm-up, plateau, linear cool-down; section 4.1 of the paper) or `cosine`.
    warmup_steps: optimizer steps of linear warm-up; step s (from 0) takes (s + 1) / warmup_steps of the peak.
    warmup_progress: share of the budget that the warm-up is expected to spend; where the cosine begins.
    decay_share: share of the budget, at its end, over which the trapezoid falls.
    final_share: share of the peak that the decay approaches. As the rate is decided before each step, the last step
        takes a rate just above it: with a trapezoid to 0 over N steps the rates are N/N, (N-1)/N, ... 1/N.
    """

    kind: ScheduleKind
    warmup_steps: int
    warmup_progress: float
    decay_share: float
    final_share: float = 0.0

    def factor(self, step: int, progress: float) -> float:
        """Share of the peak learning rate for a step.

        step: optimizer steps taken so far. progress: share of the budget spent so far, 0..1.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "cosine":
            passed = (progress - self.warmup_progress) / (1 - self.warmup_progress)
            height = 0.5 * (1 + math.cos(math.pi * min(max(passed, 0.0), 1.0)))
        elif progress < 1 - self.decay_share:
            height = 1.0
        else:
            height = min(max((1 - progress) / self.decay_share, 0.0), 1.0) if self.decay_share else 1.0
        return self.final_share + (1 - self.final_share) * height

    def cooling(self, progress: float) -> bool:
        """Whether the trapezoid's cool-down has begun: from here a run depends on its budget."""
        return progress >= 1 - self.decay_share
