"""How a run ends when it cannot write, read or find what it needs: known on every rank, in a line, nothing claimed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from data_prep.settings import UserError
from pretrain import checkpoint, main, metrics, run_folder
from pretrain.data import BlockLoader, Blocks
from pretrain.metrics import MetricsFile, Tracker, last_step
from pretrain.parallel.settings import ParallelSettings
from pretrain.parallel.start import start_parallel
from pretrain.parallel.strategy import Parallel, RunFailed
from pretrain.parallel.watchdog import Watchdog
from pretrain.parallel.zero import Zero
from pretrain.stop import CANNOT_WRITE, disk_error
from pretrain.trainer import Trainer
from tests.helpers.corpus import prepare_tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import figures, read_lines, settings_for, train, trainer_for

# without a cool-down, at whose beginning one more checkpoint would be made
RUN: dict[str, Any] = {"budget": {"steps": 6}, "checkpoint": {"every_steps": 2}, "schedule": {"decay_share": 0.0}}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[dict[str, Any]]:
    """The figures of a run that nothing happened to."""
    return figures(train(settings_for(tmp_path_factory.mktemp("whole"), data, **RUN)))


def failing(error: BaseException, after: int, original: Any = None) -> Any:
    """A function that raises `error` from its call number `after` on, and does what `original` does before."""
    calls = 0

    def function(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= after:
            raise error
        return original(*arguments, **keywords)

    return function


def steps_of(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoint.committed(run_dir / "checkpoints")]


# --- what cannot be written ------------------------------------------------------------


def command(settings: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """What pretrain/main.py returns for a run of these settings."""
    config = folder / "experiment.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(config), *flags])
    return main.main()


@pytest.mark.parametrize(("ending", "asynchronous"), [("stopped", True), ("finished", False)])
def test_a_last_checkpoint_that_fails_is_one_line_and_74(
    tmp_path: Path,
    data: Path,
    whole: list[dict[str, Any]],
    ending: str,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    run = RUN | {"checkpoint": {"every_steps": 2, "asynchronous": asynchronous}}
    settings = settings_for(tmp_path / "run", data, **run)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Marker, "write", failing(FULL, 3, checkpoint.Marker.write))
        after_step = Trainer.after_step

        def ask(trainer: Trainer, *arguments: Any) -> None:
            after_step(trainer, *arguments)
            if ending == "stopped" and trainer.state.step == 4:
                (tmp_path / "run/stop").touch()

        patch.setattr(Trainer, "after_step", ask)
        assert command(settings, tmp_path, patch) == CANNOT_WRITE == 74
    output = capfd.readouterr()
    errors = [line for line in output.err.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert len(errors) == 1 and "No space left on device" in errors[0] and "run the same command again" in errors[0]
    assert "Traceback" not in output.err and "with a checkpoint" not in output.out
    assert steps_of(tmp_path / "run") == [2, 4]
    assert not (tmp_path / "run/requeue").exists() and not (tmp_path / "run/lock").exists()
    assert "event" not in read_lines(tmp_path / "run")[-1]
    assert command(settings, tmp_path, monkeypatch) == 0
    assert figures(read_lines(tmp_path / "run")) == whole


@pytest.mark.parametrize("number", [errno.EDQUOT])
def test_metrics_that_cannot_be_written_end_the_run_before_a_checkpoint_relies_on_them(
    tmp_path: Path, data: Path, whole: list[dict[str, Any]], number: int, monkeypatch: pytest.MonkeyPatch
):
    settings = settings_for(tmp_path / "run", data, **RUN)
    with monkeypatch.context() as patch:
        error = OSError(number, os.strerror(number))
        patch.setattr(MetricsFile, "write", failing(error, 4, MetricsFile.write))
        assert command(settings, tmp_path, patch) == CANNOT_WRITE
    assert steps_of(tmp_path / "run") == [2]
    assert command(settings, tmp_path, monkeypatch) == 0
    assert figures(read_lines(tmp_path / "run")) == whole


def test_a_model_that_cannot_be_exported_leaves_no_final_folder(
    tmp_path: Path, data: Path, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    settings = settings_for(tmp_path / "run", data, **RUN)
    error = SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", failing(error, 1))
        assert command(settings, tmp_path, patch) == CANNOT_WRITE
    assert not (tmp_path / "run/final").exists() and "event" not in read_lines(tmp_path / "run")[-1]
    assert command(settings, tmp_path, monkeypatch) == 0
    assert (tmp_path / "run/final/model.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "run").glob("final*")) == ["final"]
    assert figures(read_lines(tmp_path / "run")) == whole


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large"),
        (SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "..." })'), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "in full"),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (SafetensorError("header too large"), None),
        (RuntimeError("CUDA error"), None),
        (KeyError("x"), None),
    ],
)
def test_what_a_disk_refuses_is_told_whichever_library_says_so(error: Exception, told: str | None):
    found = disk_error(error)
    assert (found is None) if told is None else (found is not None and told in found)


# --- what was lost ------------------------------------------------------------


def test_lost_checkpoints_are_refused_and_restart_keeps_what_was_there(
    tmp_path: Path, data: Path, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    settings, run = settings_for(tmp_path / "run", data, **RUN), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", failing(FULL, 6, MetricsFile.write))
        command(settings, tmp_path, patch)
    before = (run / "metrics.jsonl").read_bytes()
    assert last_step(run / "metrics.jsonl") == 5 and steps_of(run) == [2, 4]
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"holds 5 steps, .*\(step-00000004\) is missing .*--restart"):
        trainer_for(settings).run()
    assert (run / "metrics.jsonl").read_bytes() == before and not (run / "lock").exists()
    assert command(settings, tmp_path, monkeypatch, "--restart") == 0
    assert figures(read_lines(run)) == whole
    assert (run / "before/1/metrics.jsonl").read_bytes() == before and (run / "before/1/run.json").exists()


def test_only_damaged_checkpoints_are_refused_too(tmp_path: Path, data: Path):
    settings = settings_for(tmp_path, data, **RUN)
    train(settings)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    (tmp_path / "last_checkpoint").unlink()  # as runs were before it was written
    with pytest.raises(UserError, match=r"damaged: step-00000004.damaged, step-00000006.damaged.*--restart"):
        trainer_for(settings).run()


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_and_keeps_its_metrics(
    tmp_path: Path, data: Path, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    settings = settings_for(tmp_path / "run", data, **RUN)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", failing(FULL, 2, MetricsFile.write))
        command(settings, tmp_path, patch)
    train(settings)
    assert figures(read_lines(tmp_path / "run")) == whole
    assert last_step(tmp_path / "run/before/1/metrics.jsonl") == 1


def test_a_requeued_job_does_not_restart_again():
    assert main._starts_again({"SLURM_RESTART_COUNT": "1"}) and not main._starts_again({"SLURM_RESTART_COUNT": "0"})


def test_a_restart_that_is_cut_short_is_completed_and_another_has_a_folder_of_its_own(
    tmp_path: Path, data: Path, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    settings, run = settings_for(tmp_path / "run", data, **RUN), tmp_path / "run"
    train(settings)
    there = {path.name for path in run.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(KeyboardInterrupt(), 4, Path.rename))
        with pytest.raises(KeyboardInterrupt):
            trainer_for(settings).run(restart=True)
    assert (run / "before/1.partial").is_dir()
    assert figures(train(settings)) == whole  # as a requeued job, which is not asked to restart again
    assert {path.name for path in (run / "before/1").iterdir()} == there
    assert trainer_for(settings).run(restart=True) == 0
    assert sorted(path.name for path in (run / "before").iterdir()) == ["1", "2"]
    assert figures(read_lines(run / "before/2")) == figures(read_lines(run)) == whole


def test_restart_touches_no_folder_that_is_no_run(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        run_folder.set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_milestones_are_saved_without_being_asked_for_otherwise(tmp_path: Path, data: Path):
    rule = {"every_steps": None, "every_minutes": None, "milestone_every": 4, "keep": 1}
    train(settings_for(tmp_path, data, budget={"steps": 10}, checkpoint=rule))
    assert steps_of(tmp_path) == [4, 8, 10]


# --- threads and trackers ------------------------------------------------------------


def test_what_ends_a_prefetch_is_raised_where_its_batch_would_have_come(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(BlockLoader, "load", failing(KeyError("a bug"), 4, BlockLoader.load))
    with pytest.raises(KeyError, match="a bug"):
        trainer_for(settings_for(tmp_path, data, **RUN)).run()
    assert last_step(tmp_path / "metrics.jsonl") == 3 and steps_of(tmp_path) == [2]


def test_what_ends_a_tracker_is_told_once_and_training_goes_on(
    tmp_path: Path, data: Path, whole: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    opened: list[Tracker] = []

    def broken(tracker: Tracker, *_: Any) -> None:
        tracker._run = SimpleNamespace(log=failing(KeyError("a bug"), 1), step=0, finish=lambda: None)
        opened.append(tracker)

    monkeypatch.setattr(Tracker, "__init__", broken)
    assert figures(train(settings_for(tmp_path, data, **RUN))) == whole
    assert len(opened) == 1 and capsys.readouterr().err.count("training goes on without it: 'a bug'") == 1


def test_what_ends_the_watchdog_or_the_lock_ends_the_run(tmp_path: Path, data: Path):
    trainer = trainer_for(settings_for(tmp_path, data, **RUN))
    after_step = trainer.after_step

    def lose(*arguments: Any) -> None:
        after_step(*arguments)
        assert trainer.lock is not None
        if trainer.state.step == 3:
            trainer.lock.failure = UserError("process 7 has taken this run over")

    trainer.after_step = lose  # type: ignore[method-assign]
    with pytest.raises(UserError, match="process 7"):
        trainer.run()
    assert trainer.state.step == 3 and steps_of(tmp_path) == [2]


def watchdog_of_one(store: Any) -> Watchdog:
    watchdog = object.__new__(Watchdog)
    watchdog.rank, watchdog.world_size, watchdog.limit_seconds, watchdog.interval = 0, 1, 100.0, 0.0
    watchdog.count, watchdog.place, watchdog.serial, watchdog.failure = 0, "start", 0, None
    watchdog._busy, watchdog._busy_told, watchdog.store = [], 0.0, store
    watchdog.seen, watchdog.moved, watchdog.heard = {}, {0: 0.0}, {0: 0.0}
    return watchdog


def test_what_ends_the_watch_is_kept_for_the_main_thread(capsys: pytest.CaptureFixture[str]):
    watchdog = watchdog_of_one(SimpleNamespace(set=failing(KeyError("a bug"), 1)))
    watchdog._over = SimpleNamespace(wait=lambda seconds: False, is_set=lambda: False)  # type: ignore[assignment]
    watchdog._watch()
    assert isinstance(watchdog.failure, KeyError) and "a bug" in capsys.readouterr().err


def test_a_busy_rank_stops_the_clock_while_its_thread_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    watchdog, ended = watchdog_of_one(None), []
    watchdog.interval = 10.0
    monkeypatch.setattr(watchdog, "_end", lambda *reason: ended.append(reason))
    beats = iter(range(100))
    for now in range(0, 500, 10):
        watchdog._judge([f"1\tforward\t{next(beats)}\thost\t1\tconverting step-00000004"], float(now))
    assert not ended and capsys.readouterr().err.count("wait for work under way (rank 0: converting") == 4
    for now in range(500, 610, 10):  # no longer busy: the limit counts from here
        assert not ended
        watchdog._judge([f"1\tforward\t{next(beats)}\thost\t1\t"], float(now))
    assert ended


# --- devices ------------------------------------------------------------


def test_more_ranks_than_gpus_are_refused_on_every_rank_alike(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU: what torch says of the machine, and how a rank takes its device, are stand-ins."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for ranks in (2, 4):
        for rank in range(ranks):
            for name, value in (("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks), ("LOCAL_RANK", rank)):
                monkeypatch.setenv(name, str(value))
            if ranks == 2:
                assert Parallel(ParallelSettings(), "fp32", 0).device == taken[-1]
                continue
            with pytest.raises(UserError, match=r"4 ranks run on this machine, but 2 GPUs are visible .*=0,1\)"):
                Parallel(ParallelSettings(), "fp32", 0)
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize("fused", [True, False])
def test_zero_makes_the_optimizers_step_where_adamw_would(fused: bool):
    """Resuming a converted checkpoint under ZeRO on a GPU; `meta` stands for the GPU."""
    flat = torch.empty(8, device="meta")
    groups = [{"params": [], "fused": fused}]
    inner = SimpleNamespace(state={}, param_groups=groups)
    parallel = object.__new__(Zero)
    parallel.stage = 3
    parallel.optimizer = SimpleNamespace(  # type: ignore[assignment]
        fp32_partitioned_groups_flat=[flat], optimizer=inner, param_groups=groups
    )
    shapes = {("w", "step"): torch.Size([]), ("w", "exp_avg"): torch.Size([8])}
    parallel.allocate_optimizer_state(shapes)
    state = inner.state[flat]
    assert state["exp_avg"].device.type == "meta"
    assert state["step"].device.type == ("meta" if fused else "cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 125e12),
        ("Unheard Of", None),
    ],
)
def test_peak_flops_tell_the_kinds_of_a_device_apart(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_flops(torch.device("cuda", 0)) == peak


# --- several ranks ------------------------------------------------------------


def scenario(parallel: Parallel, run_dir: Path, data: Path, asynchronous: bool, patch: Any) -> tuple[Any, ...]:
    """Train under a fault that `patch` makes; how this rank saw it end, what is saved, what the metrics hold."""
    rule = {"every_steps": 2, "asynchronous": asynchronous}
    settings = settings_for(run_dir, data, **RUN | {"batch": {"micro_size": 2}, "checkpoint": rule})
    trainer = Trainer(settings, trainer_manifest(data), parallel)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch, parallel.rank)
        try:
            ending: Any = trainer.run()
        except RunFailed as error:
            ending = (error.exit_code, str(error))
    parallel.barrier()
    return ending, steps_of(run_dir), last_step(run_dir / "metrics.jsonl"), trainer.checkpoints.failures


def trainer_manifest(data: Path) -> Any:
    from pretrain.manifest import Manifest

    return Manifest.read(data)


def bad_data(patch: Any, rank: int) -> None:
    if rank == 1:
        patch.setattr(BlockLoader, "load", failing(UserError("shard is altered"), 4, BlockLoader.load))


def bad_validation(patch: Any, rank: int) -> None:
    gather = Blocks.gather

    def altered(blocks: Blocks, indices: Any) -> Any:
        if blocks.shards[0].name.startswith("validation"):
            raise UserError("validation shard is altered")
        return gather(blocks, indices)

    if rank == 1:
        patch.setattr(Blocks, "gather", altered)


def bad_copy(patch: Any, rank: int) -> None:
    copies = checkpoint.Checkpoints._copy
    if rank == 1:
        calls: list[int] = []

        def once(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyError("a bug")
            return copies(*arguments)

        patch.setattr(checkpoint.Checkpoints, "_copy", once)


def bad_metrics(patch: Any, rank: int) -> None:
    if rank == 0:
        patch.setattr(MetricsFile, "write", failing(FULL, 4, MetricsFile.write))


def bad_last_save(patch: Any, rank: int) -> None:
    if rank == 0:
        patch.setattr(checkpoint.Marker, "write", failing(FULL, 3, checkpoint.Marker.write))


def bad_export(patch: Any, rank: int) -> None:
    if rank == 0:
        patch.setattr("pretrain.trainer.export", failing(KeyError("a bug"), 1))


FAULTS = {
    "data": bad_data,
    "validation": bad_validation,
    "copy": bad_copy,
    "metrics": bad_metrics,
    "last save": bad_last_save,
    "export": bad_export,
}


def end_in_every_way(root: Path, data: Path, strategy: str) -> dict[str, Any]:
    section = {"strategy": strategy, "watchdog_seconds": 0} | (
        {"min_unit_parameters": 0} if strategy == "fsdp2" else {}
    )
    settings = settings_for(root, data, parallel=section)
    parallel = start_parallel(settings.parallel, "fp32", 0)
    found = {name: scenario(parallel, root / name, data, name != "metrics", patch) for name, patch in FAULTS.items()}
    parallel.finish()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_goes_wrong_on_one_rank_ends_all_alike(tmp_path: Path, data: Path, strategy: str):
    first, second = run_ranks(end_in_every_way, 2, tmp_path, data, strategy)
    assert first == second
    assert first["data"] == ((2, "rank 1: shard is altered"), [2], 3, 0)
    assert first["validation"] == ((2, "rank 1: validation shard is altered"), [4, 6], 6, 0)
    assert first["copy"] == (0, [2, 6], 6, 1)  # that save alone is lost, and counted on both
    assert first["metrics"][0][0] == CANNOT_WRITE and first["metrics"][1:] == ([2], 3, 0)
    assert first["last save"][0][0] == CANNOT_WRITE and first["last save"][1:] == ([2, 4], 6, 2)  # it was tried again
    assert first["export"] == ((1, "KeyError: 'a bug'"), [4, 6], 6, 0)
    for name in FAULTS:
        assert "finished" not in json.dumps(read_lines(tmp_path / name)[-1]) or name == "copy"
