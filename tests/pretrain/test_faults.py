"""Faults, seeded and bounded: kills at random moments and inside a save, a rank that stalls, a full disk on one rank, a
gradient that is not finite on one rank, a rank without tokens at a depth. After each, the losses are those of the run
that nothing happened to."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain import trainer as trainer_module
from pretrain.manifest import Manifest
from pretrain.parallel.start import start_parallel
from pretrain.parallel.watchdog import STALLED, Beat, Watchdog
from pretrain.trainer import Trainer
from tests.helpers.corpus import prepare_tiny
from tests.helpers.distributed import Ranks, run_ranks, start_ranks
from tests.helpers.experiments import figures, read_lines, settings_for, trainer_for

pytestmark = pytest.mark.oldest

STEPS = 20
SINGLE = {"strategy": "single"}
# name: (ranks, parallel section)
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"strategy": "ddp"}),
    "zero1": (2, {"strategy": "zero1"}),
    "zero2": (2, {"strategy": "zero2"}),
    "zero3": (2, {"strategy": "zero3"}),
    "zero3_offload": (2, {"strategy": "zero3", "offload_optimizer": True}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "fsdp2_keep": (2, {"strategy": "fsdp2", "reshard_after_forward": False}),
    "fsdp2_hybrid": (4, {"strategy": "fsdp2", "shard_size": 2}),
}
# The ranks that each kill hits, one kill after the other.
KILLS: dict[str, list[list[int]]] = {
    "ddp": [[0], [1], [0, 1], [1]],
    "zero1": [[1]],
    "zero2": [[0], [1], [0, 1], [1]],
    "zero3": [[0, 1], [1]],
    "zero3_offload": [[0]],
    "fsdp2": [[0], [1], [0, 1], [1]],
    "fsdp2_keep": [[0]],
    "fsdp2_hybrid": [[3]],
}
MOMENTS = ["_begin", "_digest", "Marker.write", "Checkpoints._publish", "_sync_folder", "remove"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_tiny(folder, samples=4 * STEPS)
    return folder


def make_trainer(run_dir: Path, data: Path, parallel: dict[str, Any], **changes: Any) -> Trainer:
    values: dict[str, Any] = {
        "budget": {"steps": STEPS},
        "batch": {"size": 4, "micro_size": 2},
        "checkpoint": {"every_steps": 2, "keep": 2, "asynchronous": True},
        "parallel": parallel,
    }
    trainer = trainer_for(settings_for(run_dir, data, changes.pop("architecture", "mor_expert"), **values | changes))
    take_step = trainer.training_step

    def announce() -> dict[str, Any]:
        print("takes a step", flush=True)
        return take_step()

    trainer.training_step = announce  # type: ignore[method-assign]
    return trainer


def wait_for_steps(ranks: Ranks, number: int) -> None:
    """Return once rank 0 has begun so many steps in this process, or has ended."""
    deadline = time.monotonic() + 300
    while ranks.output(0).count("takes a step") < number and ranks.processes[0].is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(trainer: Trainer) -> list[dict[str, Any]]:
    assert trainer.run() == 0
    trainer.parallel.finish()
    return figures(read_lines(trainer.settings.run_dir))


# --- kills ------------------------------------------------------------


def train_and_die(
    run_dir: Path,
    data: Path,
    parallel: dict[str, Any],
    moment: str | None = None,
    saves: int = 0,
    steps: int = STEPS,
) -> list[dict[str, Any]]:
    """Train; die by SIGKILL where `moment`, a function of the checkpoint module, is called for the `saves`-th time."""
    if moment is not None:
        owner: Any = checkpoint
        *path, name = moment.split(".")
        for part in path:
            owner = getattr(owner, part)
        run, left = getattr(owner, name), saves

        def run_or_die(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(*arguments)

        setattr(owner, name, run_or_die)
    micro_size = min(2, 4 // int(os.environ["WORLD_SIZE"]))
    changes = {"budget": {"steps": steps}, "batch": {"size": 4, "micro_size": micro_size}}
    return finish(make_trainer(run_dir, data, parallel, **changes))


@pytest.mark.slow
def test_kills_inside_a_save_and_anywhere_change_no_loss(data: Path, tmp_path: Path):
    """One process: 6 kills at named moments of a save, 8 at random moments, then to the end."""
    dice = random.Random(0)
    expected = run_ranks(train_and_die, 1, tmp_path / "whole", data, SINGLE)[0]
    broken = tmp_path / "broken"
    for moment in MOMENTS:
        ranks = start_ranks(train_and_die, 1, broken, data, SINGLE, moment, dice.randint(1, 2))
        assert ranks.wait(300) == [-signal.SIGKILL], (moment, ranks.output(0)[-2000:])
    for _ in range(8):
        kill_at_random(start_ranks(train_and_die, 1, broken, data, SINGLE), dice, [0])
    assert run_ranks(train_and_die, 1, broken, data, SINGLE)[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), KILLS.items())
def test_kills_of_one_rank_or_all_change_no_loss(data: Path, tmp_path: Path, name: str, kills: list[list[int]]):
    """Kills of some ranks or all; the others end too, within the helper's grace."""
    dice, (ranks, section) = random.Random(1), STRATEGIES[name]
    steps = min(STEPS, 4 * len(kills) + 8)  # each kill comes after four more steps, or a few that it is late
    expected = run_ranks(train_and_die, ranks, tmp_path / "whole", data, section, None, 0, steps)[0]
    broken = (tmp_path / "broken", data, section, None, 0, steps)
    for victims in kills:
        kill_at_random(start_ranks(train_and_die, ranks, *broken), dice, victims)
    assert run_ranks(train_and_die, ranks, *broken)[0] == expected


