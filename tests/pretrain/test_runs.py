"""`python -m pretrain.runs`: the list, what is pruned and what is not; figures that are missing or not finite."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_prep.settings import UserError
from pretrain.lock import RunLock
from pretrain.report.runs import read_runs, shown
from pretrain.report.write import write_report
from pretrain.runs import find_runs, main, status_of
from tests.helpers.runs import make_run


def add_checkpoints(folder: Path, *steps: int, **state: Any) -> None:
    for step in steps:
        path = folder / f"checkpoints/step-{step:08d}"
        path.mkdir(parents=True)
        (path / "COMMITTED.json").write_text("{}")
        (path / "state.json").write_text(json.dumps(state))
        (path / "tensors").write_bytes(b"x" * 1000)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in (folder / "checkpoints").iterdir())


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return " ".join(capsys.readouterr().out.split())


def test_each_runs_state_is_read_from_its_directory(tmp_path: Path) -> None:
    make_run(tmp_path / "done", "vanilla")
    stopped = make_run(tmp_path / "stopped", "vanilla", finished=False)
    (stopped / "requeue").touch()
    make_run(tmp_path / "dead", "vanilla", finished=False)
    (tmp_path / "dead/lock").touch()
    for path in (tmp_path / "dead").iterdir():
        os.utime(path, (time.time() - 9000,) * 2)
    live = make_run(tmp_path / "live", "vanilla", finished=False)
    (live / "lock").touch()
    states = {folder.name: status_of(folder).state for folder in find_runs([tmp_path])}
    assert states == {"done": "finished", "stopped": "stopped", "dead": "interrupted", "live": "running"}
    status = status_of(tmp_path / "dead")
    assert status.size == sum(p.stat().st_size for p in (tmp_path / "dead").iterdir())
    assert status.age == pytest.approx(9000, abs=100) and "validation" in status.loss


def test_the_list_survives_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (make_run(tmp_path / "a", "vanilla") / "metrics.jsonl").write_text("{torn")
    (make_run(tmp_path / "b", "vanilla") / "run.json").write_text("{torn")
    (make_run(tmp_path / "c", "vanilla") / "metrics.jsonl").unlink()
    assert listed(capsys, str(tmp_path)).count("interrupted") == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no run \(no run\.json\) in or below"):
        main([str(tmp_path / "empty")])


def test_checkpoints_are_pruned_after_a_dry_run_and_what_is_held_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", "vanilla")
    add_checkpoints(run, 1, 2, 3, 4, 5, cooldown_step=2)
    (run / "config.yaml").write_text("checkpoint: {milestone_every: 3}\n")
    live = make_run(tmp_path / "live", "vanilla", finished=False)
    add_checkpoints(live, 1, 2)
    (live / "lock").touch()
    text = listed(capsys, str(tmp_path), "--prune", "checkpoints")
    assert "2 folders" in text and "add --yes" in text and steps_of(run) == ["1", "2", "3", "4", "5"]
    listed(capsys, str(tmp_path), "--prune", "checkpoints", "--yes")
    assert steps_of(run) == ["2", "3", "5"] and steps_of(live) == ["1", "2"]
    (run / "final").mkdir()
    listed(capsys, str(tmp_path), "--prune", "checkpoints", "--keep", "0", "--yes")
    assert steps_of(run) == [] and steps_of(live) == ["1", "2"]


def test_whole_runs_are_removed_by_name_and_never_while_they_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, live = make_run(tmp_path / "run", "vanilla"), make_run(tmp_path / "live", "vanilla", finished=False)
    (live / "lock").touch()
    listed(capsys, str(run), "--prune", "runs")
    assert run.exists()
    for refused, words in ((tmp_path, "no run"), (live, "is running")):
        with pytest.raises(UserError, match=words):
            main([str(run), str(refused), "--prune", "runs", "--yes"])
    listed(capsys, str(run), "--prune", "runs", "--yes")
    assert not run.exists() and live.exists()


@pytest.mark.parametrize("kind", ["runs", "checkpoints"])
def test_nothing_is_pruned_under_a_process_whatever_the_clocks_say(tmp_path: Path, kind: str) -> None:
    """A host whose clock is ahead takes the last sign of life for an old one."""
    run = make_run(tmp_path / "run", "vanilla", finished=False)
    add_checkpoints(run, 1, 2)
    with RunLock(run, {}):
        for path in (run / "lock", run / "run.json", run / "metrics.jsonl"):
            os.utime(path, (time.time() - 9000,) * 2)
        with pytest.raises(UserError, match="is at work there"):
            main([str(run), "--prune", kind, "--yes"])
    assert steps_of(run) == ["1", "2"]


def test_watching_ends_when_no_run_is_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "vanilla", finished=False)
    (run / "lock").touch()
    os.utime(run / "lock", (time.time() - 178,) * 2)
    for name in ("run.json", "metrics.jsonl"):
        os.utime(run / name, (time.time() - 178,) * 2)
    text = listed(capsys, str(tmp_path), "--watch", "0.1")  # its last sign of life grows old meanwhile
    assert "interrupted" in text


@pytest.mark.parametrize(
    ("value", "text"), [(1.23456, "1.2346"), (None, "–"), (float("nan"), "–"), (float("inf"), "–")]
)
def test_a_figure_that_is_missing_or_not_finite_is_a_dash(value: float | None, text: str) -> None:
    assert shown(value) == text


def without_causal(folder: Path, **changes: Any) -> Path:
    """Take the causal loss from a made-up run."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [
        json.dumps({**line, **changes, **({"validation_loss": None} if "validation_loss" in line else {})})
        for line in lines
    ]
    path.write_text("\n".join(texts) + "\n")
    return folder


