"""The runs that are there: what they have come to, and room on the disk.

    python -m pretrain.runs [FOLDER ...] [--watch [SECONDS]]
    python -m pretrain.runs FOLDER ... --prune checkpoints [--keep N] [--yes]
    python -m pretrain.runs RUN ... --prune runs [--yes]

lists runs, follows them, and prunes checkpoints or whole runs: without --yes it says what it would remove.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from data_prep.settings import UserError, read_yaml, run_command
from pretrain.lock import LOCK, RunLock, owner_of
from pretrain.report.runs import read_metrics, shown

QUIET_SECONDS = 180.0  # a run without a sign of life for longer is not running
Removal = tuple[Path, str]  # what is removed, and why it may be


@dataclass(frozen=True)
class Status:
    """What the list says of a run. size: bytes of its directory. age: seconds since its last sign of life."""

    folder: Path
    state: str
    step: int
    planned: int | None
    loss: str
    size: int
    age: float


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run directories in and below folders, branches among them, in order of their names."""
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        below = (path.parent for path in sorted(folder.rglob("run.json")) if "checkpoints" not in path.parts)
        found |= dict.fromkeys([*([folder] if (folder / "run.json").exists() else []), *below])
    if not found:
        raise UserError(f"no run (no run.json) in or below {', '.join(map(str, folders))}")
    return list(found)


def status_of(folder: Path) -> Status:
    """Read a run's state. A file that is being written, or is damaged, leaves its column empty."""
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines, _ = read_metrics(folder / "metrics.jsonl")
    except (UserError, ValueError):
        facts, lines = {}, []
    last: dict[str, Any] = lines[-1] if lines else {}
    signs = (folder / "metrics.jsonl", folder / "run.json", _lock(folder))
    alive = [path.stat().st_mtime for path in signs if path.exists()]
    age = max(0.0, time.time() - max(alive, default=folder.stat().st_mtime))
    causal = next((line["validation_loss"] for line in reversed(lines) if line.get("validation_loss")), None)
    training = next((line["loss"] for line in reversed(lines) if line.get("loss")), None)
    loss = f"{shown(causal)} validation" if causal is not None else f"{shown(training)} training" if training else ""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    planned = facts.get("budget", {}).get("planned_steps")
    return Status(folder, _state(folder, last, age), last.get("step", 0), planned, loss, size, age)


def _state(folder: Path, last: dict[str, Any], age: float) -> str:
    event = last.get("event")
    if event in ("finished", "branched"):
        return event
    if (folder / "requeue").exists():
        return "stopped"
    return "running" if _lock(folder).exists() and age < QUIET_SECONDS else "interrupted"


def _lock(folder: Path) -> Path:
    """The lock of the process that trains there; a branch's is its trunk's."""
    return owner_of(folder) / LOCK


