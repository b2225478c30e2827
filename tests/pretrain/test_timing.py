"""A step's seconds: every stretch belongs to one part, the late rank is named, a trace holds the step's operations."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.parallel import timing
from pretrain.parallel.timing import PARTS, StepClock
from tests.helpers.corpus import prepare_tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import read_lines, settings_for, train, trainer_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder)
    return folder


def test_every_stretch_belongs_to_the_part_that_was_named_last(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 3.5, 7.5, 8.0, 100.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    clock.begin("forward")  # validation, before any step: not counted, and asks no clock
    clock.restart()
    for part in ("data", "forward", "backward", "forward", "optimizer"):
        clock.begin(part)
    clock.stop()
    clock.begin("forward")
    expected = {"data": 1, "forward": 2 + 4, "backward": 0.5, "communication": 0, "checkpoint": 0, "optimizer": 0.5}
    assert clock.read() == expected
    clock.restart()
    assert next(times) == 100.0
    assert set(clock.read().values()) == {0.0}


def test_the_parts_add_up_to_the_step_and_checkpoints_are_told_once(tmp_path: Path, data: Path) -> None:
    settings = settings_for(tmp_path, data, checkpoint={"every_steps": 3}, metrics={"every_steps": 2})
    lines = [line for line in train(settings) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    waited = {line["step"]: line["checkpoint_seconds"] for line in lines}
    assert sorted(waited, key=lambda step: waited[step])[2:] in ([4, 8], [8, 4])
    for line in lines:
        parts = [line[f"{part}_seconds"] for part in PARTS if part != "checkpoint"]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(128 / line["tokens_per_second"], rel=0.1)
        assert "slowest_rank" not in line


def train_with_a_late_rank(run_dir: Path, data: Path) -> list[dict[str, Any]]:
    """Rank 1's loader takes 0.2 s longer in every step."""
    parallel = {"strategy": "ddp"}
    trainer = trainer_for(settings_for(run_dir, data, "vanilla", batch={"micro_size": 2}, parallel=parallel))
    take = trainer.loader.__class__.__next__

    def late(loader: Any) -> Any:
        time.sleep(0.2 * trainer.parallel.rank)
        return take(loader)

    trainer.loader.__class__.__next__ = late  # type: ignore[method-assign]
    assert trainer.run() == 0
    trainer.parallel.finish()
    return [line for line in read_lines(run_dir) if "loss" in line]


@pytest.mark.slow
def test_the_rank_that_others_wait_for_is_named(tmp_path: Path, data: Path) -> None:
    for line in run_ranks(train_with_a_late_rank, 2, tmp_path, data)[0][1:]:
        assert line["slowest_rank"] == 1
        assert line["slowest_rank_seconds"] - line["fastest_rank_seconds"] > 0.1
        assert line["backward_seconds"] > 0.1  # rank 0 waits there, in DDP's reduction of gradients


def test_chosen_steps_leave_a_trace(tmp_path: Path, data: Path) -> None:
    train(settings_for(tmp_path, data, "vanilla", budget={"steps": 3}, metrics={"profile_steps": [2]}))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step-00000002-rank-0.json"
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} <= names
