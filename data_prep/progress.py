"""One progress bar for everything that may take longer than a few seconds; silent when stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
