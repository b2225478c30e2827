"""How long a comparison will take, told from the steps that its runs have taken so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Pace:
    """How fast one run goes. Times in seconds of one clock.

    work: what the run spends in all, in any unit that the runs of a comparison share, such as FLOPs.
    started: when its process was. first, latest: (time, share of the work done) of the first and of the newest line of
    metrics seen. trained: seconds that the run's own clock has spent in steps, for `latest`'s share.
    """

    work: float
    started: float
    first: tuple[float, float] | None = None
    latest: tuple[float, float] | None = None
    trained: float = 0.0
    ended: float | None = None

    def saw(self, now: float, share: float, trained: float) -> None:
        """A look at the run: `share` of its work is done, by lines that may be the same as before."""
        if share <= 0 or (self.latest is not None and share <= self.latest[1]):
            return
        self.latest, self.trained = (now, share), trained
        self.first = self.first or self.latest

    @property
    def seconds_per_share(self) -> float | None:
        """Seconds that the whole run would take at its pace, without its start: by the clock from its second line of
        metrics on, which includes validation and checkpoints; before that by its own; None before its first line."""
        if self.first is None or self.latest is None:
            return None
        gained = self.latest[1] - self.first[1]
        return (self.latest[0] - self.first[0]) / gained if gained > 0 else self.trained / self.latest[1]

    def left(self, now: float) -> float | None:
        """Seconds until the run ends; None where nothing tells."""
        pace = self.seconds_per_share
        if self.ended is not None:
            return 0.0
        if pace is None or self.latest is None:
            return None
        return max(0.0, (1 - self.latest[1]) * pace - (now - self.latest[0]))

    def whole(self) -> float | None:
        """Seconds of such a run from its start, the start included."""
        if self.ended is not None:  # one that went on from a checkpoint stands for what it still had to do
            return (self.ended - self.started) / (1 - min(self.first[1], 0.99) if self.first else 1)
        pace = self.seconds_per_share
        return None if pace is None or self.first is None else (self.first[0] - self.started) + pace


def time_left(
    now: float, paces: Sequence[Pace], running: Sequence[Pace], waiting: Sequence[float], slots: int
) -> float | None:
    """Seconds until all runs have ended, `slots` at a time in their order; None before any has taken steps.

    paces: of every run that was started; running: those of them that go on; waiting: the work of those still to start.
    A run of which nothing is known takes, for its work, what those take on average of which something is.
    """
    known = [(pace.work, whole) for pace in paces if (whole := pace.whole()) is not None and pace.work > 0]
    if not known:
        return None
    rate = sum(whole for _, whole in known) / sum(work for work, _ in known)
    ends = []
    for pace in running:
        left = pace.left(now)
        ends.append(max(0.0, rate * pace.work - (now - pace.started)) if left is None else left)
    ends += [0.0] * (slots - len(ends))
    for work in waiting:
        ends.sort()
        ends[0] += rate * work
    return max(ends)
