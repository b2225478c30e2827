"""Who does the parts of a stage: this process, several of this machine, a Ray cluster or Slurm's nodes.

datatrove starts and watches the tasks; `Step` is the one step of its pipelines. datatrove knows which tasks have ended,
the marks of the parts (stages.py) say what is done, so that another number of tasks goes on where the first ones were.
One process needs no engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from data_prep.config import DataSettings
from data_prep.progress import say, watching
from data_prep.settings import UserError
from data_prep.stages import STAGES, Stage, cores

JOBS = "jobs.json"  # numbers of the jobs of Slurm that prepare a folder, in its work
REFUSAL = "ray-refusal"  # what a task on a Ray cluster refused, in a folder's work
SMALL = 4 << 20  # bytes, documents or tokens that are done sooner than processes start
GRACE = 10.0  # seconds in which tasks that have ended are told
TASKS_PER_WORKER = 8  # short tasks, so that workers end at about the same time


# Of a process of a pool, whose tasks are all of one stage: what a task has read (tokenizer, marks) serves the next.
_OPEN: dict[tuple[str, str], Stage] = {}


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
        key = (str(self.settings.folder), self.stage)
        stage = _OPEN.setdefault(key, STAGES[self.stage](self.settings, self.threads))
        with told_in_job(stage):
            self.do(stage, rank, world_size)

    def do(self, stage: Stage, rank: int, world_size: int) -> None:
        for line in stage.check():
            if rank == 0:
                say(line)
        for part in stage.missing():
            if part % world_size == rank:
                stage.do(part)


class RayStep(Step):
    """The same for a Ray cluster, whose workers begin in a folder of their own, and whose errors datatrove keeps."""

    def __init__(self, settings: DataSettings, stage: str) -> None:
        super().__init__(settings, stage)
        self.began_in = os.getcwd()

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        os.chdir(self.began_in)
        stage = STAGES[self.stage](self.settings)
        try:
            self.do(stage, rank, world_size)
        except UserError as error:
            (stage.work / REFUSAL).write_text(str(error), encoding="utf-8")
            raise


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
            _ray(settings, stage, len(missing))
        else:
            _local(stage, workers)
    for part in range(len(stage.sizes())):  # what an interruption came before
        stage.free(part)
    stage.finished()


def _tasks(missing: int, workers: int) -> int:
    return min(missing, workers * TASKS_PER_WORKER)


def _local(stage: Stage, workers: int) -> None:
    """Do what a stage lacks in processes of this machine, which a process of its own leads.

    datatrove's pool would wait for ever for a process that was killed, and cannot be taken down then: the leader can.
    """
    if importlib.util.find_spec("datatrove") is None:
        raise no_engine()
    import multiprocess

    # Not forked from here: a forked child of a process whose tokenizer has run threads may hang. The server that it is
    # forked from has imported what tasks need, once for all stages.
    context = multiprocess.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.engine", "datatrove.executor.local"])
    told, tell = context.Pipe(duplex=False)
    leader = context.Process(target=_lead, args=(stage.settings, stage.name, workers, tell))
    try:
        with _importable():
            leader.start()
        process = psutil.Process(leader.pid)
    except (EOFError, ConnectionError, psutil.NoSuchProcess):  # a kill hit the server or the leader at once
        raise _ended(stage) from None
    tell.close()
    try:
        error = _word(stage, leader, process, told)
        if error is not None:
            raise error
        leader.join(GRACE)
    except (EOFError, ConnectionError):  # a task's, whose counters are kept by a process of datatrove's that was killed
        raise _ended(stage) from None
    finally:
        for task in [process, *_below(process)]:  # its own `kill` does nothing once the server has died
            with contextlib.suppress(psutil.NoSuchProcess):
                task.kill()
        leader.join()


def _word(stage: Stage, leader: Any, process: psutil.Process, told: Any) -> Exception | None:
    """Wait until the tasks have ended, all of them or one by a kill; what is missing then decides, not who died."""
    born: set[int] = set()
    while True:
        # Once a process has died, the pool may never end: the others have GRACE to show that it has ended already.
        # Programs that a task runs, as dpkg-deb, come and go: its own children are none of the pool's.
        present = {task.pid for task in _below(process, recursive=False)}
        dead = born - present or not leader.is_alive()
        born |= present
        if told.poll(GRACE if dead else 0.5):
            try:
                word = told.recv()
            except EOFError:
                break
            if not isinstance(word, int):
                return word
            born.add(word)
        elif dead:
            break
    if not stage.missing():
        return None
    return UserError(
        f"{stage.folder}: a task died, most likely for want of memory; work done is kept: run the same command "
        "again with a smaller workers= or max_document_bytes="
    )


def _ended(stage: Stage) -> UserError:
    return UserError(f"{stage.folder}: the tasks were ended; work done is kept: run the same command again")


@contextmanager
def _importable() -> Iterator[None]:
    """Let a fork server that starts find what this process imports; unlike spawned processes it is not told."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent.parent), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _below(process: psutil.Process, recursive: bool = True) -> list[psutil.Process]:
    """Living descendants of a process, or its children alone."""
    try:
        return process.children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []


