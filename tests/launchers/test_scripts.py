"""The shell scripts parse, and exit statuses of ranks reach whoever started them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "launchers").glob("*.sh"), *(ROOT / "launchers").glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("ends", "status"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 137)])
def test_torchrun_passes_on_how_a_rank_ended(tmp_path: Path, ends: str, status: int) -> None:
    program = tmp_path / "rank.py"
    program.write_text(f"import os, sys\nif os.environ['RANK'] == '1': {ends}\n")
    command = [sys.executable, "launchers/torchrun.py", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("Root Cause" in done.stderr) == (status == 137)


@pytest.mark.slow
def test_torchrun_script_starts_the_ranks_asked_for(tmp_path: Path) -> None:
    """From another folder, in a copy where pretrain/main.py only says who it is."""
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    (tmp_path / "pretrain").mkdir()
    says = "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], sys.argv[1:], flush=True)"
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
        ([], 0, "runs/smoke\n"),
        (["run_dir="], 2, "error: configs/experiment/smoke.yaml: key 'run_dir' is required\n"),
    ],
)
def test_run_dir(arguments: list[str], status: int, says: str) -> None:
    command = [sys.executable, "launchers/run_dir.py", "--config", "configs/experiment/smoke.yaml", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout or done.stderr) == (status, says)