@pytest.mark.parametrize("changes", [{}, {"validation_loss_topk": None}])
def test_a_report_with_a_run_without_a_causal_loss(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_run(tmp_path / "vanilla", "vanilla", loss=3.0)
    without_causal(make_run(tmp_path / "none", "mor_expert_nr3", loss=2.9), **changes)
    results = write_report([tmp_path], tmp_path / "report", console=Console(file=io.StringIO(), width=100))
    losses = {row["name"]: row["validation_loss"] for row in results["variants"]}
    assert losses["mor_expert_nr3"] is None and losses["vanilla"] == pytest.approx(3.0)
    assert not results["differences"]
    assert any("no causal validation loss" in warning for warning in results["warnings"])
    alone = tmp_path / "alone"
    without_causal(make_run(alone / "none", "mor_expert_nr3"), **changes)
    assert write_report([alone], alone / "report", console=Console(file=io.StringIO()))["variants"]


def test_a_parent_and_its_flops_stand_apart_in_the_report(tmp_path: Path) -> None:
    parent = {"path": "runs/p", "step": 5, "take": "weights", "data": "fresh", "flops": 7e11, "counted": False}
    make_run(tmp_path / "child", "vanilla", parent=parent | {"architecture": "vanilla"})
    all_of_it = parent | {"take": "run", "counted": True, "architecture": "vanilla"}
    make_run(
        tmp_path / "again",
        "vanilla",
        parent=all_of_it,
        changes=[{"after_step": 3, "keys": {"evaluation.times": [1, 2]}}],
    )
    results = write_report([tmp_path], tmp_path / "report", console=Console(file=io.StringIO()))
    rows = {row["folder"].rpartition("/")[2]: row for row in results["runs"]}
    assert rows["child"]["own_flops"] == rows["child"]["flops"] and rows["child"]["parent_flops"] == 7e11
    assert rows["again"]["own_flops"] == pytest.approx(rows["again"]["flops"] - 7e11)
    assert "Runs that started from others" in (tmp_path / "report/report.md").read_text()
    told = "; ".join(results["warnings"])
    assert "leave out 7e+11 FLOPs" in told and "evaluation.times changed after step 3" in told


def test_an_old_ending_stands_beside_the_run_that_went_on(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "vanilla", budget=2e12, extensions=[{"budget": 1e12}])
    make_run(tmp_path / "run/branches/1e12", "vanilla", name="vanilla-1e12", epoch=1)
    runs, _ = read_runs([tmp_path / "run"])
    assert sorted(run.name for run in runs) == ["vanilla", "vanilla-1e12"]
