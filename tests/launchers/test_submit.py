"""What submit.py would submit, and what it refuses; no Slurm is needed: `sbatch` is never called, or is a stand-in."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from data_prep.settings import UserError
from launchers import status, submit
from launchers.grid import plan_round, plan_runs, read_compare
from launchers.submit import REPOSITORY, main
from model import hardware
from tests.helpers.runs import make_run

SMOKE = ["--config", "configs/experiment/smoke.yaml"]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that point an experiment to data which is prepared already, as far as submit.py looks."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"vocab_size": 512, "sequence_length": 128}')
    return [f"data.folder={folder}"]


def words_of(command: str) -> list[str]:
    """The words of a line that --dry-run prints."""
    return shlex.split(command.replace("$(", " ").removesuffix(")"))


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The words of every command that --dry-run prints, after the line that prepares the shell."""
    assert main([*arguments, "--dry-run"]) == 0
    head, *commands = capsys.readouterr().out.splitlines()
    assert head == f"cd {REPOSITORY} && mkdir -p runs/slurm && export PYTHON={sys.executable}"
    return [words_of(command) for command in commands]


def test_dry_run_of_a_run(capsys: pytest.CaptureFixture[str], data: list[str]) -> None:
    wanted = ["--nodes=2", "--gpus-per-node=2", "--time=01:00:00", "--partition=main", "--sbatch=--mem=0"]
    (command,) = dry_run(capsys, *SMOKE, *wanted, "--cpus-per-gpu=4", "--grace=60", *data, "batch.micro_size=1")
    script = command.index("launchers/pretrain.sbatch")
    assert command[:3] == ["pretrain=", "sbatch", "--parsable"]
    options = ["--job-name=smoke", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=8"]
    options += ["--time=01:00:00", "--signal=B:USR1@60", "--partition=main", "--mem=0"]
    assert set(options) <= set(command[:script]) and command.count("--mem=0") == 1
    assert command[script + 1 :] == [*SMOKE, *data, "batch.micro_size=1", "parallel.world_size=4"]


CLUSTER = """#!/bin/sh
case "$*" in
*--partition=gpu*) echo 'gpu|64|512000+|gpu:a100:8(S:0-1)'; echo 'gpu|96|1024000|gpu:h100:8,nvme:1' ;;
*--partition=cpu*) echo 'cpu|4|12000|(null)' ;;
*--partition=bare*) echo 'bare|16|1|gpu:4' ;;
*) echo 'gpu|64|512000|gpu:8'; echo 'main*|32|64000|gpu:4' ;;
esac
"""


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sinfo that describes a cluster."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sinfo").write_text(CLUSTER)
    (tmp_path / "bin" / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


@pytest.mark.usefixtures("sinfo")
@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (["--partition=gpu", "--gpus-per-node=2"], ["--cpus-per-task=16", "--mem=128000M"]),  # of the smaller nodes
        (["--partition=gpu", "--gpus-per-node=8"], ["--cpus-per-task=64", "--mem=512000M"]),
        (["--gpus-per-node=1"], ["--cpus-per-task=8", "--mem=16000M"]),  # of the default partition
        (["--partition=gpu", "--gpus-per-node=2", "--task-per-gpu"], ["--cpus-per-task=8"]),
        (["--partition=bare", "--gpus-per-node=2", "--cpus-per-gpu=3", "--mem=9G"], ["--cpus-per-task=6", "--mem=9G"]),
        (["--partition=cpu", "--gpus-per-node=0"], ["--cpus-per-task=4", "--mem=12000M"]),
    ],
)
def test_cpus_and_memory_are_the_gpus_share(
    capsys: pytest.CaptureFixture[str], data: list[str], wanted: list[str], given: list[str]
) -> None:
    (command,) = dry_run(capsys, *SMOKE, *wanted, *data, "batch.micro_size=1")
    assert set(given) <= set(command)


@pytest.mark.usefixtures("sinfo")
def test_what_is_asked_for_by_hand_is_not_asked_for_twice(capsys: pytest.CaptureFixture[str], data: list[str]) -> None:
    own = ["--sbatch=--mem-per-gpu=40G", "--sbatch=-c 5"]
    (command,) = dry_run(capsys, *SMOKE, "--partition=gpu", "--gpus-per-node=2", *own, *data)
    assert not [word for word in command if word.startswith(("--mem=", "--cpus-per-task"))]
    (bare,) = dry_run(capsys, *SMOKE, "--partition=bare", "--gpus-per-node=2", *data)
    assert not [word for word in bare if word.startswith("--mem")], "this cluster shares no memory out"