def kill_at_random(ranks: Ranks, dice: random.Random, victims: list[int]) -> None:
    """Kill within the first steps that this process takes; expect it dead, not finished."""
    wait_for_steps(ranks, dice.randint(1, 4))
    time.sleep(dice.random() * 0.05)
    ranks.kill(*victims)
    codes = ranks.wait(60)
    assert all(codes) and codes[victims[0]] == -signal.SIGKILL, ranks.output(0)[-2000:]


# --- a rank that stalls ------------------------------------------------------------


def train_and_stall(run_dir: Path, data: Path, how: str) -> None:
    trainer = make_trainer(run_dir, data, {"strategy": "ddp", "watchdog_seconds": 4})
    take = trainer.loader.__class__.__next__

    def stall(loader: Any) -> Any:
        if trainer.state.step == 3 and trainer.parallel.rank == 1:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        return take(loader)

    trainer.loader.__class__.__next__ = stall  # type: ignore[method-assign]
    finish(trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason"), [("asleep", "rank 1 is holding the others up"), ("stopped", "rank 1 is not responding")]
)
def test_the_watchdog_names_a_stalled_rank_and_stops_all(data: Path, tmp_path: Path, how: str, reason: str):
    ranks = start_ranks(train_and_stall, 2, tmp_path, data, how)
    wait_for_steps(ranks, 3)
    started = time.monotonic()
    codes = ranks.wait(120)
    assert time.monotonic() - started < 60  # the limit is 4 s; the rest is for a busy machine
    assert reason in ranks.output(0), ranks.output(0)[-2000:]
    assert codes[0] == STALLED and codes[1] in (STALLED, -signal.SIGKILL)


def test_the_watchdog_tells_late_from_silent_from_all_waiting():
    watchdog = object.__new__(Watchdog)
    watchdog.world_size, watchdog.interval = 3, 1.0
    watchdog.heard = {0: 100.0, 1: 100.0, 2: 100.0}
    beat = {rank: Beat(9, "forward", 1, "host", 1) for rank in range(3)}
    watchdog.seen = dict(beat)
    assert watchdog.diagnose(101.0) == ("all ranks stand in forward: a collective hangs", [0, 1, 2], False)
    watchdog.seen[2] = Beat(8, "the update", 1, "host", 1)
    assert watchdog.diagnose(101.0) == ("rank 2 is holding the others up, last seen in the update", [2], False)
    watchdog.heard[1] = 90.0
    assert watchdog.diagnose(101.0)[1:] == ([1], True)


# --- work that takes longer than any limit ------------------------------------------------------------


def train_slowly(run_dir: Path, data: Path, seconds: float) -> list[dict[str, Any]]:
    """Preparation and export on rank 0, and one save on rank 1, take longer than collectives and watchdog may wait."""
    limits = {"strategy": "ddp", "timeout_seconds": 0.8 * seconds, "watchdog_seconds": 0.4 * seconds}
    settings = settings_for(
        run_dir,
        data,
        budget={"steps": 4},
        batch={"size": 4, "micro_size": 2},
        checkpoint={"every_steps": 2, "asynchronous": True},
        parallel=limits,
    )
    parallel = start_parallel(settings.parallel, "fp32", 0, first=lambda: time.sleep(seconds))
    digest, export = checkpoint._digest, trainer_module.export
    calls = itertools.count()

    def slow_digest(*arguments: Any) -> Any:
        if parallel.rank == 1 and next(calls) == 1:
            time.sleep(seconds)
        return digest(*arguments)

    def slow_export(*arguments: Any) -> None:
        time.sleep(seconds)
        export(*arguments)

    checkpoint._digest, trainer_module.export = slow_digest, slow_export
    return finish(Trainer(settings, Manifest.read(data), parallel))


@pytest.mark.slow
def test_no_limit_ends_work_that_takes_its_time(data: Path, tmp_path: Path):
    ranks = start_ranks(train_slowly, 2, tmp_path, data, 10.0)
    assert ranks.wait(300) == [0, 0], ranks.output(0)[-3000:] + ranks.output(1)[-3000:]
    assert [line["step"] for line in ranks.results()[0] if "loss" in line] == [1, 2, 3, 4]
    assert "watchdog: the ranks wait for work under way" in ranks.output(0)
    assert (tmp_path / "final/model.safetensors").exists()


