"""What the job scripts do when a run ends: back into the queue, or not. Real Slurm, real scripts, a made-up trainer.

The trainer behaves as pretrain/main.py does towards its launcher (checkpoints, the files `stop` and `requeue`, exit
codes) and needs a tenth of a second to start. It stands behind PYTHON, which the scripts start it with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.slurm import Slurm, wait_for

REASON = slurm.why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

TRAINER = r"""
import json, os, pathlib, signal, sys, time
given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
folder = pathlib.Path(given["run_dir"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write(os.environ["SLURM_JOB_ID"] + " " + os.environ["OMP_NUM_THREADS"] + "\n")
(folder / "config.yaml").touch()
for name in ("stop", "requeue"):
    (folder / name).unlink(missing_ok=True)
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
done = sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))
step, end = (done or [0])[-1], folder / "end"
while not end.exists() and not asked and not (folder / "stop").exists():
    step += 1
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step, "flops": step}) + "\n")
    time.sleep(0.1)
    if given.get("ends"):
        break
if not end.exists():
    if given.get("ends") != "stuck":
        made = folder / "checkpoints" / f"step-{step:08d}"
        made.mkdir()
        (made / "COMMITTED.json").write_text("{}")
    if given.get("ends") not in ("full",):
        (folder / "requeue").touch()
    sys.exit(74 if given.get("ends") == "full" else 75)
with open(folder / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": step, "loss": 1 / step, "flops": step, "event": "finished"}) + "\n")
"""
# What `$PYTHON SCRIPT ...` comes to: the made-up trainer for the ranks, the arguments of a task's run, else Python.
PYTHON = r"""#!/bin/bash
here=$(dirname "$(realpath "$0")")
if [[ $1 == launchers/torchrun.py ]]; then
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

    def submit(self, tasks: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        output = [f"--output={self.folder}/%A_%a.log", f"--array={tasks}", *options]
        number = self.cluster.submit(*output, "launchers/compare_array.sbatch", str(self.folder), *arguments)
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

    def stop(self, number: str, task: int) -> None:
        """The signal that Slurm sends before the time limit, to this task alone; wait until the task is back."""
        before = self.starts(task)
        self.cluster.call("scancel", "--signal=USR1", "--batch", f"{number}_{task}")
        wait_for(f"task {task} to be back", lambda: self.starts(task) > before, 60)


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
    wait_for("all tasks to train", lambda: all(queue.step(task) for task in (0, 1, 2)), 60)
    for task in (0, 1, 2):
        queue.stop(number, task)
    assert [queue.starts(task) for task in (0, 1, 2)] == [2, 2, 2]
    queue.end(number, 0, 1)
    queue.stop(number, 2)
    queue.end(number, 2)
    assert [queue.starts(task) for task in (0, 1, 2)] == [2, 2, 3]
    assert [queue.cluster.job(f"{number}_{task}")["Restarts"] for task in (0, 1, 2)] == ["1", "1", "2"]