@pytest.mark.usefixtures("sinfo")
def test_jobs_without_gpus_go_to_their_own_partition(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wanted = [
        "--partition=gpu",
        "--cpu-partition=cpu",
        "--sbatch=--constraint=a100",
        "--account=us",
        "--gpus-per-node=2",
    ]
    path, folder = comparison(tmp_path), f"overrides.data.folder={tmp_path}/none"
    prepare, array, report = dry_run(capsys, "--compare", str(path), *wanted, folder)
    assert {"--partition=gpu", "--constraint=a100", "--account=us", "--gpus-per-node=2"} <= set(array)
    for job, cpus in ((prepare, 4), (report, 2)):
        assert {"--partition=cpu", "--account=us", f"--cpus-per-task={cpus}", "--mem=12000M"} <= set(job)
        assert not [word for word in job if word.startswith(("--gpus", "--gres", "--constraint"))]
    prepare, *_ = dry_run(
        capsys, "--compare", str(path), *wanted[:1], "--cpu-sbatch=--mem=1G", "--gpus-per-node=2", folder
    )
    assert "--partition=gpu" in prepare and [word for word in prepare if "--mem" in word] == ["--mem=1G"]


def test_restart_reaches_the_run(capsys: pytest.CaptureFixture[str], data: list[str], tmp_path: Path) -> None:
    (command,) = dry_run(capsys, *SMOKE, "--gpus-per-node=1", "--restart", *data)
    script = command.index("launchers/pretrain.sbatch")
    assert command[script + 1 :] == [*SMOKE, "--restart", *data, "parallel.world_size=1"]
    with pytest.raises(SystemExit):
        main(["--compare", str(comparison(tmp_path)), "--restart", "--dry-run"])
    assert "--restart belongs to --config" in capsys.readouterr().err


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


def test_a_mixture_is_prepared_source_by_source(
    capsys: pytest.CaptureFixture[str], data: list[str], tmp_path: Path
) -> None:
    made, web, code = data[0].partition("=")[2], tmp_path / "web", tmp_path / "code-1"
    sources = f"edu: {{folder: {made}, weight: 1}}, web: {{folder: {web}, weight: 1, prepare: configs/data/smoke.yaml}}"
    missing = f"code-1: {{folder: {code}, weight: 1, prepare: configs/data/sotu.yaml}}"
    path = tmp_path / "mixed.yaml"
    path.write_text(
        f"extends: configs/experiment/smoke.yaml\ndata: {{folder: '', mixture: {{{sources}, {missing}}}}}\n"
    )
    given = ["--config", str(path), "--gpus-per-node=1", "data.prepare=null"]
    one, two, run = dry_run(capsys, *given)
    assert one[-2:] == ["configs/data/smoke.yaml", f"folder={web}"]
    assert two[-2:] == ["configs/data/sotu.yaml", f"folder={code}"]
    assert "--dependency=afterok:$prepare_web:$prepare_code_1" in run
    with pytest.raises(UserError, match=r"data\.mixture\.web\.prepare does not say how.*--prepare CONFIG folder=.*web"):
        main([*given, "--dry-run", "data.mixture.web.prepare=null"])


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
    assert report[-3:] == ["launchers/report.sbatch", f"{tmp_path}/out", "--baseline=small"]

    done = tmp_path / "out" / "other-seed0"
    done.mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"step": 1, "event": "finished", "validation_loss": 1.0}\n')
    assert "--array=0,2,3%3" in dry_run(capsys, *arguments)[0]

    assert main([*arguments, "--print-run", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == SMOKE and "seed=1" in printed and f"run_dir={tmp_path}/out/small-seed1" in printed


def test_a_sweep_is_an_array_for_each_round_and_its_winner_is_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: list[str]
) -> None:
    """Each round waits for the one before it, the report's runs for the last; what they are, tasks learn by then."""
    path = comparison(tmp_path)
    arguments = ["--compare", str(path), "--gpus-per-node=0", f"overrides.{data[0]}", "overrides.precision=fp32", RATES]
    first, second, array, _ = dry_run(capsys, *arguments)
    assert "--array=0-7" in first and "--array=0-3" in second and "--round=1" in second
    assert "--dependency=afterany:$sweep0" in second and "--dependency=afterany:$sweep1" in array
    assert not any("dependency" in word for word in first)
    with pytest.raises(UserError, match="sweep of small, other has no winner yet"):
        main([*arguments, "--print-run", "0"])
    for number, count in ((0, 8), (1, 4)):
        for task in range(count):
            assert main([*arguments, f"--round={number}", "--print-run", str(task)]) == 0
            given = dict(line.partition("=")[::2] for line in capsys.readouterr().out.splitlines())
            loss = abs(float(given["optimizer.learning_rate"]) - 4e-3)
            ends(Path(given["run_dir"]), loss)
    assert main([*arguments, "--print-run", "0"]) == 0
    assert "optimizer.learning_rate=0.004" in capsys.readouterr().out.splitlines()
    assert len(dry_run(capsys, *arguments)) == 2  # the sweeps are over


def wide(path: Path, half_width: float | None) -> None:
    """A report's results.json whose one interval is so wide; None: unknown, as where a run diverged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"differences": [{"mean": 0.0, "high": half_width, "by_seed": [0.0, 0.0]}]}))


def after_dashes(words: list[str]) -> list[str]:
    return words[words.index("--") + 1 :]


def test_until_is_carried_to_the_report_and_adds_seeds_up_to_the_most(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: list[str]
) -> None:
    """Report after report whose interval stays wide: each asks for one seed more, then the last for none.

    What they submit is what the first submission was, seeds apart, though there is no sinfo any more.
    """
    path, results = comparison(tmp_path), tmp_path / "out" / "report" / "results.json"
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'main*|32|64000|gpu:4'\n")
    (tmp_path / "sinfo").chmod(0o755)
    overrides = [f"overrides.{data[0]}", "overrides.precision=fp32", RATES, "until=0.02", "most_seeds=5"]
    arguments = ["--compare", str(path), "--gpus-per-node=1", "--time=01:00:00", "--at-once=2", *overrides]
    with monkeypatch.context() as cluster:
        cluster.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert main([*arguments, "--dry-run"]) == 0
    *_, array, report, told = capsys.readouterr().out.splitlines()
    assert told == "# until 0.02: the report's job adds seeds while an interval is wider, at most 5 in all"
    request, own = after_dashes(words_of(report)), ("--array", "--dependency")
    options = [word for word in words_of(array) if word.startswith("--") and not word.startswith(own)]
    assert "--mem=16000M" in options
    for number in (0, 1):
        for run in plan_round(read_compare(path, overrides), number, True):
            ends(run.folder, run.settings.optimizer.learning_rate)

    assert main([*request, "--add-seeds"]) == 0
    out, err = capsys.readouterr()
    assert not out and "not finished: small-learning_rate0.001-seed0, other-" in err
    assert shlex.split(err.splitlines()[-1]) == ["python", "launchers/submit.py", *request]

    found = []
    for _ in range(9):
        for run in plan_runs(read_compare(path, [word for word in request[1:] if re.match(r"[a-z_.]+=", word)]), True):
            ends(run.folder, 3.0)
        wide(results, None)
        assert main([*request, "--add-seeds"]) == 0
        if not (printed := capsys.readouterr().out):
            break
        trap, _, array, report = printed.splitlines()
        seeds = [0, 1, 2, 3, 4][: 3 + len(found)]
        request = after_dashes(words_of(report))
        assert f"seeds={json.dumps(seeds)}" in request and str(seeds) in trap
        # two seeds allowed a sweep of that length, and its winner stands
        assert {"sweep_runs=2", "sweep_runs=2.0"} & set(request)
        assert words_of(array)[0] == "compare=" and "--dependency=afterany:$compare" in report
        given = [word for word in words_of(array) if word.startswith("--")]
        assert [word for word in given if not word.startswith(own)] == options
        first = 2 * len(seeds) - 2  # two models a seed, of which all but the last seed's are finished
        assert f"--array={first},{first + 1}%2" in given
        found.append(seeds)
    assert len(found) == 3, "most_seeds ends it"

    status.remember(read_compare(path, overrides), [], "3")
    assert main([*arguments, "--submitted=7"]) == 0  # a script that was run by hand, of the seeds that were given
    assert status.added_seeds(read_compare(path, overrides)) == {}
    wide(results, None)
    assert main([*arguments, "--resources=", "--cpu-resources=", "--add-seeds", "--submitted=8"]) == 0
    assert main(["--status", str(path), *overrides]) == 0
    assert "seed2" in capsys.readouterr().out


def test_until_that_is_reached_adds_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: list[str]
) -> None:
    path = comparison(tmp_path)
    arguments = ["--compare", str(path), "--gpus-per-node=0", f"overrides.{data[0]}", "until=0.02", "--add-seeds"]
    for run in plan_runs(read_compare(path, [f"overrides.{data[0]}"])):
        ends(run.folder, 3.0)
    for half_width, adds in ((0.0199, False), (0.0201, True)):
        wide(tmp_path / "out" / "report" / "results.json", half_width)
        assert main(arguments) == 0
        assert bool(capsys.readouterr().out) == adds


def test_an_array_is_told_the_precision_that_was_decided_for_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: list[str]
) -> None:
    """On the nodes' hardware and not on that of this machine, nor on each task's: GPUs multiply bf16."""
    arguments = ["--compare", str(comparison(tmp_path)), "overrides.precision=auto", f"overrides.{data[0]}"]
    array, _ = dry_run(capsys, *arguments, "--gpus-per-node=1")
    assert array[-1] == "overrides.precision=bf16"
    assert main([*arguments, "--gpus-per-node=1", "--print-run", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "precision=bf16"
    array, _ = dry_run(capsys, *arguments, "--gpus-per-node=0")
    assert array[-1] == f"overrides.precision={hardware.auto_precision(torch.device('cpu'))[0]}"


STAND_INS = {
    "squeue": """
        [ "$4" = --jobs=9 ] || exit 1  # Slurm has forgotten array 7
        echo '9_1|RUNNING|None'; echo '9_2|PENDING|Priority'; echo '9_3|FAILED|NonZeroExitCode'""",
    "sacct": "[ $2 = --jobs=9 ] || exit 1; echo '9_0|COMPLETED|0:0'; echo '9_3|FAILED|2:0'",
}


def test_status_shows_every_run_with_its_task(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: list[str]
) -> None:
    """small-seed0 is finished, small-seed1 runs and other-seed0 waits; other-seed1 has failed."""
    path = comparison(tmp_path)
    compare = read_compare(path, [f"overrides.{data[0]}"])
    runs = plan_runs(compare)
    make_run(tmp_path / "out" / "small-seed0", loss=3.25)
    make_run(tmp_path / "out" / "other-seed0", finished=False, budget=5e10)
    (tmp_path / "out" / "other-seed0" / "requeues.json").write_text('{"total": 3, "without_progress": 0, "step": 4}')
    status.remember(compare, runs, "7")
    status.remember(compare, runs, "9")
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh{script if name == 'squeue' else chr(10) + script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("COLUMNS", "160")
    with monkeypatch.context() as slurm:
        slurm.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        assert main(["--status", str(path), f"overrides.{data[0]}"]) == 0
    shown = capsys.readouterr().out
    cells = {words[0]: words for line in shown.splitlines() if (words := line.replace("│", " ").split())}
    assert cells["small-seed0"][:4] == ["small-seed0", "finished", cells["small-seed0"][2], "100%"]
    assert "3.2500" in cells["small-seed0"]
    assert cells["other-seed0"][1:3] == ["9_1", "running"] and "3" in cells["other-seed0"]
    assert cells["small-seed1"][1:4] == ["9_2", "pending", "(Priority)"]
    assert "failed, exit code 2" in shown and "runs/slurm/out-9_3.log" in shown
    assert "1 finished, 1 running, 1 pending, 1 failed" in shown

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no Slurm here: what the directories say
    (tmp_path / "out" / "other-seed0" / "requeue").touch()
    (tmp_path / "out" / "small-seed1").mkdir()
    (tmp_path / "out" / "small-seed1" / "lock").touch()
    assert main(["--status", str(path), f"overrides.{data[0]}"]) == 0
    shown = capsys.readouterr().out
    assert "1 finished, 1 stopped, 1 running, 1 not started" in shown


RATES = "sweep.optimizer.learning_rate=[1e-3, 2e-3, 4e-3, 8e-3]"
SWEEP_TASKS = """#!/bin/sh
[ "$4" = --jobs=5 ] || exit 1
echo '5_3|RUNNING|None'; echo '5_4|PENDING|Priority'; echo '5_5|PENDING|Priority'; echo '5_6|TIMEOUT|TimeLimit'
"""


def ends(folder: Path, loss: float) -> None:
    """A run that has ended, as far as the launchers look."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "flops": 1, "event": "finished", "validation_loss": loss}) + "\n"
    )


