"""One corpus prepared by many Slurm tasks: datatrove's arrays, one a stage, each after the one before.

A job's script sets up the cluster's environment as every job here does (slurm.sh, site.sh) and goes back into the queue
when it is stopped; what a task does and what is done already, data_prep knows (engine.py, stages.py). The last job is
data_prep/prepare.py itself, which finds every part done, and writes the manifest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.config import DataSettings
from data_prep.engine import JOBS, Step, check_jobs, no_engine
from data_prep.files import write_json
from data_prep.manifest import read_manifest
from data_prep.prepare import begin, locked, prepare, summary
from data_prep.settings import UserError, load
from data_prep.stages import STAGES

REPOSITORY = Path(__file__).resolve().parent.parent
LOGS = "runs/slurm"
MOST_TASKS = 1000  # of an array, where Slurm is not set up for more
ALONE = {"tokenizer": 1}  # tasks of the stages that have one part
FINISH = "manifest"

# Before the command of a job. The function takes the place of datatrove's command of that name.
ENVIRONMENT = """cd {repository}
set -euo pipefail
source launchers/slurm.sh
export PYTHONPATH=$PWD${{PYTHONPATH:+:$PYTHONPATH}}
launch_pickled_pipeline() {{ interruptible -m datatrove.tools.launch_pickled_pipeline "$@"; }}"""


class Finish:
    """The step of the last job: write the manifest, and do what lacks."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings

    def __repr__(self) -> str:
        return f"manifest of {self.settings.folder}"

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        alone = self.settings.model_copy(update={"workers": 1})
        print(summary(Path(alone.folder), prepare(alone)))


def executor_class() -> type:
    """datatrove's Slurm executor without what a small cluster refuses: its job of statistics, memory where Slurm shares
    none out."""
    try:
        from datatrove.executor.slurm import SlurmPipelineExecutor
    except ImportError:
        raise no_engine() from None

    class Executor(SlurmPipelineExecutor):
        def launch_merge_stats(self) -> None:
            """Marks say what is done."""

        def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
            given = super().get_sbatch_args(max_array)
            for name in ("mem-per-cpu", *(["partition"] if not self.partition else [])):
                given.pop(name)
            return given

    return Executor


def executors(
    settings: DataSettings, names: Sequence[str], options: argparse.Namespace, asked: dict[str, Any], threads: int
) -> list[tuple[str, Any]]:
    """An executor for each of the stages `names`. asked: options of sbatch."""
    made, kind = [], executor_class()
    repository = shlex.quote(str(REPOSITORY))
    output = f"{LOGS}/%x-%A_%a.log"
    fixed = {"output": output, "error": output, "open-mode": "append", "signal": "B:USR1@60"}
    fixed |= {"kill-on-invalid-dep": "yes"}
    for name in names:
        step = Finish(settings) if name == FINISH else Step(settings, name, threads)
        logs = Path(settings.folder).resolve() / "work" / "logs" / name
        made.append(
            (
                name,
                kind(
                    [step],
                    tasks=1 if name == FINISH else ALONE.get(name, options.tasks),
                    time=options.time,
                    partition=options.cpu_partition or options.partition,
                    cpus_per_task=threads,
                    job_name=f"{name}-{Path(settings.folder).name}",
                    qos=options.qos or "",
                    env_command=ENVIRONMENT.format(repository=repository),
                    sbatch_args=fixed | asked,
                    max_array_size=MOST_TASKS,
                    logging_dir=str(logs),
                    slurm_logs_folder=LOGS,
                    skip_completed=False,
                    requeue_signals=None,  # slurm.sh puts this task alone back into the queue
                    mail_type="NONE",
                    with_srun=False,
                ),
            )
        )
    return made


def submit(options: argparse.Namespace, config: str, request: Callable[[], tuple[dict[str, Any], int]]) -> None:
    """Cut the corpus and submit the stages that are not done, or print their scripts.

    request: options of sbatch for one task, and its CPUs. Raises UserError for what would fail, and where earlier jobs
    are still at work on the folder.
    """
    if options.tasks > MOST_TASKS:
        raise UserError(f"--tasks={options.tasks}: Slurm's arrays commonly end at {MOST_TASKS} tasks; ask for fewer")
    settings = load(DataSettings, config, options.overrides)
    folder = Path(settings.folder)
    if read_manifest(folder) is not None:
        print(f"{folder}: finished; nothing to submit")
        return
    check_jobs(folder)
    asked, threads = request()
    if options.dry_run:
        show(executors(settings, lacking(folder), options, asked, threads))
        return
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, str] = {}
    os.environ["PYTHON"] = sys.executable
    with locked(folder):
        begin(settings)
        for name, executor in executors(settings, lacking(folder), options, asked, threads):
            executor.depends_job_id = next(reversed(numbers.values()), None)
            numbers[name] = launch(executor)
            write_json(folder / "work" / JOBS, numbers)
            print(f"{name}: job {numbers[name]}, {executor.tasks} task{'s' * (executor.tasks > 1)}")


def lacking(folder: Path) -> list[str]:
    """The stages that are not done, the manifest last."""
    return [*(name for name in STAGES if not (folder / "work" / f"{name}.json").exists()), FINISH]


def show(made: Sequence[tuple[str, Any]]) -> None:
    """Print a shell script that would submit the stages, once the corpus is cut."""
    last = None
    for name, executor in made:
        script = executor.get_launch_file_contents(
            executor.get_sbatch_args(executor.tasks),
            f"launch_pickled_pipeline {executor.logging_dir.resolve_paths('executor.pik')}",
        )
        after = f" --dependency=afterok:${last}" if last else ""
        print(f"{name}=$(sbatch --parsable --export=ALL,RUN_OFFSET=0{after} <<'END'\n{script.rstrip()}\nEND\n)")
        last = name


def launch(executor: Any) -> str:
    """Submit one stage; its job's number. Raises UserError with sbatch's message where it refuses."""
    from loguru import logger

    logger.disable("datatrove")
    try:
        executor.launch_job()
    except FileNotFoundError:
        raise UserError("no sbatch here: run this where Slurm is, or add --dry-run") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused the stage {executor.job_name}; what it said stands above ({error})") from None
    return str(executor.job_id)
