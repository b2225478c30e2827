"""The job scripts under a real Slurm of three nodes on this machine: rendezvous, pre-emption, a dead node, arrays.

Every job runs pretrain/main.py with a tiny model on the CPU (gloo). What is held against what: the losses of a run that
was interrupted against those of the same run left alone, step by step and bit for bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import submit
from tests.helpers import slurm
from tests.helpers.slurm import REPOSITORY, Slurm, wait_for

REASON = slurm.why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

STEPS = 120  # long enough to be interrupted on a fast machine
MODEL = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_key_value_heads: 2}"
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "smoke"
    command = [
        "data_prep/prepare.py",
        "--config",
        "configs/data/smoke.yaml",
        f"folder={folder}",
        "source.documents=500",
    ]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, capture_output=True)
    return folder


def experiment(run_dir: Path, data: Path, *overrides: str) -> list[str]:
    """Arguments of pretrain/main.py for a run of `STEPS` steps that must find two ranks."""
    settings = [f"run_dir={run_dir}", f"data.folder={data}", "budget.flops=null", f"budget.steps={STEPS}"]
    settings += ["data.prepare=null", "evaluation.times=1", "evaluation.sequences=8", "tracker.mode=disabled"]
    return ["--config", "configs/experiment/smoke.yaml", *settings, "parallel.world_size=2", *overrides]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> training loss, exactly as the metrics file has it; no step may stand there twice."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(pairs) == len(dict(pairs)), f"{path} has a step twice"
    return dict(pairs)


def submit_run(cluster: Slurm, tmp_path: Path, arguments: list[str], *options: str) -> str:
    return cluster.submit(*options, f"--output={tmp_path}/%j.log", "launchers/pretrain.sbatch", *arguments)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Slurm, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], str]:
    """Losses and log of the two-node run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    number = submit_run(cluster, folder, experiment(folder / "run", data), *TWO_NODES)
    job = cluster.wait(number, 240)
    assert job["NodeList"] == "n[1-2]"
    return losses(folder / "run"), cluster.output(number)


def test_two_nodes_meet_and_train(uninterrupted: tuple[dict[int, float], str]) -> None:
    found, log = uninterrupted
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1] - 0.1, "the run did not learn"
    assert "nodes n[1-2]" in log and "the ranks ended with 0" in log


def test_preempted_run_requeues_and_resumes_with_the_same_losses(
    cluster: Slurm, data: Path, tmp_path: Path, uninterrupted: tuple[dict[int, float], str]
) -> None:
    run_dir = tmp_path / "run"
    number = submit_run(cluster, tmp_path, experiment(run_dir, data), *TWO_NODES, "--signal=B:USR1@30")
    wait_for("the first steps", lambda: len(losses(run_dir)) >= 3, 150)
    urgent = cluster.submit("--partition=urgent", "--nodes=3", "--output=/dev/null", "--exclusive", "--wrap", "true")
    cluster.wait(urgent, 30)
    assert 3 <= len(losses(run_dir)) < STEPS, "the run was to be interrupted midway"
    job = cluster.wait(number, 240)
    log = cluster.output(number)
    assert job["Restarts"] == "1", log
    assert "the ranks ended with 75" in log and "start 1," in log
    assert losses(run_dir) == uninterrupted[0]