def _lead(settings: DataSettings, name: str, workers: int, tell: Any) -> None:
    """In the leading process: run datatrove's executor; tell the numbers of its processes, then None or the error."""
    import multiprocess
    from datatrove.executor.local import LocalPipelineExecutor

    _quiet()
    _leave_with_parent()
    method = "spawn"
    if sys.platform == "linux":  # datatrove keeps its counters in one more process, which would outlive this one
        method = "fork"  # no tokenizer has run here
        os.register_at_fork(after_in_child=functools.partial(_born, tell, os.getpid()))
        multiprocess.set_start_method(method, force=True)
    stage = STAGES[name](settings)
    missing = len(stage.missing())
    executor = LocalPipelineExecutor(
        [Step(settings, name)],
        tasks=_tasks(missing, workers),
        workers=min(workers, missing),
        logging_dir=str(stage.work / "logs" / name),
        skip_completed=False,
        start_method=method,
    )
    try:
        executor.run()
    except Exception as error:
        tell.send(error)
    else:
        tell.send(None)


def _born(tell: Any, leader: int) -> None:
    """In a forked process: do not outlive a parent that is killed; tell the number of one of the leader's own."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == leader:
        tell.send(os.getpid())


def _ray(settings: DataSettings, stage: Stage, missing: int) -> None:
    """Do what a stage lacks on a Ray cluster that runs. Raises UserError as a task did."""
    try:
        import ray
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise UserError("executor=ray needs the packages datatrove and ray: pip install datatrove ray") from None
    _quiet()
    ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False, logging_level="warning")
    cpus = int(ray.cluster_resources().get("CPU", 1))
    refusal = stage.work / REFUSAL
    refusal.unlink(missing_ok=True)
    RayPipelineExecutor(
        [RayStep(settings, stage.name)],
        tasks=_tasks(missing, cpus),
        logging_dir=str((stage.work / "logs" / stage.name).resolve()),
        skip_completed=False,
    ).run()
    if refusal.exists():
        raise UserError(refusal.read_text(encoding="utf-8"))


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


def check_jobs(folder: Path) -> None:
    """Raise UserError where jobs of Slurm, other than this one, wait for work on `folder` or are at it."""
    path = folder / "work" / JOBS
    if not path.exists():
        return
    numbers = json.loads(path.read_text(encoding="utf-8")).values()
    if os.environ.get("SLURM_ARRAY_JOB_ID") in numbers:
        return
    alive = living(numbers)
    if alive:
        raise UserError(f"{folder}: job{'s' * (len(alive) > 1)} {', '.join(alive)} prepare it; scancel them first")


def living(numbers: Iterable[str]) -> list[str]:
    """Those of these jobs that wait or run."""
    alive = []
    for number in numbers:
        with contextlib.suppress(FileNotFoundError):
            command = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
            done = subprocess.run(command, text=True, capture_output=True, check=False)
            if done.returncode == 0 and done.stdout.strip():
                alive.append(number)
    return alive
