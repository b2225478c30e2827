"""What the job scripts do when a run ends: back into the queue, or not. Real Slurm, real scripts, a made-up trainer.

The trainer behaves as pretrain/main.py does towards its launcher (checkpoints, the files `stop` and `requeue`, exit
codes) and needs a tenth of a second to start. It stands behind PYTHON, which the scripts start it with.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.slurm import REPOSITORY, Slurm, wait_for

REASON = slurm.why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

TRAINER = r"""
import json, os, pathlib, signal, sys, time
task = os.environ["SLURM_ARRAY_TASK_ID"]
given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
folder = pathlib.Path(given["run_dir"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    names = ("SLURM_JOB_ID", "OMP_NUM_THREADS", "SITE", "IN_CONTAINER")
    file.write(" ".join(os.environ.get(name, "-") for name in names) + "\n")
(folder / "config.yaml").touch()
for name in ("stop", "requeue"):
    (folder / name).unlink(missing_ok=True)
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
ends = dict(part.split(":") for part in given.get("ends", "").split(",") if part).get(task)
done = sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))
step, end = (done or [0])[-1], folder / "end"
while not end.exists() and not asked and not (folder / "stop").exists():
    step += 1
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step, "flops": step}) + "\n")
    time.sleep(0.1)
    if ends:
        break
if not end.exists():
    if ends not in ("stuck", "full"):
        made = folder / "checkpoints" / f"step-{step:08d}"
        made.mkdir()
        (made / "COMMITTED.json").write_text("{}")
    (folder / "requeue").touch()
    sys.exit(74 if ends == "full" else 75)
with open(folder / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": step, "loss": 1 / step, "flops": step, "event": "finished"}) + "\n")
"""
# What `$PYTHON SCRIPT ...` comes to: the made-up trainer for the ranks, the arguments of a task's run, else Python.
PYTHON = r"""#!/bin/bash
here=$(dirname "$(realpath "$0")")
if [[ $1 == launchers/torchrun.py || $1 == pretrain/main.py ]]; then
    while [[ $1 != pretrain/main.py ]]; do shift; done
    exec REAL "$here/trainer.py" "${@:2}"
elif [[ $1 == launchers/submit.py ]]; then
    printf '%s\n' --config configs/experiment/smoke.yaml "run_dir=$4/run $3" "${@:5}"
else
    exec REAL "$@"
fi
"""


@dataclass
class Queue:
    """Submits arrays of made-up runs. folder: of their run directories and logs; its name has a space."""

    cluster: Slurm
    folder: Path
    numbers: list[str] = field(default_factory=list)

    def submit(self, tasks: str, *arguments: str, options: tuple[str, ...] = (), folder: Path = REPOSITORY) -> str:
        """Submit from `folder`, a copy of the repository; the array's number."""
        command = ["sbatch", "--parsable", f"--output={self.folder}/%A_%a.log", f"--array={tasks}", *options]
        command += ["launchers/compare_array.sbatch", str(self.folder), *arguments]
        number = self.cluster.call(*command, folder=folder)
        self.numbers.append(number)
        return number

    def run(self, task: int) -> Path:
        return self.folder / f"run {task}"

    def starts(self, task: int) -> int:
        path = self.run(task) / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def step(self, task: int) -> int:
        path = self.run(task) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def end(self, number: str, *tasks: int) -> None:
        """Let these tasks finish, and wait for them."""
        for task in tasks:
            (self.run(task) / "end").touch()
        for task in tasks:
            self.cluster.wait(f"{number}_{task}", 60)

    def wait_to_train(self, *tasks: int, starts: int = 1) -> None:
        """Wait until these tasks have been started so many times and have taken a step since."""
        for task in tasks:
            wait_for(f"task {task} to start", lambda task=task: self.starts(task) >= starts, 60)
            step = self.step(task)
            wait_for(f"task {task} to train", lambda task=task, step=step: self.step(task) > step, 60)

    def stop(self, number: str, task: int) -> None:
        """The signal that Slurm sends before the time limit, to this task alone; wait until its trainer has ended."""
        self.cluster.call("scancel", "--signal=USR1", "--batch", f"{number}_{task}")
        wait_for(f"task {task} to stop", (self.run(task) / "requeue").exists, 60)

    def log(self, number: str, task: int) -> str:
        return (self.folder / f"{number}_{task}.log").read_text()


@pytest.fixture
def queue(cluster: Slurm, tmp_path: Path) -> Iterator[Queue]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "trainer.py").write_text(TRAINER)
    (tmp_path / "bin" / "python").write_text(PYTHON.replace("REAL", sys.executable))
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "some runs").mkdir()
    before = dict(cluster.environment)
    cluster.environment["PYTHON"] = str(tmp_path / "bin" / "python")
    queue = Queue(cluster, tmp_path / "some runs")
    yield queue
    cluster.environment = before
    cluster.call("scancel", "--quiet", *queue.numbers, check=False)


