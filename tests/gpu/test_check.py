"""The one-command GPU check in its tiny mode on this machine: every section ends, and a failure is told as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def check(out: Path, *options: str) -> tuple[int, list[dict], str]:
    command = [sys.executable, "-m", "tests.gpu.check", "--out", str(out), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert (out / "results.jsonl").exists(), ended.stderr[-2000:]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return ended.returncode, lines, (out / "results.md").read_text()


@pytest.mark.slow
def test_the_whole_check_runs_small_on_this_machine(tmp_path: Path):
    code, lines, page = check(tmp_path, "--tiny", "--only", "environment,parity,waits,run,train,engine")
    assert code == 0, page
    sections = {line["section"] for line in lines}
    assert {"environment", "parity", "causality", "waits", "run", "train", "engine", "done"} <= sections
    assert lines[-1] == {"section": "done", "at": lines[-1]["at"], "beyond_their_bar": 0}
    (trained,) = (line for line in lines if line.get("what") == "last loss minus first")
    assert trained["steps"] >= 3 and trained["value"] < 0
    assert "| parity | fp32, worst gradient |" in page and "**beyond**" not in page


def test_what_is_beyond_its_bar_is_told_and_ends_with_1(tmp_path: Path, monkeypatch):
    from tests.gpu import check as module

    monkeypatch.setattr(module, "ERRORS", dict.fromkeys(module.ERRORS, -1.0))
    monkeypatch.setattr(module, "VARIANTS", ("vanilla",))
    monkeypatch.setattr(sys, "argv", ["check", "--tiny", "--only", "parity", "--out", str(tmp_path)])
    assert module.main() == 1
    page = (tmp_path / "results.md").read_text()
    assert page.count("**beyond**") == 8 and "8 of 8 beyond their bar" in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_every_variant_on_the_gpu_equals_the_cpu_and_nothing_waits(tmp_path: Path):
    code, _, page = check(tmp_path, "--only", "environment,parity,waits")
    assert code == 0, page