def status_table(folders: Sequence[Path]) -> Table:
    """A row for each run."""
    table = Table(title="Runs", title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("state", "step", "loss", "size", "last sign"):
        table.add_column(name)
    for status in map(status_of, folders):
        step = f"{status.step:,}" + (f" of {status.planned:,}" if status.planned else "")
        table.add_row(
            str(status.folder), status.state, step, status.loss, f"{status.size / 1e6:,.1f} MB", _ago(status.age)
        )
    return table


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


def watch(folders: Sequence[Path], seconds: float, console: Console) -> None:
    """Show the list anew every so often until no run is running any more."""
    with Live(status_table(find_runs(folders)), console=console, auto_refresh=False) as live:
        while any(status_of(folder).state == "running" for folder in find_runs(folders)):
            time.sleep(seconds)
            live.update(status_table(find_runs(folders)), refresh=True)


def prunable_checkpoints(folders: Sequence[Path], keep: int) -> list[Removal]:
    """All but the newest `keep` checkpoints of runs that are not running, and what interrupted saves left.

    Milestones stay, and what a larger budget would go on from; with `keep` 0 finished runs lose these too.
    """
    from pretrain.checkpoint import committed

    found: list[Removal] = []
    for folder in find_runs(folders):
        status = status_of(folder)
        if status.state == "running":
            continue
        steps = committed(folder / "checkpoints")
        if status.state == "finished" and (folder / "final").is_dir() and keep == 0:
            found += [(path, "the final model stands") for _, path in steps]
        else:
            held = _held(folder, steps[-1][1]) if steps else lambda step: True
            older = steps[: -max(keep, 1)]
            found += [(path, f"newer: {steps[-1][1].name}") for step, path in older if not held(step)]
        left = sorted(path for kind in ("partial", "damaged*") for path in folder.glob(f"checkpoints/step-*.{kind}"))
        found += [(path, "not whole") for path in left]
    return found


def _held(folder: Path, newest: Path) -> Callable[[int], bool]:
    """Whether a run keeps the checkpoint of a step for good, by its settings and its newest checkpoint."""
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    every = config.get("checkpoint", {}).get("milestone_every", 0)
    plateau = json.loads((newest / "state.json").read_text(encoding="utf-8")).get("cooldown_step")
    return lambda step: step == plateau or bool(every and step % every == 0)


def prunable_runs(folders: Sequence[Path]) -> list[Removal]:
    """The run directories that were named. Raises UserError for one that is no run, and for one that is running."""
    found: list[Removal] = []
    for folder in folders:
        if not (folder / "run.json").is_file():
            raise UserError(
                f"{folder}: no run (no run.json); name run directories one by one, their parents are refused"
            )
        status = status_of(folder)
        if status.state == "running":
            raise UserError(f"{folder}: is running (last sign of life {_ago(status.age)}); stop it first")
        found.append((folder, status.state))
    return found


def prune(removals: Sequence[Removal], yes: bool, console: Console) -> None:
    """Remove, or say what would be removed. Raises UserError, and removes no more, where a process is at work."""
    from pretrain.checkpoint import remove

    freed = 0
    for path, why in removals:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        freed += size
        console.print(f"{path}  {size / 1e6:,.1f} MB  ({why})", highlight=False, soft_wrap=True)
        if not yes:
            continue
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        with RunLock(owner_of(run)):  # whatever the clocks say of its last sign of life
            if run != path:
                remove(path)
            else:
                shutil.rmtree(path)
    done = "removed" if yes else "would be removed; add --yes to remove them"
    console.print(
        f"{len(removals)} folder{'s' * (len(removals) != 1)}, {freed / 1e6:,.1f} MB {done}",
        highlight=False,
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.runs", description="List, follow and prune runs.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="runs, or what holds some (runs/)")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="SECONDS",
        help="follow until no run is running (every 5 s)",
    )
    parser.add_argument("--prune", choices=["checkpoints", "runs"], help="say what would be removed; with --yes remove")
    parser.add_argument(
        "--keep", type=int, default=1, help="checkpoints kept of each run (1); 0: none of finished runs"
    )
    parser.add_argument("--yes", action="store_true", help="remove")
    given = parser.parse_args(arguments)
    folders, console = given.folders or [Path("runs")], Console()
    if given.keep < 0 or (given.watch is not None and given.watch <= 0):
        raise UserError("--keep must be 0 or more, --watch above 0")
    if given.yes and given.prune is None:
        raise UserError("--yes belongs to --prune checkpoints or --prune runs")
    if given.prune == "runs" and not given.folders:
        raise UserError("--prune runs: name the run directories to remove")
    if given.prune:
        removals = prunable_runs(folders) if given.prune == "runs" else prunable_checkpoints(folders, given.keep)
        prune(removals, given.yes, console)
    elif given.watch is not None:
        watch(folders, given.watch, console)
    else:
        console.print(status_table(find_runs(folders)))
    return 0


if __name__ == "__main__":
    run_command(main)
