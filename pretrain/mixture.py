"""Several prepared folders in exact proportions: which source gives the sample at a position, and which one of its own.

    position p -> phase (weights hold from a share of the budget on) -> source, rank r -> sample in the source's order

Within a phase the sources follow a fixed pattern of D positions, D the common denominator of the weights, repeated for
ever. The pattern is Tijdeman's (The chairman assignment problem, Discrete Mathematics 32, 1980): after any number of
positions no source is a whole sample ahead of its share or behind it. r counts the samples of that source before p;
both are arithmetic, so that no position costs more than another.

Legend: K sources, P phases, D positions of a pattern, N positions asked for.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
LARGEST_PATTERN = 100_000  # positions; weights of five decimals


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights [K] as the smallest whole numbers in the same proportions, of their decimal notation.

    Raises ValueError where their sum is so large that the pattern would not fit LARGEST_PATTERN.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    shared = math.gcd(*whole)
    found = tuple(weight // shared for weight in whole)
    if sum(found) > LARGEST_PATTERN:
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"weights {given} repeat only after {sum(found)} samples; give them with fewer digits")
    return found


@functools.lru_cache(maxsize=32)
def pattern(whole: tuple[int, ...]) -> Indices:
    """Source at each position of one period [D], D the sum of the whole weights [K]."""
    size = sum(whole)
    present = [number for number, weight in enumerate(whole) if weight]
    if len(present) == 1:
        return np.full(size, present[0], np.int64)
    bound = 2 * len(present) - 2
    scale = math.lcm(*(whole[number] for number in present))
    pace = {number: scale // whole[number] for number in present}
    behind = dict.fromkeys(present, 0)  # D times what the source's share exceeds its count by
    found = np.empty(size, np.int64)
    for position in range(size):
        for number in present:
            behind[number] += whole[number]
        due = (number for number in present if bound * behind[number] >= size)
        chosen = min(due, key=lambda number: ((bound - 1) * size - bound * behind[number]) * pace[number])
        behind[chosen] -= size
        found[position] = chosen
    return found


def seed_of(seed: int, source: str) -> int:
    """Seed of the order of one source's samples."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:7], "little")


@dataclass(frozen=True)
class Phase:
    """From `start` on (global position), positions follow the pattern of `whole`, the weights [K]."""

    start: int
    whole: tuple[int, ...]

    def counted(self, length: Indices) -> Indices:
        """Samples of each source [N, K] among the first `length` [N] positions of the phase."""
        size = sum(self.whole)
        rounds, rest = np.divmod(length, size)
        return rounds[:, None] * np.array(self.whole, np.int64) + _running(self.whole)[rest]


@functools.lru_cache(maxsize=32)
def _running(whole: tuple[int, ...]) -> Indices:
    """Samples of each source before each position of a period: [D + 1, K]."""
    one_hot = pattern(whole)[:, None] == np.arange(len(whole))
    return np.concatenate([np.zeros((1, len(whole)), np.int64), one_hot.cumsum(axis=0)])


class Proportions:
    """The order of the sources over a whole run."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        """phases: by their starts, the first at 0."""
        assert phases[0].start == 0
        self.phases = list(phases)
        self._starts = np.array([phase.start for phase in phases], np.int64)
        before = np.zeros((1, len(phases[0].whole)), np.int64)
        self._before = [before[0]]  # samples of each source before each phase
        for phase, following in zip(self.phases, self.phases[1:], strict=False):
            before = before + phase.counted(np.array([following.start - phase.start]))
            self._before.append(before[0])

    def locate(self, positions: Indices) -> tuple[Indices, Indices]:
        """Source and rank (how many samples of that source came before) at each position: two arrays [N]."""
        sources, ranks = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers):
            phase, here = self.phases[number], numbers == number
            inside = positions[here] - phase.start
            chosen = pattern(phase.whole)[inside % sum(phase.whole)]
            counted = phase.counted(inside)[np.arange(len(inside)), chosen]
            sources[here], ranks[here] = chosen, self._before[number][chosen] + counted
        return sources, ranks

    def counts(self, position: int) -> Indices:
        """Samples of each source [K] before `position`."""
        number = int(np.searchsorted(self._starts, max(position, 0), side="right")) - 1
        phase = self.phases[number]
        return self._before[number] + phase.counted(np.array([position - phase.start]))[0]


def starts_of(shares: Sequence[float], total: int, position: int = 0, before: Sequence[int] = ()) -> list[int]:
    """Where phases start that begin at `shares` [P] of a run of `total` samples.

    position, before: where a run stands and where its phases had been to start. A phase that has begun stays where it
    began, also when the budget is another one now (a branch of a trunk); one that has not begins no earlier than here.
    """
    starts = []
    for number, share in enumerate(shares):
        begun = number < len(before) and before[number] <= position
        starts.append(before[number] if begun else max(round(share * total), position))
    return starts
