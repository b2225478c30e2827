"""Train a grid of models x budgets x seeds at matched FLOPs, then report.

python launchers/compare.py --config configs/compare/NAME.yaml [key=value ...] [--dry-run]

Each run is `accelerate launch pretrain/main.py ...` (through launchers/accelerate_launch.py, which waits for ranks that
stop), at most `at_once` together. SIGTERM and a hangup stop the runs as Ctrl-C does, with a checkpoint each; a second
Ctrl-C ends them at once. The same command again does only what
is missing: finished runs are left alone, stopped ones go on from their checkpoints. A run that fails is reported and
stops no other. Exit codes: 0 all finished; 1 a run failed or was stopped; 2 a mistake in what was given; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from data_prep.settings import UserError, run_command
from launchers.estimate import Pace, time_left
from launchers.grid import (
    CompareSettings,
    PlannedRun,
    cells_of,
    more_seeds,
    plan_best,
    plan_noise,
    plan_round,
    plan_runs,
    plan_table,
    read_compare,
    round_count,
    said,
    shown_apart,
    sweep_cost,
    take_records,
    winner,
    with_seeds,
)
from model.hardware import describe, device_here
from pretrain.lock import RunLock
from pretrain.main import prepare_data
from pretrain.metrics import last_line
from pretrain.parallel.timing import duration
from pretrain.precision import refused_or_slow
from pretrain.report.runs import shown
from pretrain.report.summary import Results
from pretrain.stop import CANNOT_WRITE, REQUEUE, REQUEUE_FILE

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.5
PLAIN_LINE_SECONDS = 30.0  # between status lines where there is no terminal
STOP_SECONDS = 900.0  # what a stopped run may take to end its step and write its checkpoint
LOG_TAIL = 15
LOSSES = ("validation_loss", "validation_loss_topk", "loss")  # of a line of metrics, the best first
ENDED_BY_SIGTERM = (128 + signal.SIGTERM, -signal.SIGTERM)  # asked to stop before it had anything to save


def ending(folder: Path) -> str:
    """The loss that a run ended with, in words: the causal one, or that of top-k where there is no other."""
    line = last_line(folder / "metrics.jsonl") or {}
    if line.get("validation_loss") is None and line.get("validation_loss_topk") is not None:
        return f"{shown(line['validation_loss_topk'])} (top-k, looks ahead)"
    return shown(line.get("validation_loss"))


# --- running here -----------------------------------------------------------------------------------------------


@dataclass
class LocalRuns:
    """Runs planned runs as processes, `compare.at_once` together.

    log_folder: a log per run. waiting: runs to start yet. paces: how fast runs that were started go, by label.
    failed, stopped: labels, filled as runs end.
    """

    compare: CompareSettings
    progress: Progress
    waiting: list[PlannedRun] = field(default_factory=list)
    paces: dict[str, Pace] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    _running: dict[int, tuple[PlannedRun, subprocess.Popen[bytes], TaskID]] = field(default_factory=dict)

    @property
    def log_folder(self) -> Path:
        return self.compare.output / "logs"

    def run_all(self, runs: Sequence[PlannedRun]) -> None:
        """Run all to their ends. On Ctrl-C, stop every run, wait for its checkpoint, and raise KeyboardInterrupt."""
        self.waiting = list(runs)
        said, told = time.monotonic(), False
        whole = self.progress.add_task(f"all {len(runs)} runs", total=None, text="", visible=bool(runs))
        try:
            while self.waiting or self._running:
                for slot in range(self.compare.at_once):
                    if slot not in self._running and self.waiting:
                        self._start(slot, self.waiting.pop(0))
                time.sleep(POLL_SECONDS)
                for slot, (run, process, task) in list(self._running.items()):
                    self._show(run, task)
                    if process.poll() is not None:
                        del self._running[slot]
                        self._ended(run, process.returncode, task)
                left = self._time_left()
                if left is not None and self._running and not told:
                    self._say(f"all {len(runs)} runs: about {duration(left)}, by the first measured steps")
                    told = True
                self.progress.update(whole, text="" if left is None else f"about {duration(left)} left")
                if not self.progress.console.is_terminal and time.monotonic() - said > PLAIN_LINE_SECONDS:
                    said = time.monotonic()
                    for run, _, _ in self._running.values():
                        self._say(f"{run.label}: {run.share():.0%}{self._left(run)}")
                    if left is not None:
                        self._say(f"all {len(runs)} runs: about {duration(left)} left")
        finally:
            self._stop_running()

    def _start(self, slot: int, run: PlannedRun) -> None:
        self.log_folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads_of(self.compare))}
        devices = torch.cuda.device_count()
        if devices > 1 and self.compare.at_once > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % devices)
        for folder in {run.folder, *run.folders()}:
            (folder / REQUEUE_FILE).unlink(missing_ok=True)  # of the stop that this start goes on from
        with open(self.log_folder / f"{run.label}.log", "ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then stops every run in order.
            process = subprocess.Popen(
                local_command(self.compare, run),
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        self.paces[run.label] = Pace(run.work, time.monotonic())
        task = self.progress.add_task(run.label, total=1.0, text="starting")
        self._running[slot] = (run, process, task)
        if not self.progress.console.is_terminal:
            self._say(f"{run.label}: started, log in {self.log_folder / run.label}.log")

    def _show(self, run: PlannedRun, task: TaskID) -> None:
        line = last_line(run.folder / "metrics.jsonl")
        if line is not None:
            loss = next((line[key] for key in LOSSES if line.get(key) is not None), None)
            share = run.share()
            self.paces[run.label].saw(time.monotonic(), share, line.get("seconds") or 0.0)
            text = f"step {line['step']}  loss {shown(loss)}{self._left(run)}"
            self.progress.update(task, completed=share, text=text)

    def _left(self, run: PlannedRun) -> str:
        """What is told of the time that a run still takes, once its first steps are measured."""
        left = self.paces[run.label].left(time.monotonic())
        return "" if left is None else f", about {duration(left)} left"

    def _time_left(self) -> float | None:
        """Seconds until all runs have ended."""
        running = [self.paces[run.label] for run, _, _ in self._running.values()]
        waiting = [run.work for run in self.waiting]
        return time_left(time.monotonic(), list(self.paces.values()), running, waiting, self.compare.at_once)

    def _ended(self, run: PlannedRun, code: int, task: TaskID) -> None:
        if code == 0 and run.finished():
            self.paces[run.label].ended = time.monotonic()
            losses = ", ".join(ending(folder) for folder in run.folders())
            self.progress.update(task, completed=1.0, text=f"validation loss {losses}")
            self._say(f"{run.label}: finished, validation loss {losses}")
        elif code == REQUEUE or code in ENDED_BY_SIGTERM or (code not in (0, CANNOT_WRITE) and run.asks_for_more()):
            self.stopped.append(run.label)
            self.progress.update(task, text="stopped on request")
            self._say(f"{run.label}: stopped on request; run the same command again to go on")
        else:
            self.failed.append(run.label)
            self.progress.update(task, text=f"[red]failed ({code})[/red]")
            log = self.log_folder / f"{run.label}.log"
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:])
            why = " (a checkpoint could not be saved)" if code == CANNOT_WRITE else ""
            self._say(f"{run.label}: failed with exit code {code}{why}; the end of {log}:\n{tail}")

    def _say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _stop_running(self) -> None:
        """SIGTERM to the process groups of all runs; wait until each has written its checkpoint and is gone.

        On another Ctrl-C meanwhile, kill them.
        """
        if not self._running:
            return
        self._say("stopping the runs; they write their checkpoints (Ctrl-C again: end them at once, without)")
        members = []
        for _, process, _ in self._running.values():
            members += [*_descendants(process.pid)]
            _signal_group(process.pid, signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        try:
            with _ignored(signal.SIGTERM, signal.SIGHUP):  # whoever ends a session may send both, one after the other
                while time.monotonic() < end and any(_alive(member) for member in members):
                    time.sleep(POLL_SECONDS)
        finally:
            for _, process, _ in self._running.values():
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
            self._running.clear()


@contextlib.contextmanager
def _ignored(*numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # gone already
        os.killpg(pid, number)


def threads_of(compare: CompareSettings) -> int:
    """CPU threads of one run."""
    return compare.threads or max(1, (len(os.sched_getaffinity(0)) or 1) // compare.at_once)


def local_command(compare: CompareSettings, run: PlannedRun) -> list[str]:
    """The command line of one run on this machine."""
    launcher = [sys.executable, "launchers/accelerate_launch.py", f"--shutdown-timeout={STOP_SECONDS:.0f}"]
    return [*launcher, *compare.accelerate, "pretrain/main.py", *run.arguments]


def submit_command(compare: CompareSettings, config: Path, overrides: Sequence[str]) -> list[str]:
    """The command line that hands the comparison's missing runs to Slurm, with the report after them."""
    return [sys.executable, "launchers/submit.py", "--compare", str(config), *compare.submit, *overrides]


