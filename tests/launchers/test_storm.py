"""A storm over an array of four runs on a real Slurm: ten stops, kills and full disks at random moments, drawn from a
seed. Every run then has the curve and the weights of the same run left alone, bit for bit.

Stops come as the signal of a scheduler to the job script and as SIGTERM to the rank: the task goes back into the queue
by itself. A kill (SIGKILL to the rank) and a full disk (each run has a small file system of its own, which is filled to
the last byte) end the job, and nothing but a new submission, with room again, starts it anew: what a user would do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers import slurm
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import figures, read_lines, settings_for, train
from tests.helpers.slurm import Slurm

REASON = slurm.why_not()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]

SEED, STEPS = 12, 120
KINDS = ["signal", "term", "kill", "full"] * 2 + ["signal", "full"]
ARCHITECTURES = ("vanilla", "recursive", "mor_expert", "mor_token")
CHANGES = {
    "budget": {"steps": STEPS},
    "evaluation": {"times": 4, "sequences": 4},
    "checkpoint": {"every_steps": 9, "keep": 2, "asynchronous": True},
}
ARRAY = """#!/bin/bash
cd "$SLURM_SUBMIT_DIR"
set -- --config "$1/$SLURM_ARRAY_TASK_ID.yaml"
source launchers/pretrain.sbatch
"""


@dataclass
class StormyRun:
    """One task of the array. disk: its file system. blows: what is to come, and from which step on."""

    task: int
    disk: Path
    blows: list[tuple[int, str]]
    number: str = ""
    struck: str = ""  # the blow whose consequence is waited for
    seen: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.disk / "run"

    def step(self) -> int:
        """The last whole line's step, as the file has it at this moment."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return json.loads((self.folder / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()[-1])[
                "step"
            ]
        return 0

    def process(self) -> int | None:
        """The rank that holds the run directory's lock, if it runs."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            number = json.loads((self.folder / "lock").read_text())["pid"]
            os.kill(number, 0)
            return number
        return None


@dataclass
class Storm:
    """Runs the array to its end through everything that is drawn for it."""

    cluster: Slurm
    folder: Path
    runs: list[StormyRun]

    def submit(self, tasks: str) -> str:
        options = [f"--output={self.folder}/%A_%a.log", f"--array={tasks}", "--cpus-per-task=1", "--open-mode=append"]
        return self.cluster.submit(*options, str(self.folder / "array.sbatch"), str(self.folder))

    def strike(self, run: StormyRun, process: int) -> None:
        _, run.struck = run.blows.pop(0)
        run.seen.append(run.struck)
        if run.struck == "kill":
            os.kill(process, signal.SIGKILL)
        elif run.struck == "full":
            with contextlib.suppress(OSError), open(run.disk / "ballast", "wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(4096))
        else:
            target = ["--signal=USR1", "--batch"] if run.struck == "signal" else ["--signal=TERM"]
            self.cluster.call("scancel", *target, run.number)

    def follow(self, run: StormyRun) -> bool:
        """One look at a run: strike it, or submit it again once it has ended; whether it is done."""
        process = run.process()
        if process is not None:
            if run.blows and not run.struck and run.step() >= run.blows[0][0]:
                self.strike(run, process)
            return False
        job = self.cluster.job(run.number)
        if job["JobState"] == "FAILED":
            assert run.struck in ("kill", "full"), f"{run.struck or 'nothing'} made it fail: {self.log(run)}"
            wanted = {"kill": "137:0", "full": "74:0"}[run.struck]
            assert job["ExitCode"] == wanted, f"after {run.struck}: {job['ExitCode']}: {self.log(run)}"
            (run.disk / "ballast").unlink(missing_ok=True)
            run.number, run.struck = f"{self.submit(str(run.task))}_{run.task}", ""
        elif job["JobState"] == "PENDING" and run.struck:
            assert run.struck in ("signal", "term"), f"after {run.struck} it was put back by itself: {self.log(run)}"
            run.struck = ""
        return job["JobState"] == "COMPLETED"

    def rage(self, seconds: float) -> None:
        number = self.submit(f"0-{len(self.runs) - 1}")
        for run in self.runs:
            run.number = f"{number}_{run.task}"
        limit, going = time.monotonic() + seconds, list(self.runs)
        while going:
            assert time.monotonic() < limit, "\n".join(self.log(run) for run in going)
            going = [run for run in going if not self.follow(run)]
            time.sleep(0.05)

    def log(self, run: StormyRun) -> str:
        return f"run {run.task}, step {run.step()}, {run.seen}\n{self.cluster.output(run.number)[-3000:]}"


def draw(chance: random.Random, disks: list[Path]) -> list[StormyRun]:
    """Ten blows over four runs, at least two each, at steps that lie apart and before the last third."""
    kinds = KINDS.copy()
    chance.shuffle(kinds)
    shares = [2, 2, 3, 3]
    chance.shuffle(shares)
    runs = []
    for task, (disk, share) in enumerate(zip(disks, shares, strict=True)):
        steps = sorted(chance.sample(range(4, STEPS * 2 // 3, 7), share))
        runs.append(StormyRun(task, disk, list(zip(steps, [kinds.pop() for _ in range(share)], strict=True))))
    return runs


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Path]]:
    """A file system of 24 MiB for each run."""
    made: list[Path] = []
    for name in ARCHITECTURES:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
        made.append(folder)
    try:
        yield made
    finally:
        for folder in made:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_what_comes_through_a_storm_equals_what_was_left_alone(
    cluster: Slurm, tmp_path: Path, disks: list[Path]
) -> None:
    prepare_tiny(tmp_path / "data", samples=160)
    (tmp_path / "array.sbatch").write_text(ARRAY)
    storm = Storm(cluster, tmp_path, draw(random.Random(SEED), disks))
    for run, name in zip(storm.runs, ARCHITECTURES, strict=True):
        settings = settings_for(run.folder, tmp_path / "data", name, **CHANGES)
        (tmp_path / f"{run.task}.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    storm.rage(900)
    assert sorted(kind for run in storm.runs for kind in run.seen) == sorted(KINDS)

    torch.set_num_threads(1)
    for run, name in zip(storm.runs, ARCHITECTURES, strict=True):
        alone = tmp_path / "alone" / name
        undisturbed = train(settings_for(alone, tmp_path / "data", name, **CHANGES))
        assert figures(read_lines(run.folder)) == figures(undisturbed), storm.log(run)
        weights = "final/model.safetensors"
        assert (run.folder / weights).read_bytes() == (alone / weights).read_bytes(), storm.log(run)
