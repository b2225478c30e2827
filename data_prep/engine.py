"""Who does the parts of a stage: this process, several of this machine, a Ray cluster or Slurm's nodes.

datatrove starts and watches the tasks; `Step` is the one step of its pipelines. datatrove knows which tasks have ended,
the marks of the parts (stages.py) say what is done, so that another number of tasks goes on where the first ones were.
One process needs no engine.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from data_prep.config import DataSettings
from data_prep.progress import say, watching
from data_prep.settings import UserError
from data_prep.stages import STAGES, Stage, cores

SMALL = 4 << 20  # bytes, documents or tokens that are done sooner than processes start
TASKS_PER_WORKER = 8  # short tasks, so that workers end at about the same time


class Step:
    """One stage as a step of a datatrove pipeline: task `rank` of `world_size` does every world_size-th part."""

    def __init__(self, settings: DataSettings, stage: str, threads: int = 1) -> None:
        self.settings, self.stage, self.threads = settings, stage, threads

    def __repr__(self) -> str:
        return f"stage {self.stage} of {self.settings.folder}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a process of a pool does first: tracebacks, Ctrl-C and the end of all are the parent's affair."""
        self.__dict__.update(state)
        _quiet()
        _leave_with_parent()

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        stage = STAGES[self.stage](self.settings, self.threads)
        with told_in_job(stage):
            for line in stage.check():
                if rank == 0:
                    say(line)
            for part in stage.missing():
                if part % world_size == rank:
                    stage.do(part)


@contextmanager
def told_in_job(stage: Stage) -> Iterator[None]:
    """In a job of Slurm: end with the message of a UserError, and let the folder go on with the change it asks for."""
    try:
        yield
    except UserError as error:
        if "SLURM_JOB_ID" not in os.environ:
            raise
        (stage.work / "refused").touch()
        say(f"error: {error}")
        sys.exit(2)


def run_stage(settings: DataSettings, name: str) -> None:
    """Do what a stage lacks, with as many tasks at a time as the settings say."""
    workers = settings.workers or cores()
    stage = STAGES[name](settings, workers)
    if (stage.work / f"{name}.json").exists():
        return
    for line in stage.check():
        say(line)
    missing = stage.missing()
    with watching(stage, missing):
        sizes = stage.sizes()
        if workers == 1 or len(missing) <= 1 or sum(sizes[part] for part in missing) <= SMALL:
            for part in missing:
                stage.do(part)
        elif settings.executor == "ray":
            _ray(settings, stage, len(missing)).run()
        else:
            with _forks_leave_with_us():
                _watched(_local(settings, stage, len(missing), workers), settings)
    for part in range(len(stage.sizes())):  # what an interruption came before
        stage.free(part)
    stage.finished()


def _tasks(missing: int, workers: int) -> int:
    return min(missing, workers * TASKS_PER_WORKER)


def _local(settings: DataSettings, stage: Stage, missing: int, workers: int) -> Any:
    try:
        from datatrove.executor.local import LocalPipelineExecutor
    except ImportError:
        raise no_engine() from None
    _quiet()
    return LocalPipelineExecutor(
        [Step(settings, stage.name)],
        tasks=_tasks(missing, workers),
        workers=min(workers, missing),
        logging_dir=str(stage.work / "logs" / stage.name),
        skip_completed=False,
        # A forked child of a process whose tokenizer has run threads may hang.
        start_method="spawn",
    )


def _watched(executor: Any, settings: DataSettings) -> None:
    """Run a local executor. Its pool waits for ever for what a killed process was doing; raise UserError instead."""
    import multiprocess

    outcome: Future[None] = Future()

    def run() -> None:
        try:
            executor.run()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    tasks: dict[int, Any] = {}
    try:
        while not wait([outcome], 0.2).done:
            tasks |= {task.pid: task for task in multiprocess.active_children()}
            if any(task.exitcode for task in tasks.values()) and not wait([outcome], 5).done:
                raise UserError(
                    f"{settings.folder}: a task died, most likely for want of memory; work done is kept: run the same "
                    "command again with a smaller workers= or max_document_bytes="
                )
        outcome.result()
    finally:
        if not outcome.done():
            for task in multiprocess.active_children():
                task.kill()
                task.join()


def _ray(settings: DataSettings, stage: Stage, missing: int) -> Any:
    try:
        import ray
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise UserError("executor=ray needs the packages datatrove and ray: pip install datatrove ray") from None
    ray.init(address="auto", ignore_reinit_error=True)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return RayPipelineExecutor(
        [Step(settings, stage.name)],
        tasks=_tasks(missing, cpus),
        logging_dir=str(stage.work / "logs" / stage.name),
        skip_completed=False,
    )


def no_engine() -> UserError:
    """What is said where datatrove is not installed."""
    return UserError(
        "several tasks need the package datatrove: pip install -e '.[prepare]', or set workers=1 to use one process"
    )


def _quiet() -> None:
    """datatrove's log says what marks and progress say already."""
    from loguru import logger

    logger.disable("datatrove")


def _leave_with_parent() -> None:
    """In a process of a pool: end when the parent is gone, which must not leave workers that wait for ever."""
    import multiprocess

    parent = multiprocess.parent_process()
    if parent is None or threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if any(thread.name == "parent" for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


_forks_leave = False


def _in_fork() -> None:
    if _forks_leave and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


os.register_at_fork(after_in_child=_in_fork)


@contextmanager
def _forks_leave_with_us() -> Iterator[None]:
    """datatrove keeps its counters in a forked process, which would outlive this one if it were killed."""
    global _forks_leave
    _forks_leave = True
    try:
        yield
    finally:
        _forks_leave = False
