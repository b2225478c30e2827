"""Where a training step's seconds go, and a trace of chosen steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("data", "forward", "backward", "communication", "checkpoint", "optimizer")


class StepClock:
    """Seconds of one training step by part; the parts add up to the step.

    Each stretch belongs to the part that `begin` last named. `communication` is what ranks exchange outside the passes:
    the sums of losses and routing, the balancing load, FSDP2's gradient norm; it contains the wait for a later rank.
    What is overlapped with computation stays in the part that hides it: gradient reduction in `backward` (DDP, ZeRO,
    FSDP2), gathers in `forward` and `backward` (FSDP2, ZeRO-3), ZeRO's norm and gathered weights in `optimizer`.
    `checkpoint` is the update's wait for a save that still copies.

    CPU: the host's clock. GPU: an event in the current stream for each beginning, a few microseconds; `read` waits for
    the last, which costs the overlap of the optimizer's kernels with the next step's data and is done for lines of
    metrics alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._running = False

    def restart(self) -> None:
        """A step begins; what was measured before is forgotten."""
        self._marks.clear()
        self._running = True

    def begin(self, part: str) -> None:
        """`part` begins, and what went before ends. Does nothing outside a step, as in validation."""
        if not self._running:
            return
        if self._on_gpu:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((part, mark))

    def stop(self) -> None:
        """The step ends."""
        self.begin("end")
        self._running = False

    def read(self) -> dict[str, float]:
        """Seconds by part of the step that `stop` ended."""
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        return seconds


@contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Write a torch profiler trace of what runs inside to `path`, to be opened in Perfetto; None: run it as it is."""
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def duration(seconds: float) -> str:
    """A length of time as people say it: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"
