"""One corpus over many tasks: what would be submitted, and the same bytes from a real Slurm with two nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.config import DataSettings
from data_prep.manifest import verify
from data_prep.prepare import prepare
from data_prep.settings import UserError, load
from data_prep.stages import STAGES
from data_prep.synthetic import synthetic_documents
from launchers import corpus, submit
from tests.helpers import slurm
from tests.helpers.slurm import Slurm

REASON = slurm.why_not()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of some twenty parts."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = (json.dumps({"text": text}) for text in synthetic_documents(1000, seed=0))
    (folder / "a.jsonl").write_text("\n".join(rows))
    path = folder / "config.yaml"
    path.write_text(
        "{corpus: x, sequence_length: 64, part_bytes: 40000, shard_bytes: 100000, tokenizer: {vocab_size: 400}, "
        f"source: {{kind: jsonl, paths: ['{folder}/a.jsonl']}}}}"
    )
    return path


def test_dry_run_prints_a_script_a_stage_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prepare", str(config), "--tasks=6", "--nodes=2", "--cpu-partition=long", f"folder={tmp_path / 'x'}"]
    assert submit.main([*arguments, "--dry-run", "--cpu-mem=2G", "--account=me"]) == 0
    printed = capsys.readouterr().out
    scripts = printed.split("\nEND\n)\n")[:-1]
    assert [script.partition("=")[0] for script in scripts] == [*STAGES, "manifest"]
    assert "--dependency=afterok:$read <<" in scripts[1] and "--dependency" not in scripts[0].partition("<<")[0]
    assert "#SBATCH --array=0-5\n" in scripts[0] and "#SBATCH --array=0-0\n" in scripts[2]
    for line in ("--partition=long", "--mem=2G", "--account=me", "--kill-on-invalid-dep=yes", "--requeue"):
        assert all(f"#SBATCH {line}\n" in script for script in scripts)
    assert "qos" not in printed and "mem-per-cpu" not in printed
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=r"--tasks=1001: Slurm's arrays commonly end at 1000"):
        submit.main(["--prepare", str(config), "--tasks=1001", f"folder={tmp_path / 'x'}"])


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_two_nodes_write_the_bytes_of_one_process(
    cluster: Slurm, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    prepare(load(DataSettings, config, [f"folder={one}", "workers=1"]))
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(corpus, "LOGS", str(tmp_path / "logs"))
    arguments = ["--prepare", str(config), "--tasks=4", "--nodes=2", f"folder={many}"]
    # The first submission ends where a task is told to stop: its vocabulary cannot be filled.
    assert submit.main([*arguments, "tokenizer.vocab_size=9000"]) == 0
    with pytest.raises(UserError, match=r"many: jobs \d+.* prepare it; scancel them first"):
        submit.main(arguments)
    numbers = json.loads((many / "work" / "jobs.json").read_text())
    cluster.wait(numbers["tokenizer"], 120, ("FAILED",))
    cluster.wait(numbers["manifest"], 30, ("CANCELLED",))
    read = [path.stat().st_mtime_ns for path in sorted((many / "work" / "read").glob("*.json"))]
    nodes = {cluster.job(f"{numbers['read']}_{task}")["NodeList"] for task in range(4)}
    capsys.readouterr()
    # The second does what lacks, and no other.
    assert submit.main(arguments) == 0
    assert "read" not in capsys.readouterr().out and len(read) > 10
    assert [path.stat().st_mtime_ns for path in sorted((many / "work" / "read").glob("*.json"))] == read
    numbers = json.loads((many / "work" / "jobs.json").read_text())
    cluster.wait(numbers["manifest"], 120)
    assert len(nodes) == 2
    assert verify(many)["splits"] == verify(one)["splits"]
    assert submit.main(arguments) == 0 and "finished; nothing to submit" in capsys.readouterr().out
