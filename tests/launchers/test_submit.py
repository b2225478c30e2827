"""What submit.py would submit, and what it refuses; no Slurm is needed: `sbatch` is never called, or is a stand-in."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from data_prep.settings import UserError
from launchers import submit
from launchers.submit import REPOSITORY, main

SMOKE = ["--config", "configs/experiment/smoke.yaml"]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that point an experiment to data which is prepared already, as far as submit.py looks."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"vocab_size": 512, "sequence_length": 128}')
    return [f"data.folder={folder}"]


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The words of every command that --dry-run prints, after the line that prepares the shell."""
    assert main([*arguments, "--dry-run"]) == 0
    head, *commands = capsys.readouterr().out.splitlines()
    assert head == f"cd {REPOSITORY} && mkdir -p runs/slurm && export PYTHON={sys.executable}"
    return [shlex.split(command.replace("$(", " ").removesuffix(")")) for command in commands]


def test_dry_run_of_a_run(capsys: pytest.CaptureFixture[str], data: list[str]) -> None:
    wanted = ["--nodes=2", "--gpus-per-node=2", "--time=01:00:00", "--partition=main", "--sbatch=--mem=0"]
    (command,) = dry_run(capsys, *SMOKE, *wanted, "--cpus-per-gpu=4", "--grace=60", *data, "batch.micro_size=1")
    script = command.index("launchers/pretrain.sbatch")
    assert command[:3] == ["pretrain=", "sbatch", "--parsable"]
    options = ["--job-name=smoke", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=8"]
    options += ["--time=01:00:00", "--signal=B:USR1@60", "--partition=main", "--mem=0"]
    assert set(options) <= set(command[:script])
    assert command[script + 1 :] == [*SMOKE, *data, "batch.micro_size=1", "parallel.world_size=4"]


def test_one_task_a_gpu_and_nodes_without_gpus(capsys: pytest.CaptureFixture[str], data: list[str]) -> None:
    (by_slurm,) = dry_run(capsys, *SMOKE, "--gpus-per-node=2", "--task-per-gpu", "--cpus-per-gpu=4", *data)
    assert {"--ntasks-per-node=2", "--cpus-per-task=4", "parallel.world_size=2"} <= set(by_slurm)
    (cpu,) = dry_run(capsys, *SMOKE, "--nodes=2", "--gpus-per-node=0", *data)
    assert "parallel.world_size=2" in cpu and not [word for word in cpu if "gpus" in word]


def test_missing_data_is_prepared_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    prepare, run = dry_run(capsys, *SMOKE, "--gpus-per-node=1", f"data.folder={folder}")
    assert prepare[-3:] == ["launchers/prepare_array.sbatch", "configs/data/smoke.yaml", f"folder={folder}"]
    assert "--array=0-0" in prepare and "--dependency=afterok:$prepare" in run
    with pytest.raises(UserError, match=r"data\.prepare does not say how to make it"):
        main([*SMOKE, "--dry-run", "--gpus-per-node=1", f"data.folder={folder}", "data.prepare=null"])


def test_array_of_preparations(capsys: pytest.CaptureFixture[str]) -> None:
    configs = ["configs/data/smoke.yaml", "configs/data/sotu.yaml"]
    (command,) = dry_run(capsys, "--prepare", *configs, "workers=2")
    assert "--array=0-1" in command and command[-4:] == ["launchers/prepare_array.sbatch", *configs, "workers=2"]


def comparison(tmp_path: Path) -> Path:
    """A comparison of two models with two seeds: four runs."""
    path = tmp_path / "compare.yaml"
    model = "{hidden_size: 64, num_hidden_layers: 5, num_attention_heads: 4, num_key_value_heads: 4}"
    path.write_text(
        f"output: {tmp_path}/out\nexperiment: configs/experiment/smoke.yaml\n"
        f"models: {{small: {model}, other: {model}}}\nbudgets: [{{flops: 1.0e+11}}]\nseeds: [0, 1]\nbaseline: small\n"
    )
    return path


def test_comparison_is_an_array_of_what_is_missing_and_a_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: list[str]
) -> None:
    path, folder = comparison(tmp_path), data[0]
    arguments = ["--compare", str(path), "--gpus-per-node=2", "--at-once=3", f"overrides.{folder}"]
    array, report = dry_run(capsys, *arguments)
    assert "--array=0,1,2,3%3" in array
    assert array[-4:] == ["--compare", str(path), f"overrides.{folder}", "overrides.parallel.world_size=2"]
    assert "--dependency=afterany:$compare" in report
    assert report[-1] == f"--wrap={sys.executable} pretrain/report.py {tmp_path}/out --baseline=small"

    done = tmp_path / "out" / "other-seed0"
    done.mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"step": 1, "event": "finished", "validation_loss": 1.0}\n')
    assert "--array=0,2,3%3" in dry_run(capsys, *arguments)[0]

    assert main([*arguments, "--print-run", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == SMOKE and "seed=1" in printed and f"run_dir={tmp_path}/out/small-seed1" in printed


def test_batch_that_does_not_divide_is_refused(data: list[str]) -> None:
    with pytest.raises(UserError, match=r"batch\.size 8 .* 6 ranks .* 24"):
        main([*SMOKE, "--dry-run", "--nodes=3", "--gpus-per-node=2", *data])


BIG = ["model=configs/model/7b_vanilla.yaml", "batch.size=64", "batch.micro_size=4", "precision=bf16"]


def test_model_that_does_not_fit_is_refused_with_the_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text('{"vocab_size": 49152, "sequence_length": 2048}')
    big = [*SMOKE, *BIG, f"data.folder={tmp_path}", "--nodes=2", "--dry-run"]
    with pytest.raises(UserError) as refused:
        main(big)
    found = re.search(
        r"needs about (\d+\.\d) GiB, a GPU has 80 GiB .*parameters (\d+\.\d),.*optimizer (\d+\.\d)", str(refused.value)
    )
    assert found is not None, refused.value
    needed, parameters, optimizer = map(float, found.groups())
    assert parameters == pytest.approx(4 * 6.9e9 / 2**30, rel=0.05)  # fp32, whole on every rank under DDP
    assert optimizer == pytest.approx(2 * parameters, rel=0.01) and needed > 4 * parameters
    assert "16 ranks, strategy ddp, micro-batches of 4 sequences" in str(refused.value)

    (command,) = dry_run(capsys, *big[:-1], "parallel=configs/parallel/fsdp2.yaml", "recompute=block")
    assert "recompute=block" in command
    (command,) = dry_run(capsys, *big[:-1], f"--gpu-memory={needed + 1}")
    assert "parallel.world_size=16" in command


def test_refusal_names_a_change_that_is_then_accepted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"vocab_size": 49152, "sequence_length": 2048}')
    run = [*SMOKE, *BIG, f"data.folder={tmp_path}", "parallel=configs/parallel/fsdp2.yaml", "--nodes=2"]
    with pytest.raises(UserError, match="Each of these would fit: ") as refused:
        main([*run, "--dry-run"])
    offered = str(refused.value).split("would fit: ")[1].split(", ")
    assert "recompute=block" in offered
    for change in offered:
        (command,) = dry_run(capsys, *run, change)
        assert change in command


def test_submission_passes_numbers_on_and_reports_refusals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for sbatch that notes its arguments and answers as the real one on a federation of clusters."""
    stand_in = tmp_path / "sbatch"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\necho "41;alpha"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(submit, "LOGS", str(tmp_path / "logs"))
    assert main([*SMOKE, "--gpus-per-node=1", f"data.folder={tmp_path}/none"]) == 0
    assert capsys.readouterr().out.splitlines() == ["prepare: job 41", "pretrain: job 41"]
    assert "--dependency=afterok:41 " in (tmp_path / "calls").read_text().splitlines()[1]

    stand_in.write_text("#!/bin/sh\necho 'Invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"sbatch refused it: Invalid partition"):
        main([*SMOKE, "--gpus-per-node=1", f"data.folder={tmp_path}/none"])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no sbatch here"):
        main([*SMOKE, "--gpus-per-node=1", f"data.folder={tmp_path}/none"])