# --- command line -----------------------------------------------------------------------------------------------


def say_precision(runs: Sequence[PlannedRun], console: Console) -> None:
    """What the runs are computed in, and a warning where that is slow. UserError where this machine cannot."""
    for precision in sorted({run.settings.precision for run in runs}):
        device = device_here()
        assert precision != "auto"
        text = f"precision: {precision} on {describe(device)}{refused_or_slow(precision, device)}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def run_locally(compare: CompareSettings, runs: Sequence[PlannedRun], console: Console, command: str = "") -> int:
    """Run what is missing here, sweeps first, then report; returns the exit code.

    command: what the user typed, for the report to say what to add to it.
    """
    for number in range(round_count(compare)):
        swept = plan_round(compare, number)
        console.print(f"sweep, round {number + 1} of {round_count(compare)}", highlight=False)
        if run_missing(compare, swept, console).stopped:
            return 1
    for cell in cells_of(compare) if compare.sweep or compare.sweep_models else ():
        if (won := winner(compare, cell)) is None:
            raise UserError(f"{cell.label}: no run of its sweep ended; their logs are in {compare.output / 'logs'}")
        console.print(f"{cell.label}: {said(won)} won its sweep", highlight=False, soft_wrap=True)
    runs = plan_runs(compare) if round_count(compare) else runs
    while True:
        local = run_missing(compare, [*runs, *plan_noise(compare)], console)
        if (best := plan_best(compare)) and not local.stopped:
            console.print(f"best_seeds: {', '.join(run.label for run in best)}", highlight=False, soft_wrap=True)
            of_best = run_missing(compare, best, console)
            local.failed += of_best.failed
            local.stopped += of_best.stopped
        results, code = report(compare, [*runs, *best], console, command)
        if local.failed or local.stopped:
            console.print(
                f"not finished: {', '.join([*local.failed, *local.stopped])}; logs in {local.log_folder}; "
                "run the same command again to go on",
                highlight=False,
                soft_wrap=True,
            )
            return 1
        seeds = more_seeds(compare, results)
        if code or not seeds:
            return code
        console.print(f"--until {compare.until:g}: adds seeds {', '.join(map(str, seeds))}", highlight=False)
        compare = compare.model_copy(update=with_seeds(compare, seeds))
        runs = plan_runs(compare)


