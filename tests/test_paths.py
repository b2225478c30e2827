"""Every command takes paths with spaces, `=`, brackets and braces, as an option and as the value of a setting."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_prep import prepare
from launchers import compare, submit
from model.convert import export, gguf
from model.folder import write_folder
from model.inference import generate
from pretrain import budget, checkpoint, doctor, evaluate, runs, views
from pretrain.report import __main__ as report
from tests.helpers.reference import KEPT, Case
from tests.helpers.serving import request, send, serving_folder, status
from tests.helpers.tiny import tiny_model
from tests.model.test_export import byte_bpe

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of that name, in which data was prepared and a run was trained by the launcher's script."""
    root = tmp_path_factory.mktemp("paths") / "a b=[c] {d}"
    root.mkdir()
    (root / "texts").mkdir()
    for name in ("e [f]", "g=h", "{i}"):
        text = "".join(f"the state of the union {name} {i}\n\n" for i in range(200))
        (root / "texts" / f"{name}.txt").write_text(text)
    (root / "prompts.txt").write_text("the state\n")
    settings = {
        "corpus": "paths",
        "sequence_length": 32,
        "source": {"kind": "synthetic", "documents": 200},
        "tokenizer": {"vocab_size": 300},
    }
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    (root / "texts.yaml").write_text(yaml.safe_dump(settings | {"source": {"kind": "text", "delimiter": "\n\n"}}))
    assert prepare.main(["--config", str(root / "data.yaml"), f"folder={root}/data", "workers=1"]) == 0
    model = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    model |= {"num_key_value_heads": 1, "num_recursions": 3, "routing": "expert_choice"}
    (root / "model.yaml").write_text(yaml.safe_dump(model))
    experiment = {
        "name": "paths",
        "model": str(root / "model.yaml"),
        "budget": {"steps": 4},
        "batch": {"size": 4, "micro_size": 4},
        "precision": "fp32",
        "evaluation": {"times": 2, "sequences": 4},
        "checkpoint": {"every_steps": 2},
    }
    (root / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    command = ["launchers/torchrun.sh", "--config", f"{root}/experiment.yaml", f"run_dir={root}/runs/one"]
    command += [f"data.folder={root}/data"]
    environment = os.environ | {"PYTHON": sys.executable, "RANKS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (root / "runs" / "one" / "final" / "config.json").is_file()
    return root


COMMANDS: dict[str, Callable[[Path], object]] = {
    "inspect": lambda f: prepare.main(["--inspect", f"{f}/data", "--page", f"{f}/page.html"]),
    "status": lambda f: prepare.main(["--status", f"{f}/data"]),
    "verify": lambda f: prepare.main(["--verify", f"{f}/data"]),
    "prepare texts": lambda f: prepare.main(
        ["--config", f"{f}/texts.yaml", f"folder={f}/read", f"source.paths=['{f}/texts/*.txt']", "workers=1"]
    ),
    "evaluate": lambda f: evaluate.main(
        ["--checkpoint", f"{f}/runs/one", "--perplexity", f"{f}/texts/e [f].txt", "--output", f"{f}/perplexity.json"]
    ),
    "report": lambda f: report.main([f"{f}/runs", "--output", f"{f}/report"]),
    "runs": lambda f: runs.main([f"{f}/runs"]),
    "views": lambda f: views.main(
        ["--checkpoint", f"{f}/runs/one", "--text", f"{f}/texts/e [f].txt", "--output", f"{f}/views"]
    ),
    "doctor": lambda f: doctor.main(
        ["--config", f"{f}/experiment.yaml", "--folder", f"{f}/runs", f"data.folder={f}/data", f"run_dir={f}/runs/two"]
    ),
    "budget": lambda f: budget.main(["--models", f"{f}/model.yaml", "--budgets", "1e12", "--sequence-length", "32"]),
    "checkpoint verify": lambda f: checkpoint.main(["verify", str(newest(f))]),
    "checkpoint convert": lambda f: checkpoint.main(["convert", str(newest(f)), f"{f}/whole"]),
    "checkpoint export": lambda f: checkpoint.main(["export", str(newest(f)), f"{f}/exported"]),
    "generate": lambda f: generate.main(
        ["--checkpoint", f"{f}/runs/one/final", "--prompts", f"{f}/prompts.txt", "--output", f"{f}/answers.jsonl"]
    ),
    "export": lambda f: export.main(["--checkpoint", f"{f}/runs/one/final", "--output", f"{f}/hub", "--to", "hub"]),
}


def newest(folder: Path) -> Path:
    return max((folder / "runs" / "one" / "checkpoints").glob("step*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_such_paths(folder: Path, name: str) -> None:
    assert not COMMANDS[name](folder)


def test_models_of_others_come_from_such_paths(folder: Path) -> None:
    theirs = folder / "theirs"
    shutil.copytree(KEPT / "c07_expert_cycle3", theirs)
    assert Case.read(theirs).model(theirs).config.num_recursions == 3
    byte_bpe(folder / "tokenizer.json")
    write_folder(tiny_model("vanilla", vocab_size=290), folder / "vanilla", folder / "tokenizer.json")
    pytest.importorskip("gguf")
    assert export.main(["--checkpoint", f"{folder}/vanilla", "--output", f"{folder}/file", "--to", "gguf"]) == 0
    assert gguf.main(["--input", f"{folder}/file/model.gguf", "--output", f"{folder}/read back"]) == 0


def test_the_server_takes_such_paths(folder: Path) -> None:
    with serving_folder(folder / "runs" / "one" / "final", "--tokenizer", f"{folder}/data/tokenizer.json") as server:
        assert status(send(server.port, request({"prompt": "the state", "max_tokens": 2}))) == 200


def words(printed: str) -> list[list[str]]:
    return [shlex.split(line.replace("$(", " ").removesuffix(")")) for line in printed.splitlines()]


def test_launchers_hand_such_paths_on_word_for_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"run_dir={folder}/runs/three", f"data.folder={folder}/data"]
    one = ["--config", f"{folder}/experiment.yaml", *given, "--gpus-per-node=1", "--dry-run"]
    assert submit.main(one) == 0
    command = words(capsys.readouterr().out)[-1]
    assert {f"{folder}/experiment.yaml", *given} <= set(command)
    experiment = yaml.safe_load((folder / "experiment.yaml").read_text()) | {"data": {"folder": f"{folder}/data"}}
    del experiment["budget"]
    (folder / "whole.yaml").write_text(yaml.safe_dump(experiment))
    comparison = {
        "output": f"{folder}/compared",
        "experiment": f"{folder}/whole.yaml",
        "models": {"one": f"{folder}/model.yaml"},
        "budgets": [{"flops": 1e9}],
        "baseline": "one",
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison))
    assert submit.main(["--compare", f"{folder}/compare.yaml", "--gpus-per-node=1", "--dry-run"]) == 0
    assert any(f"{folder}/compare.yaml" in command for command in words(capsys.readouterr().out))
    assert submit.main(["--status", f"{folder}/compare.yaml"]) == 0
    capsys.readouterr()
    assert compare.main(["--config", f"{folder}/compare.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"data.folder={folder}/data" in printed or f"{folder}/whole.yaml" in printed
    assert submit.main(["--prepare", f"{folder}/data.yaml", f"folder={folder}/more", "--dry-run"]) == 0
    assert any(f"folder={folder}/more" in command for command in words(capsys.readouterr().out))
