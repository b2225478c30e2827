"""Exact resume: whatever interrupts a run, its figures are those of a run that nothing interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.checkpoint import Checkpoints, folder_of, read_tensors
from pretrain.metrics import MetricsFile
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import figures, read_lines, settings_for, train, trainer_for

pytestmark = pytest.mark.oldest

RUN: dict[str, Any] = {
    "budget": {"steps": 12},
    "batch": {"micro_size": 2},
    "evaluation": {"times": 3},
    "checkpoint": {"every_steps": 4},
}


class Killed(BaseException):
    """Stands for the process's sudden end."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings_for(folder, data, "mor_token", **RUN))
    return folder


def last_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_tensors(max((run_dir / "checkpoints").glob("step-????????")))


def assert_same(run_dir: Path, whole: Path) -> None:
    """Every figure, and every weight and optimizer state at the end, are equal."""
    assert figures(read_lines(run_dir)) == figures(read_lines(whole))
    ours, theirs = last_tensors(run_dir), last_tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def die(after: int) -> Any:
    """A function that raises `Killed` on its call number `after`, in place of what it stands for before."""
    calls = 0

    def dying(original: Any) -> Any:
        def function(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                raise Killed
            return original(*arguments, **keywords)

        return function

    return dying


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (MetricsFile, "write", 3),  # before any checkpoint
        (MetricsFile, "write", 7),  # after the first one
        (MetricsFile, "write", 15),  # the last line
        (Checkpoints, "_publish", 2),  # everything is written but the marker
        (Checkpoints, "_write_tensors", 1),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_run_that_died_goes_on_to_the_same_figures(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    settings = settings_for(tmp_path, data, "mor_token", **RUN)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die(call)(getattr(owner, name)))
        with pytest.raises(Killed):
            trainer_for(settings).run()
    assert trainer_for(settings).run() == 0
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("architecture", "model"),
    [("mod", {}), ("ut", {}), ("early_exit", {"layer_dropout": 0.5, "layer_dropout_steps": 6})],
)
def test_other_ways_of_spending_depth_go_on_to_the_same_figures(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, model: dict[str, Any]
) -> None:
    """Of exits, which of them learn and how likely a layer is dropped hang on the step at which the run goes on."""
    run = RUN | {"budget": {"steps": 8}, "model": model}
    train(settings_for(tmp_path / "whole", data, architecture, **run))
    settings = settings_for(tmp_path / "died", data, architecture, **run)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", die(7)(MetricsFile.write))
        with pytest.raises(Killed):
            trainer_for(settings).run()
    assert trainer_for(settings).run() == 0
    assert_same(tmp_path / "died", tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {**RUN, "checkpoint": {"every_steps": 4, "keep": 3}}
    settings = settings_for(tmp_path, data, "mor_token", **run)
    train(settings)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))  # as if it had died before its last line
    (tensors,) = (tmp_path / "checkpoints/step-00000012/tensors").glob("*.distcp")
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    assert trainer_for(settings).run() == 0
    assert "step-00000012: passed over" in capsys.readouterr().out
    assert_same(tmp_path, whole)


def test_a_checkpoint_that_is_copied_beside_the_next_step_holds_the_tensors_of_its_own(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {**RUN, "checkpoint": {"every_steps": 4, "keep": 3, "asynchronous": False}}
    train(settings_for(tmp_path / "at_once", data, "mor_token", **run))
    copy, rule = Checkpoints._copy, {"every_steps": 4, "keep": 3, "asynchronous": True}

    def late_copy(*arguments: Any) -> Any:
        time.sleep(0.3)  # several steps, if none waited
        return copy(*arguments)

    monkeypatch.setattr(Checkpoints, "_copy", late_copy)
    lines = train(settings_for(tmp_path / "late", data, "mor_token", **run | {"checkpoint": rule}))
    for step in (4, 8, 12):
        ours, theirs = (read_tensors(folder_of(tmp_path / name / "checkpoints", step)) for name in ("late", "at_once"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (waited,) = [line["checkpoint_seconds"] for line in lines if line["step"] == 5 and "loss" in line]
    assert waited > 0.1  # the update of step 5 waited, and the line says so


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "seed"), [("mor_expert", 0), ("mor_token", 1), ("vanilla", 2)])
def test_sigkill_at_random_moments_changes_nothing(tmp_path: Path, data: Path, architecture: str, seed: int) -> None:
    run: dict[str, Any] = {"budget": {"steps": 60}, "evaluation": {"times": 4}}
    run["checkpoint"] = {"every_steps": 5, "asynchronous": seed != 1}
    train(settings_for(tmp_path / "whole", data, architecture, **run))
    settings = settings_for(tmp_path / "killed", data, architecture, **run)
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.killing", str(config), str(seed), "6"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["killed"] >= 3
    assert_same(tmp_path / "killed", tmp_path / "whole")