# --- a full disk on one rank ------------------------------------------------------------


def train_on_a_full_disk(run_dir: Path, data: Path, strategy: str, full_at: int | None) -> tuple[Any, int, list[int]]:
    """Train; on rank 1, torch.save fails at `full_at`-th checkpoint as on a full disk."""
    rule: dict[str, Any] = {"budget": {"steps": 8}, "checkpoint": {"every_steps": 2}}
    rule["schedule"] = {"decay_share": 0.0}  # at the beginning of a cool-down one more checkpoint would be made
    trainer = make_trainer(run_dir, data, {"strategy": strategy}, **rule)
    save, begin, count = torch.save, checkpoint._begin, 0

    def counting_begin(*arguments: Any) -> None:
        nonlocal count
        count += 1
        begin(*arguments)

    def failing_save(*arguments: Any, **keywords: Any) -> None:
        if count == full_at and trainer.parallel.rank == 1 and "random" not in str(arguments[1]):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **keywords)

    checkpoint._begin = counting_begin
    torch.save = failing_save
    lines = finish(trainer)
    steps = [step for step, _ in checkpoint.committed(run_dir / "checkpoints")]
    return lines, trainer.checkpoints.failures, steps


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_a_full_disk_on_one_rank_costs_that_checkpoint_alone(data: Path, tmp_path: Path, strategy: str):
    expected = run_ranks(train_on_a_full_disk, 2, tmp_path / "whole", data, strategy, None)
    found = run_ranks(train_on_a_full_disk, 2, tmp_path / "full", data, strategy, 3)
    assert [lines for lines, _, _ in found] == [lines for lines, _, _ in expected]
    assert [failures for _, failures, _ in expected] == [0, 0] and expected[0][2] == [6, 8]
    assert [failures for _, failures, _ in found] == [1, 1] and found[0][2] == [4, 8]


# --- a gradient that is not finite ------------------------------------------------------------


def train_with_a_bad_gradient(run_dir: Path, data: Path, strategy: str) -> tuple[list[Any], float]:
    """Its lines, and a number that every weight enters which this rank holds."""
    trainer = make_trainer(
        run_dir, data, {"strategy": strategy}, budget={"steps": 5}, optimizer={"max_skipped_steps": 1}
    )
    micro_step: Callable[..., None] = trainer.parallel.micro_step

    def spoil(loss: torch.Tensor, last: bool) -> None:
        bad = trainer.parallel.rank == 1 and trainer.state.step == 2
        micro_step(loss * float("nan") if bad else loss, last)

    trainer.parallel.micro_step = spoil  # type: ignore[method-assign]
    lines = finish(trainer)
    held = (getattr(tensor, "_local_tensor", tensor) for tensor in trainer.parallel.model_tensors().values())
    return lines, float(sum(tensor.double().abs().sum() for tensor in held))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_a_gradient_not_finite_on_one_rank_is_skipped_by_all(data: Path, tmp_path: Path, strategy: str):
    (lines, first), (_, second) = run_ranks(train_with_a_bad_gradient, 2, tmp_path, data, strategy)
    steps = [line for line in lines if "loss" in line]
    assert [line["skipped_steps"] for line in steps] == [0, 0, 1, 1, 1]
    assert all(line["loss"] == line["loss"] for line in steps)
    if strategy in ("ddp", "zero1"):
        assert first == second
    assert (lines[-1]["event"], lines[-1]["validation_loss"] > 0) == ("finished", True)


# --- ragged ranks ------------------------------------------------------------


def train_ragged(run_dir: Path, data: Path, strategy: str) -> list[Any]:
    """Token-choice where every token of rank 1 takes depth 1, and every one of rank 0 depth 3."""
    trainer = make_trainer(run_dir, data, {"strategy": strategy}, architecture="mor_token", budget={"steps": 6})
    alone, calls = trainer.parallel.world_size == 1, itertools.count()

    def choose(scores: torch.Tensor, step: int | None) -> torch.Tensor:
        shallow = next(calls) % 2 if alone else trainer.parallel.rank  # micro-batches of one are ranks of the other
        return torch.full(scores.shape[:-1], 0 if shallow else 2)

    trainer.model.model.depth.choose = choose
    return finish(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_rank_without_tokens_at_a_depth_neither_hangs_nor_skews(data: Path, tmp_path: Path, strategy: str):
    alone = run_ranks(train_ragged, 1, tmp_path / "alone", data, "single")[0]
    ragged = run_ranks(train_ragged, 2, tmp_path / "ragged", data, strategy)[0]
    expected, found = ([line for line in lines if "loss" in line] for lines in (alone, ragged))
    assert found[0]["depth_shares"] == pytest.approx([0, 0.5, 0, 0.5])
    for key in ("loss", "total_loss", "balancing_loss", "gradient_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), key
