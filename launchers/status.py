"""How the runs of a comparison stand: what Slurm says of their tasks, and what their directories say.

`launchers/submit.py` notes in OUTPUT/slurm.json which array holds which runs; `submit.py --status` shows a line a round
of the sweeps and a line a run. The state is squeue's, or sacct's once squeue has forgotten a task; where neither knows
it, the run directory's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from data_prep.settings import UserError
from launchers.grid import (
    CompareSettings,
    PlannedRun,
    cells_of,
    plan_round,
    round_count,
    round_size,
    said,
    winner,
    with_seeds,
)
from launchers.requeues import Requeues
from pretrain.lock import LOCK, STALE_SECONDS
from pretrain.metrics import METRICS, last_line

SUBMITTED = "slurm.json"
FAILED = ("failed", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline")
GROUPS = {  # first words of states; what is in none of them has ended without finishing
    "finished": ("finished",),
    "running": ("running", "completing", "configuring", "resizing", "signaling", "stage_out", "suspended"),
    "waiting": ("pending", "not started", "requeue", "stopped, to be started again"),
}


@dataclass(frozen=True)
class Task:
    """A task of an array. name: as squeue and scontrol take it, `12_3`. state: Slurm's word in lower case."""

    name: str
    state: str


def remember(compare: CompareSettings, runs: Sequence[PlannedRun], array: str, added: bool = False) -> None:
    """Note in the comparison's folder that this array's task N is the run of that label, without swept values.

    added: whether its seeds were added by `until`, beside those that the comparison was submitted with.
    """
    tasks = {str(number): run.unswept for number, run in enumerate(runs) if not run.finished()}
    _note(compare.output, {"array": array, "tasks": tasks} | ({"seeds": compare.seeds} if added else {}))


def remember_round(compare: CompareSettings, number: int, array: str) -> None:
    """Note in the comparison's folder that this array is a round of its sweeps."""
    _note(compare.output, {"array": array, "round": number})


def _note(output: Path, entry: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / SUBMITTED
    partial = path.with_suffix(".partial")
    entries = [*submissions(output), entry | {"submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}]
    partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def submissions(output: Path) -> list[dict[str, Any]]:
    """What `remember` and `remember_round` noted, oldest first."""
    try:
        return json.loads((output / SUBMITTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def added_seeds(compare: CompareSettings) -> dict[str, Any]:
    """What the seeds that `until` added since change of the comparison as it was submitted; nothing without any."""
    for entry in reversed(submissions(compare.output)):
        seeds = entry.get("seeds", [])
        if set(compare.seeds) < set(seeds):
            return with_seeds(compare, [seed for seed in seeds if seed not in compare.seeds])
    return {}


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
    """Unswept label of a run -> the task that it was last submitted as, of those that Slurm still knows."""
    found: dict[str, Task] = {}
    for entry in submissions(output):
        if "tasks" in entry:
            known = tasks_of(entry["array"])
            found |= {label: known[number] for number, label in entry["tasks"].items() if number in known}
    return found


def tasks_of_round(output: Path, number: int) -> dict[str, Task]:
    """Task number -> the task of a round as it was last submitted, of those that Slurm still knows."""
    found: dict[str, Task] = {}
    for entry in submissions(output):
        if entry.get("round") == number:
            found |= tasks_of(entry["array"])
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
    return "not running" if run.folder.exists() else "not started"


def states_of_round(compare: CompareSettings, number: int, gpus: bool) -> list[tuple[str, Task | None, str]]:
    """(label, task, state) of each run of a round; while the round before it goes on, its runs have numbers alone."""
    tasks, runs = tasks_of_round(compare.output, number), list[PlannedRun]()
    with suppress(UserError):  # nothing of the round before it has run
        runs = plan_round(compare, number, gpus)
    found = []
    for place in range(round_size(compare, number)):
        run, task = (runs[place] if runs else None), tasks.get(str(place))
        state = state_of(run, task) if run else task.state if task else "not started"
        found.append((run.label if run else f"round {number + 1}, run {place}", task, state))
    return found


def group_of(state: str) -> str:
    """finished, running, waiting or failed, of a state in words."""
    return next((group for group, words in GROUPS.items() if state.startswith(words)), "failed")


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


def show(
    compare: CompareSettings, runs: Sequence[PlannedRun], gpus: bool, logs: Path, console: Console | None = None
) -> None:
    """Print the sweeps, the table of the report's runs and of noise, the counts, and where logs of failed tasks are.

    gpus: whether the runs of sweeps have any, which decides their precision where it is left open.
    """
    console = console or Console()
    failed = show_sweeps(compare, gpus, logs, console)
    table = Table(title=f"{compare.output}", title_justify="left")
    for name in ("run", "task", "state", "step", "share", "loss", "requeues", "last line"):
        justify: Literal["left", "right"] = "left" if name in ("run", "task", "state") else "right"
        table.add_column(name, justify=justify, no_wrap=name != "run", overflow="fold")  # a narrow terminal folds names
    tasks, counts = tasks_by_run(compare.output), Counter[str]()
    for run in runs:
        task = tasks.get(run.unswept)
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
        failed += failure(compare, logs, run.label, task, state)
    console.print(table)
    summary = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    for text in [summary, *failed]:
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if failed:
        again = "the same submission again starts what has not finished, from its checkpoints"
        console.print(again, highlight=False, soft_wrap=True)


def show_sweeps(compare: CompareSettings, gpus: bool, logs: Path, console: Console) -> list[str]:
    """Print how the runs of each round of the sweeps stand, and what won; a line for each task that failed."""
    if not round_count(compare):
        return []
    table, failed = Table(title="sweeps", title_justify="left"), list[str]()
    columns = [*GROUPS, "failed"]
    for name in ("round", "runs", *columns):
        table.add_column(name, justify="right")
    for number in range(round_count(compare)):
        states = states_of_round(compare, number, gpus)
        counts = Counter(group_of(state) for _, _, state in states)
        table.add_row(f"{number + 1}", f"{len(states)}", *(f"{counts[name]}" for name in columns))
        failed += [line for label, task, state in states for line in failure(compare, logs, label, task, state)]
    console.print(table)
    for cell in cells_of(compare):
        won = winner(compare, cell)
        text = "no winner yet" if won is None else f"{said(won)} won its sweep" if won else "nothing is swept"
        console.print(f"{cell.label}: {text}", highlight=False, soft_wrap=True, markup=False)
    return failed


def failure(compare: CompareSettings, logs: Path, label: str, task: Task | None, state: str) -> list[str]:
    """A line that names the log of a task that failed; none of any other."""
    if task is None or not state.startswith(FAILED):
        return []
    return [f"{label}: {state}; log {logs / f'{compare.output.name}-{task.name}.log'}"]


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