def test_run_goes_on_elsewhere_when_a_node_dies(
    cluster: Slurm, data: Path, tmp_path: Path, uninterrupted: tuple[dict[int, float], str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = experiment(run_dir, data, "checkpoint.every_steps=5")
    number = submit_run(cluster, tmp_path, arguments, *TWO_NODES)
    wait_for("a checkpoint", lambda: len(losses(run_dir)) >= 12, 150)
    cluster.kill_node("n2")
    try:
        job = cluster.wait(number, 240)
        assert job["NodeList"] == "n[1,3]" and int(job["Restarts"]) >= 1, cluster.output(number)
        assert losses(run_dir) == uninterrupted[0]
    finally:
        cluster.start_node("n2")
        wait_for("n2 to be back", lambda: "idle" in cluster.call("sinfo", "-h", "-n", "n2", "-o", "%t"), 30)


def test_one_rank_a_task_and_a_cancelled_run_stays_away(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = experiment(run_dir, data, f"budget.steps={100 * STEPS}")
    number = submit_run(cluster, tmp_path, arguments, "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=1")
    wait_for("the first steps", lambda: len(losses(run_dir)) >= 3, 150)
    cluster.call("scancel", number)
    cluster.wait(number, 60, ("CANCELLED",))
    assert cluster.job(number)["Restarts"] == "0"


def test_array_prepares_one_configuration_a_task(cluster: Slurm, tmp_path: Path) -> None:
    configs = []
    for seed in (1, 2):
        configs.append(str(tmp_path / f"{seed}.yaml"))
        text = (
            f"extends: configs/data/smoke.yaml\nfolder: {tmp_path}/{seed}\nseed: {seed}\nsource: {{documents: 200}}\n"
        )
        Path(configs[-1]).write_text(text)
    output = f"--output={tmp_path}/%A_%a.log"
    number = cluster.submit("--array=0-1", output, "launchers/prepare_array.sbatch", *configs, "workers=1")
    for task in (0, 1):
        cluster.wait(f"{number}_{task}", 60)
    manifests = [json.loads((tmp_path / str(seed) / "manifest.json").read_text()) for seed in (1, 2)]
    assert [manifest["seed"] for manifest in manifests] == [1, 2]


@pytest.fixture
def comparison(cluster: Slurm, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison of a vanilla model alone, two seeds, whose submissions reach the cluster from this process."""
    config = tmp_path / "compare.yaml"
    config.write_text(
        f"output: {tmp_path}/out\nexperiment: configs/experiment/smoke.yaml\nmodels: {{vanilla: {MODEL}}}\n"
        f"overrides: {{data: {{folder: {data}}}, tracker: {{mode: disabled}}, evaluation: {{sequences: 8}}}}\n"
        "budgets: [{flops: 2.0e+10}]\nseeds: [0, 1]\n"
    )
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(submit, "LOGS", str(tmp_path / "logs"))
    return config


def test_comparison_is_an_array_and_its_report_follows(
    cluster: Slurm, comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["--compare", str(comparison), "--gpus-per-node=1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    array, report = (line.split(": job ")[1] for line in printed)
    assert [line.split(":")[0] for line in printed] == ["compare", "report"]
    for task in (0, 1):
        cluster.wait(f"{array}_{task}", 240)
    cluster.wait(report, 120)
    results = (tmp_path / "out" / "report" / "results.json").read_text()
    assert "vanilla" in results, cluster.output(report)


def test_the_report_adds_seeds_and_says_what_slurm_refuses(
    cluster: Slurm, comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One seed gives no interval: another is submitted by the report's job, and `most_seeds` ends it there."""
    looped = MODEL.replace("}", ", num_recursions: 2}")
    wanted = ["seeds=[0]", f"models.recursive={looped}", "budgets=[{flops: 6e9}]", "until=1e-9"]
    arguments = ["--compare", str(comparison), "--gpus-per-node=1", *wanted]
    assert submit.main([*arguments, "most_seeds=2"]) == 0
    array, report, _ = capsys.readouterr().out.splitlines()
    cluster.wait(array.split(": job ")[1] + "_0", 600)
    log = cluster.output(cluster.wait(report.split(": job ")[1], 600)["JobId"])
    second = log.split("until: more seeds are wanted, job ")[1].split()[0]
    last = cluster.wait(str(int(second) + 1), 900)
    logs = [REPOSITORY / "runs" / "slurm" / f"out-{second}_{task}.log" for task in (2, 3)]
    logs.append(Path(last["StdOut"]))  # the report's job knows nothing of this test's folder
    assert last["Command"].endswith("report.sbatch") and "more seeds" not in logs[-1].read_text()
    assert all("the ranks ended with 0" in log.read_text() for log in logs[:-1])
    for path in logs:
        path.unlink()
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    assert results["seeds"] == [0, 1] and results["differences"][0]["high"] is not None
    assert submit.main(["--status", str(comparison), *wanted]) == 0
    assert "4 finished" in capsys.readouterr().out

    refused = ["seeds=[0, 1]", "--resources=--partition=closed", "--cpu-resources=--nodes=1"]
    words = ["launchers/report.sbatch", str(tmp_path / "out"), "--", *arguments, *refused, "most_seeds=3"]
    number = cluster.submit(f"--output={tmp_path}/%j.log", *words)
    cluster.wait(number, 600, ("FAILED",))
    *_, told, command = cluster.output(number).splitlines()
    assert told == "until: seeds 2 are wanted, and Slurm did not take them from here; type"
    assert command.startswith("python launchers/submit.py --compare") and "'seeds=[0, 1, 2]'" in command