def shown_rounds(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[list[list[int]], str]:
    """Figures of the table of rounds that --status prints, a list a round, and all that it prints."""
    assert main(["--status", *arguments]) == 0
    text = capsys.readouterr().out
    rows = [re.findall(r"\d+", line) for line in text.splitlines() if re.fullmatch(r"[│\s\d]+", line)]
    return [[int(figure) for figure in row] for row in rows if len(row) == 6], text


def test_status_shows_the_rounds_of_sweeps_and_what_won(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: list[str]
) -> None:
    """Two models, four rates: eight runs, then four. Each column is told from the states that Slurm or folders give."""
    path = comparison(tmp_path)
    overrides = [f"overrides.{data[0]}", "overrides.precision=fp32", RATES, "noise=[order]"]
    arguments = [str(path), "--gpus-per-node=0", *overrides]
    compare = read_compare(path, overrides)
    status.remember_round(compare, 0, "5")
    status.remember(compare, plan_runs(compare, False), "6")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(SWEEP_TASKS)
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    first = plan_round(compare, 0, False)
    for run in first[:2]:
        ends(run.folder, 3.0)
    first[2].folder.mkdir(parents=True)  # it began, and nothing of it is left: neither a lock nor a checkpoint
    rounds, text = shown_rounds(capsys, arguments)
    assert rounds == [[1, 8, 2, 1, 3, 2], [2, 4, 0, 0, 4, 0]]
    assert "small: no winner yet" in text and "runs/slurm/out-5_6.log" in text
    assert f"{first[6].label}: timeout" in text
    noise = [line for line in text.splitlines() if "noise-small" in line]
    assert len(noise) == 2 and all("not started" in line for line in noise)

    for number in (0, 1):
        for run in plan_round(compare, number, False):
            ends(run.folder, abs(run.settings.optimizer.learning_rate - (4e-3 if "small" in run.label else 1e-3)))
    rounds, text = shown_rounds(capsys, arguments)
    assert rounds == [[1, 8, 8, 0, 0, 0], [2, 4, 4, 0, 0, 0]]
    assert "small: optimizer.learning_rate 0.004 won its sweep" in text
    assert "other: optimizer.learning_rate 0.001 won its sweep" in text


def test_a_run_keeps_its_task_when_its_sweep_is_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: list[str]
) -> None:
    """It was submitted before anyone knew its rate, which is part of its name from then on."""
    path = comparison(tmp_path)
    compare = read_compare(path, overrides := [f"overrides.{data[0]}", "overrides.precision=fp32", RATES])
    status.remember(compare, plan_runs(compare, False), "5")
    for number in (0, 1):
        for run in plan_round(compare, number, False):
            ends(run.folder, run.settings.optimizer.learning_rate)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(SWEEP_TASKS)
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    _, text = shown_rounds(capsys, [str(path), "--gpus-per-node=0", *overrides])
    (row,) = [line for line in text.splitlines() if "other-learning_rate0.001-seed1" in line]
    assert "5_3" in row and "running" in row


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
    offloading = [
        "parallel.strategy=fsdp2",
        "parallel.offload_parameters=true",
        "recompute=block",
        "batch.micro_size=1",
    ]
    (command,) = dry_run(capsys, *big[:-1], *offloading, "--gpu-memory=40")
    (memory,) = [word for word in command if word.startswith("--mem=")]
    assert int(memory[6:-1]) > 4 * 4 * 6.9 / 2 + 8 * 6, "of each node, half of what the states take"
    (command,) = dry_run(capsys, *big[:-1], f"--gpu-memory={needed + 1}")
    assert "parallel.world_size=16" in command


def test_refusal_names_a_change_that_is_then_accepted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"vocab_size": 49152, "sequence_length": 2048}')
    larger = [BIG[0], "batch.size=256", "batch.micro_size=16", BIG[-1]]
    run = [*SMOKE, *larger, f"data.folder={tmp_path}", "parallel=configs/parallel/fsdp2.yaml", "--nodes=2"]
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
