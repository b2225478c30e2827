"""What is said while something takes long: one progress bar, and one line for each stage of a preparation."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_QUICK = 1.0  # seconds; a stage that takes less is not told


class Parts(Protocol):
    """What is asked of a stage here."""

    name: str
    unit: str

    def sizes(self) -> list[int]: ...

    def mark(self, part: int) -> Path: ...


def say(line: str) -> None:
    """Print a line for the user to stderr, whole."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(line)


@contextmanager
def progress_bar(description: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """Yield `advance(amount)`. total None: length unknown."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} " + unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


@dataclass(frozen=True)
class Standing:
    """How a stage stands, by the marks of its parts, whoever made them. rate: units per second; left: seconds."""

    name: str
    unit: str
    parts: int
    done: int
    size: int
    size_done: int
    rate: float | None
    left: float | None
    seconds: float

    def line(self) -> str:
        words = [f"{self.name}: {self.done} of {self.parts} parts", f"{self.size_done:,} of {self.size:,} {self.unit}"]
        words += [f"{self.rate:,.0f} {self.unit}/s"] if self.rate else []
        words += [f"{_clock(self.left)} left"] if self.left else []
        words += [f"took {_clock(self.seconds)}"] if self.done == self.parts else []
        return ", ".join(words)


def standing(stage: Parts) -> Standing:
    """Look at the marks of a stage; the rate is that of all tasks, from the beginning of the first part that is done to
    the last mark."""
    sizes = stage.sizes()
    times = {part: path.stat().st_mtime for part in range(len(sizes)) if (path := stage.mark(part)).exists()}
    size, size_done = sum(sizes), sum(sizes[part] for part in times)
    rate = left = None
    seconds = 0.0
    if times:
        first = min(times, key=lambda part: times[part])
        began = times[first] - _seconds(stage.mark(first))
        seconds = max(max(times.values()) - began, 1e-3)
        rate = size_done / seconds
        left = (size - size_done) / rate if rate else None
    return Standing(stage.name, stage.unit, len(sizes), len(times), size, size_done, rate, left, seconds)


def _seconds(mark: Path) -> float:
    return float(json.loads(mark.read_text(encoding="utf-8")).get("seconds", 0.0))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def watching(stage: Parts, missing: Sequence[int]) -> Iterator[None]:
    """Show one line for a stage while its missing parts are done, by this process or others; say how it went."""
    if not missing:
        yield
        return
    sizes = stage.sizes()
    started, over = time.monotonic(), threading.Event()
    with progress_bar(stage.name, sum(sizes), stage.unit) as advance, ThreadPoolExecutor(1) as pool:

        def watch() -> None:
            shown = 0
            while not over.wait(1.0):
                done = sum(size for part, size in enumerate(sizes) if stage.mark(part).exists())
                advance(done - shown)
                shown = done

        watcher = pool.submit(watch) if Console(stderr=True).is_terminal else None
        try:
            yield
        finally:
            over.set()
        if watcher is not None:
            watcher.result()
    seconds = time.monotonic() - started
    if seconds > _QUICK:
        size = sum(sizes[part] for part in missing)
        parts = f"{len(missing)} of {len(sizes)} parts" if len(sizes) > 1 else "1 part"
        rate = f"{size:,} {stage.unit} in {_clock(seconds)}, {size / seconds:,.0f} {stage.unit}/s"
        say(f"{stage.name}: {parts}, {rate}")