def test_each_task_of_an_array_goes_on_by_itself(queue: Queue) -> None:
    """Also the last, whose job id is the array's: with its siblings running, and once they have finished."""
    number = queue.submit("0-2")
    queue.wait_to_train(0, 1, 2)
    for task in (0, 1, 2):
        queue.stop(number, task)
    queue.wait_to_train(0, 1, 2, starts=2)
    queue.end(number, 0, 1)
    queue.stop(number, 2)
    queue.wait_to_train(2, starts=3)
    queue.end(number, 2)
    assert [queue.starts(task) for task in (0, 1, 2)] == [2, 2, 3]
    assert [queue.cluster.job(f"{number}_{task}")["Restarts"] for task in (0, 1, 2)] == ["1", "1", "2"]
    assert json.loads((queue.run(2) / "requeues.json").read_text())["total"] == 2


def test_ranks_that_get_sigterm_come_back_and_a_silent_controller_is_asked_again(queue: Queue) -> None:
    """As of a pre-emption that signals the steps alone; squeue fails, and scontrol refuses the first request."""
    for name, real in (("squeue", None), ("scontrol", shutil.which("scontrol"))):
        stand_in = queue.folder.parent / "bin" / name
        tries = f'echo >>"{queue.folder}/tries"; (($(wc -l <"{queue.folder}/tries") > 1)) || exit 1'
        refuses = f'[[ $1 != requeue ]] || {{ {tries}; }}; exec {real} "$@"' if real else "exit 1"
        stand_in.write_text(f"#!/bin/bash\n{refuses}\n")
        stand_in.chmod(0o755)
    queue.cluster.environment["PATH"] = f"{queue.folder.parent}/bin:{queue.cluster.environment['PATH']}"
    number = queue.submit("0")
    queue.wait_to_train(0)
    queue.cluster.call("scancel", "--signal=TERM", f"{number}_0")
    queue.wait_to_train(0, starts=2)
    queue.end(number, 0)
    assert "checkpoint written: back into the queue" in queue.log(number, 0)
    assert len((queue.folder / "tries").read_text()) == 2


def test_a_run_that_gets_no_further_is_not_put_back_for_ever(queue: Queue) -> None:
    """Task 0 never saves a step; task 1 saves one a start; task 2 could not save, and is not put back at all."""
    queue.cluster.environment["REQUEUE_LIMIT"] = "1"
    number = queue.submit("0-2", "ends=0:stuck,1:step,2:full")
    for task in (0, 2):
        queue.cluster.wait(f"{number}_{task}", 60, ("FAILED",))
    assert (queue.starts(0), queue.starts(2)) == (2, 1)
    assert "put back into the queue 1 times without a checkpoint beyond" in queue.log(number, 0)
    wait_for("the third start of task 1", lambda: queue.starts(1) >= 3, 60)


def test_site_sh_and_threads_that_fit(queue: Queue, tmp_path: Path) -> None:
    """In a copy of the repository, for the file is the cluster's own: environment, container, CPUs shared by ranks."""
    copy = tmp_path / "a copy"
    for name in ("launchers", "data_prep", "configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "launchers" / "site.sh").write_text(
        'module() { echo module $UNSET_ELSEWHERE "$@"; }; module load cuda\nexport SITE=yes\n'
        f"CONTAINER=(env IN_CONTAINER=yes)\nexport PYTHON={shlex.quote(queue.cluster.environment['PYTHON'])}\n"
    )
    for name in ("OMP_NUM_THREADS", "PYTHON"):
        queue.cluster.environment.pop(name, None)
    queue.cluster.environment["RANKS_PER_NODE"] = "2"
    number = queue.submit("0", options=("--cpus-per-task=4",), folder=copy)
    queue.wait_to_train(0)
    queue.end(number, 0)
    _, threads, site, container = (queue.run(0) / "starts").read_text().split()
    assert (threads, site, container) == ("2", "yes", "yes")
    assert "module load cuda" in queue.log(number, 0)