def run_missing(compare: CompareSettings, runs: Sequence[PlannedRun], console: Console) -> LocalRuns:
    """Run those that are not finished; how they ended."""
    missing = [run for run in runs if not run.finished()]
    if missing:
        say_precision(missing, console)
    console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        local = LocalRuns(compare, progress)
        local.run_all(missing)
    return local


def report(
    compare: CompareSettings, runs: Sequence[PlannedRun], console: Console, command: str
) -> tuple[Results | None, int]:
    """The report of the finished runs, and 1 where they cannot be reported on."""
    done = [folder for run in runs if run.finished() for folder in run.folders()]
    if not done:
        return None, 0
    from pretrain.report.write import write_report

    try:
        results = write_report(
            done,
            compare.output / compare.report,
            published=compare.published,
            allow_mixed=shown_apart(compare),
            baseline=compare.baseline,
            evidence=compare.evidence,
            command=command,
            console=console,
        )
    except UserError as error:  # the runs stand, and what is missing of them is still to be told
        console.print(f"no report: {error}", highlight=False, soft_wrap=True, markup=False)
        return None, 1
    return results, 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the comparison, a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and each run's command, and exit")
    parser.add_argument(
        "--until", type=float, metavar="NATS", help="add seeds until every 95%% interval is so narrow; as until=NATS"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance seeds=[0,1] at_once=1")
    given = parser.parse_intermixed_args(arguments)
    if given.until is not None:
        given.overrides.append(f"until={given.until}")
    os.chdir(ROOT)  # paths in configurations are relative to the repository
    compare = read_compare(given.config, given.overrides)
    console = Console()
    if not given.dry_run and (taken := take_records(compare)):
        console.print(f"{taken} finished runs taken from records", highlight=False)
    runs = plan_runs(compare)
    best = plan_best(compare)  # refused here, before anything runs
    console.print(plan_table(runs))
    if cost := sweep_cost(compare):
        console.print(f"before them sweeps, of {cost:.0%} of their FLOPs", highlight=False)
    if compare.scheduler == "slurm":
        dry_run = ["--dry-run"] if given.dry_run else []
        submission = submit_command(compare, given.config, [*dry_run, *given.overrides])
        return subprocess.run(submission, check=False).returncode
    if given.dry_run:
        for run in [*(plan_round(compare, 0) if round_count(compare) else ()), *runs, *plan_noise(compare), *best]:
            console.print(shlex.join(local_command(compare, run)), highlight=False, soft_wrap=True, markup=False)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the runs as Ctrl-C does
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    prepare_data(runs[0].settings.data)
    command = shlex.join(["python", "launchers/compare.py", "--config", str(given.config), *given.overrides])
    with RunLock(compare.output):  # two at once would take each other's runs for failed ones
        return run_locally(compare, runs, console, command)


if __name__ == "__main__":
    run_command(main)
