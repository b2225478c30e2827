"""How the runs of a comparison stand: what Slurm says of their tasks, and what their directories say.

`launchers/submit.py` notes in OUTPUT/slurm.json which array holds which runs; `submit.py --status` shows a line a run.
The state is squeue's, or sacct's once squeue has forgotten a task; where neither knows it, the run directory's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from launchers.grid import CompareSettings, PlannedRun
from launchers.requeues import Requeues
from pretrain.lock import LOCK, STALE_SECONDS
from pretrain.metrics import METRICS, last_line

SUBMITTED = "slurm.json"
FAILED = ("failed", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline")


@dataclass(frozen=True)
class Task:
    """A task of an array. name: as squeue and scontrol take it, `12_3`. state: Slurm's word in lower case."""

    name: str
    state: str


def remember(compare: CompareSettings, runs: Sequence[PlannedRun], array: str) -> None:
    """Note in the comparison's folder that this array's task N is the run of that label."""
    compare.output.mkdir(parents=True, exist_ok=True)
    path = compare.output / SUBMITTED
    tasks = {str(number): run.label for number, run in enumerate(runs) if not run.finished()}
    entry = {"array": array, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "tasks": tasks}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([*submissions(compare.output), entry], indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def submissions(output: Path) -> list[dict[str, Any]]:
    """What `remember` noted, oldest first."""
    try:
        return json.loads((output / SUBMITTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def ask(*command: str) -> list[list[str]]:
    """The lines of a Slurm command, split at `|`; none where it is absent or fails, as sacct may."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    return [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []


def tasks_of(array: str) -> dict[str, Task]:
    """Task number -> task, of one array, by squeue and sacct."""
    found: dict[str, Task] = {}
    for name, state, code in ask("sacct", "-nPX", f"--jobs={array}", "--format=JobID,State,ExitCode"):
        word = state.split()[0].lower()  # CANCELLED by 1000
        exit_code = code.partition(":")[0]
        found[name.rpartition("_")[2]] = Task(name, f"failed, exit code {exit_code}" if word == "failed" else word)
    live = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i|%T|%r")
    for name, state, reason in live:
        number, word = name.rpartition("_")[2], state.lower()
        if word == "failed" and number in found:
            continue  # sacct has told the exit code
        found[number] = Task(name, f"{word} ({reason})" if word == "pending" and reason != "None" else word)
    return found


def tasks_by_run(output: Path) -> dict[str, Task]:
    """Label of a run -> the task that it was last submitted as, of those that Slurm still knows."""
    found: dict[str, Task] = {}
    for entry in submissions(output):
        known = tasks_of(entry["array"])
        found |= {label: known[number] for number, label in entry["tasks"].items() if number in known}
    return found


def state_of(run: PlannedRun, task: Task | None) -> str:
    """A run's state in words."""
    if run.finished():
        return "finished"
    if task is not None and task.state != "completed":
        return task.state
    if any(_locked(folder) for folder in {run.folder, *run.folders()}):
        return "running"
    if run.asks_for_more():
        return "stopped, to be started again"
    return "not running" if (run.folder / METRICS).exists() else "not started"


def _locked(folder: Path) -> bool:
    """Whether a process holds this run directory, by its lock's last beat."""
    try:
        return time.time() - (folder / LOCK).stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def newest(run: PlannedRun) -> tuple[dict[str, Any], float | None]:
    """The last line of a run's metrics, or of the branch that it is in, and the seconds since it was written."""
    files = [folder / METRICS for folder in {run.folder, *run.folders()} if (folder / METRICS).exists()]
    if not files:
        return {}, None
    path = max(files, key=lambda file: file.stat().st_mtime)
    return last_line(path) or {}, max(0.0, time.time() - path.stat().st_mtime)


def show(compare: CompareSettings, runs: Sequence[PlannedRun], logs: Path, console: Console | None = None) -> None:
    """Print the table, the counts, and where the logs of failed tasks are."""
    console = console or Console()
    table = Table(title=f"{compare.output}", title_justify="left")
    for name in ("run", "task", "state", "step", "share", "loss", "requeues", "last line"):
        justify: Literal["left", "right"] = "left" if name in ("run", "task", "state") else "right"
        table.add_column(name, justify=justify, no_wrap=name != "run", overflow="fold")  # a narrow terminal folds names
    tasks, counts, failed = tasks_by_run(compare.output), Counter[str](), []
    for run in runs:
        task = tasks.get(run.label)
        state = state_of(run, task)
        line, age = newest(run)
        loss = line.get("validation_loss", line.get("loss"))
        table.add_row(
            run.label,
            task.name if task else "",
            state,
            f"{line['step']:,}" if line else "",
            f"{run.share():.0%}" if line else "",
            f"{loss:.4f}" if loss is not None else "",
            str(Requeues.read(run.folder).total),
            f"{_duration(age)} ago" if age is not None else "",
        )
        counts[state.partition(",")[0].partition(" (")[0]] += 1
        if task and state.startswith(FAILED):
            failed.append(f"{run.label}: {state}; log {logs / f'{compare.output.name}-{task.name}.log'}")
    console.print(table)
    summary = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    for text in [summary, *failed]:
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if failed:
        again = "the same submission again starts what has not finished, from its checkpoints"
        console.print(again, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
