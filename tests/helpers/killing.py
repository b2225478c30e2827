"""Kill a training run again and again: `python -m tests.helpers.killing CONFIG SEED KILLS`.

Everything is imported once; each attempt is a fork that trains, and that gets SIGKILL after a random number of further
steps, however fast they are, every other time while a checkpoint is being written. The last attempt is left alone.
Prints how many attempts died in which way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from pretrain.config import read_settings
from tests.helpers.experiments import trainer_for


def attempt(config: str) -> int:
    """Start a training process; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        os._exit(trainer_for(read_settings(config)).run())
    finally:
        os._exit(99)


def saving(folder: Path, before: set[str]) -> bool:
    """Whether a checkpoint is being written that was not there before."""
    return any(path.name not in before for path in folder.glob("*.partial"))


def recorded(metrics: Path) -> int:
    """Lines that the run has written by now."""
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def ended(child: int) -> bool:
    """Whether a process has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(config: str, seed: int, kills: int) -> dict[str, int]:
    """Run until `kills` attempts have been killed, then to the end; returns the counts."""
    chance, counts = random.Random(seed), {"killed": 0, "while_saving": 0}
    run_dir = read_settings(config).run_dir
    folder, metrics = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    while counts["killed"] < kills:
        in_save, enough = counts["killed"] % 2 == 0, recorded(metrics) + chance.randint(0, 7)
        before = {path.name for path in folder.glob("*.partial")}
        child = attempt(config)
        while not (ended(child) or recorded(metrics) >= enough or (in_save and saving(folder, before))):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        counts["while_saving"] += saving(folder, before)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, status
            break  # it had finished before the kill came
        counts["killed"] += 1
    _, status = os.waitpid(attempt(config), 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    return counts


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
