"""metrics.jsonl survives a kill at any byte; W&B never ends a run; sums are exact."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import yaml

from data_prep.settings import UserError
from pretrain.metrics import LossSpikes, MetricsFile, Sums, Tracker, last_line, main, tracker_id
from tests.helpers.experiments import settings_for


def write_lines(path: Path, steps: list[int]) -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_beyond_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2, 3, 4])
    file = MetricsFile(path, 2)
    file.write({"step": 3, "loss": 0.1 + 0.2})
    file.close()
    assert steps_of(path) == [1, 2, 3]
    assert last_line(path) == {"step": 3, "loss": 0.1 + 0.2}


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00\n", "[]\n"])
def test_a_line_torn_by_a_kill_is_cut(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2])
    path.write_text(path.read_text() + torn)
    MetricsFile(path, 5).close()
    assert steps_of(path) == [1, 2]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", -1)
    file.write({"step": 1, "loss": float("nan"), "norm": float("inf")})
    file.close()
    assert last_line(tmp_path / "metrics.jsonl") == {"step": 1, "loss": None, "norm": None}


def test_sums_keep_large_counts_exact_and_scalars_apart_from_vectors() -> None:
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), all_reduce=lambda tensor: tensor * 2)
    sums = Sums()
    for _ in range(2):
        sums.add("pairs", torch.tensor([2**40 + 1, 3]))
        sums.add("loss", torch.tensor(0.5))
    assert sums.reduce(parallel) == {"pairs": [4.0 * (2**40 + 1), 12.0], "loss": 2.0}


def test_a_loss_that_stands_out_is_marked_and_the_usual_ones_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(400, generator=generator)).tolist()
    losses = [4 * 0.98**step + 3 + noise[step] for step in range(400)]  # falls, then hovers around 3
    losses[200] += 0.5
    losses[300] = float("nan")
    losses[310] -= 0.5
    spikes = LossSpikes()
    assert [step for step, loss in enumerate(losses) if spikes(loss)] == [200, 300]


def test_a_new_level_of_the_loss_becomes_the_rule() -> None:
    spikes = LossSpikes()
    for step in range(100):
        spikes(2.0 + 0.01 * (step % 3))
    marks = [spikes(3.0 + 0.01 * (step % 3)) for step in range(200)]
    assert all(marks[:5]) and not any(marks[100:])


def test_tracker_id_survives_a_resume_and_a_lost_folder(tmp_path: Path) -> None:
    first = tracker_id(tmp_path / "tracker", None)
    assert tracker_id(tmp_path / "tracker", "other") == first
    assert tracker_id(tmp_path / "moved", first) == first


def test_tracker_out_of_reach_warns_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**_: Any) -> None:
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", unreachable)
    settings = settings_for(tmp_path, tmp_path, tracker={"mode": "online"})
    tracker = Tracker(settings, tmp_path, "id")
    tracker.log({"step": 1})
    tracker.log({"step": 2})
    tracker.finish()
    assert capsys.readouterr().err.count("training goes on without it: no API key configured") == 1


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records of W&B's own file: a header of 7 bytes, then blocks of 32 KiB in the format of LevelDB's log, where
    each fragment has a checksum (4 bytes), a length (2) and a kind (1: whole, 2: first, 3: middle, 4: last).
    """
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too short for a fragment: padding
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def logged(folder: Path) -> list[int]:
    """Steps of the history rows in W&B's own file of a run, in order."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    steps = []
    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            steps.append(record.history.step.num)
    return steps


def test_tracker_logs_a_runs_own_steps_and_a_rebuilding_has_each_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a kill: the second folder repeats step 3 and begins where it does, and nowhere else."""
    settings = settings_for(tmp_path / "run", tmp_path, tracker={"mode": "offline"})
    lines = [{"step": step, "flops": 10 * step, "loss": 1.0 / step} for step in (1, 2, 3, 4)]
    lines += [{"step": 4, "flops": 40, "validation_loss": 0.2, "event": "finished"}]
    for number, part in enumerate((lines[:3], lines[2:])):
        tracker = Tracker(settings, tmp_path / f"part{number}", "abc123")
        for line in part:
            tracker.log(line)
        tracker.finish()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["sync", str(tmp_path / "run")]) == 0
    wandb.teardown()
    parts = [logged(next((tmp_path / f"part{number}").glob("wandb/offline-run-*"))) for number in (0, 1)]
    assert parts == [[1, 2, 3], [3, 4]]
    (rebuilt,) = (tmp_path / "run/tracker/rebuilt").glob("wandb/offline-run-*")
    assert logged(rebuilt) == [1, 2, 3, 4]
    assert f"wandb sync {rebuilt}" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_not_rebuilt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run with metrics\.jsonl"):
        main(["sync", str(tmp_path)])


def test_tracker_offline_uses_flops_as_the_x_axis(tmp_path: Path) -> None:
    tracker = Tracker(settings_for(tmp_path, tmp_path, tracker={"mode": "offline"}), tmp_path, "abc123")
    tracker.log({"step": 1, "flops": 10, "loss": 1.5, "depth_shares": [0.5, 0.5]})
    tracker.finish()
    wandb.teardown()  # the file is written by another process, which this waits for
    (record,) = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")
    content = record.read_bytes()
    assert b"depth_shares/1" in content
    assert b"flops" in content
