"""One process at a time in a run directory: who is refused, who takes over, and that the owner finds out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.settings import UserError
from pretrain import lock as lock_module
from pretrain.lock import LOCK, STALE_SECONDS, Owner, RunLock
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import read_lines, settings_for

JOB = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}


def left_by(folder: Path, age: float = 0.0, **changes: Any) -> Owner:
    """A lock in `folder` that another process left, touched `age` seconds ago."""
    owner = replace(Owner.this({}), **{"token": "other", **changes})
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    os.utime(folder / LOCK, (time.time() - age,) * 2)
    return owner


def take(folder: Path, **environment: str) -> RunLock:
    """Take and release the lock; the names that were in the folder while it was held must be its own alone."""
    with RunLock(folder, environment) as lock:
        assert [path.name for path in folder.iterdir()] == [LOCK]
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    return lock


def test_a_lock_leaves_nothing_behind(tmp_path: Path):
    take(tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    take(tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_second_process_is_refused_by_name(tmp_path: Path):
    with RunLock(tmp_path, {}), pytest.raises(UserError, match=f"process {os.getpid()} on .* is at work there"):
        take(tmp_path)
    take(tmp_path)


@pytest.mark.parametrize(
    ("owner", "age", "environment"),
    [
        ({"pid": 2**22 + 1}, 0, {}),  # no such process
        ({"started": "1"}, 0, {}),  # its number is another's now
        ({"host": "elsewhere"}, STALE_SECONDS + 60, {}),
        ({"host": "elsewhere", "job": "70_3"}, 0, {**JOB, "SLURM_RESTART_COUNT": "1"}),  # requeued on another node
    ],
    ids=["ended", "number taken", "unheard of", "requeued"],
)
def test_a_dead_owner_is_taken_over(tmp_path: Path, owner: dict, age: float, environment: dict[str, str]):
    left_by(tmp_path, age, **owner)
    take(tmp_path, **environment)


@pytest.mark.parametrize(
    ("owner", "age", "environment"),
    [
        ({"host": "elsewhere"}, STALE_SECONDS - 60, {}),
        ({"namespace": "pid:[1]", "pid": 2**22 + 1}, 0, {}),  # another container's process numbers say nothing here
        ({"host": "elsewhere", "job": "70_3"}, 0, JOB),
        ({"host": "elsewhere", "job": "70_4"}, 0, {**JOB, "SLURM_RESTART_COUNT": "1"}),  # a sibling of the array
        ({}, STALE_SECONDS + 60, {}),  # alive here, however silent
    ],
    ids=["heard of", "another container", "same start", "sibling", "stopped"],
)
def test_an_owner_that_may_live_is_left_alone(
    tmp_path: Path, owner: dict, age: float, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lock_module, "SAME_JOB_SECONDS", 0.0)
    left_by(tmp_path, age, **owner)
    before = (tmp_path / LOCK).read_text()
    with pytest.raises(UserError, match="is at work there"):
        take(tmp_path, **environment)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK] and (tmp_path / LOCK).read_text() == before


def test_a_killed_owner_is_taken_over_at_once(tmp_path: Path):
    hold = "import sys, time; from pathlib import Path; from pretrain.lock import RunLock\n"
    hold += "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {owner.pid}"):
        take(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    take(tmp_path)


@pytest.mark.slow
def test_a_second_command_in_a_run_directory_trains_nothing(tmp_path: Path):
    """The command itself, twice; the first is held still meanwhile, so that the second could do as it likes."""
    run, data, config = tmp_path / "run", tmp_path / "data", tmp_path / "experiment.yaml"
    prepare_tiny(data)
    settings = settings_for(run, data, budget={"steps": 60})
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "pretrain/main.py", "--config", str(config)]
    with subprocess.Popen(command) as first:
        try:
            wait_until(lambda: (run / "metrics.jsonl").is_file() and read_lines(run))
            first.send_signal(signal.SIGSTOP)
            second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        finally:
            first.send_signal(signal.SIGCONT)
    assert [line["step"] for line in read_lines(run) if "loss" in line] == list(range(1, 61))
    assert (first.returncode, second.returncode) == (0, 2), second.stderr
    assert f"process {first.pid} on" in second.stderr and "is at work there" in second.stderr


def hold_for_a_moment(folder: Path, number: int) -> None:
    """One of many: take the lock, check that nobody else is inside, leave."""
    for _ in range(5):
        while True:
            try:
                with RunLock(folder, {}):
                    inside = folder / "inside"
                    inside.touch(exist_ok=False)
                    time.sleep(0.002)
                    inside.unlink()
                break
            except UserError:
                time.sleep(0.003)
    (folder.parent / f"done-{number}").touch()


@pytest.mark.parametrize("links", [True, False])
def test_only_one_is_inside(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch):
    def no_links(*_: Any) -> None:
        raise PermissionError("this file system has no links")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    folder = tmp_path / "run"
    folder.mkdir()
    if links:
        left_by(folder, pid=2**22 + 1)  # all find a dead owner first
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hold_for_a_moment, args=(folder, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(folder.iterdir()) == []


def test_an_owner_whose_lock_was_taken_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    with RunLock(tmp_path, {}) as lock:
        (tmp_path / LOCK).unlink()  # deleted by hand: it comes back
        wait_until(lambda: (tmp_path / LOCK).exists() and (tmp_path / LOCK).read_text() != "")
        assert lock.failure is None
        left_by(tmp_path, host="elsewhere", job="5")
        wait_until(lambda: lock.failure is not None)
        assert "on elsewhere, Slurm job 5 has taken this run over" in str(lock.failure)
    assert "elsewhere" in (tmp_path / LOCK).read_text()  # not this process's to remove


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
