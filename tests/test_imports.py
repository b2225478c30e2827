"""What is imported when: a command that only reads or prints brings no model, and no optional library is needed.

Told by which modules are there, not by a clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import settings_for

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("deepspeed", "datasets", "wandb", "webdataset")
HEAVY = (
    *OPTIONAL,
    "transformers.models.llama.modeling_llama",
    "transformers.modeling_utils",
    "torch._dynamo",
    "scipy",
    "pandas",
    "matplotlib",
    "lm_eval",
    "fastapi",
    "uvicorn",
)
PRINT = ["pretrain/main.py", "--config", "configs/experiment/smoke.yaml", "--print-config"]
COMMANDS = [PRINT] + [
    [*command.split(), "--help"]
    for command in (
        "-m model.inference.generate",
        "-m model.inference.serve",
        "-m pretrain.budget",
        "-m pretrain.doctor",
        "-m pretrain.evaluate",
        "-m pretrain.runs",
        "-m pretrain.report",
        "launchers/compare.py",
        "launchers/submit.py",
    )
]
# Runs what follows as `python ARGUMENTS` would, and says at its end which of the modules were imported.
WATCHED = """
import atexit, json, runpy, sys
heavy, target, *sys.argv = json.loads(sys.argv[1]), *sys.argv[2:]
atexit.register(lambda: print(json.dumps([m for m in heavy if m in sys.modules]), file=sys.stderr))
sys.path[0] = "."
if target == "-m":
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, target)
    runpy.run_path(target, run_name="__main__")
"""
# Every package of the project without the optional libraries, then a run of a few steps.
HIDDEN = """
import importlib, pkgutil, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in sys.argv[1].split(",")
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
import data_prep, launchers, model, pretrain
for package in (model, data_prep, pretrain, launchers):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
from pretrain.config import read_settings
from pretrain.main import train
raise SystemExit(train(read_settings(sys.argv[2])))
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_what_only_prints_imports_no_model(command: list[str]) -> None:
    ended = run(WATCHED, json.dumps(HEAVY), *command)
    assert ended.returncode == 0 and ended.stdout, ended.stderr
    assert json.loads(ended.stderr.splitlines()[-1]) == []


def test_how_ranks_share_the_work_is_read_without_torch() -> None:
    ended = run("import sys, pretrain.parallel.settings; print('torch' in sys.modules)")
    assert ended.stdout == "False\n", ended.stderr


def test_the_watch_sees_what_is_imported() -> None:
    ended = run(WATCHED, json.dumps(["torch", "wandb"]), "-m", "pretrain.budget", "--help")
    assert json.loads(ended.stderr.splitlines()[-1]) == ["torch"]


def test_no_optional_library_is_needed(tmp_path: Path) -> None:
    prepare_tiny(tmp_path / "data")
    settings = settings_for(tmp_path / "run", tmp_path / "data", budget={"steps": 2})
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    ended = run(HIDDEN, ",".join(OPTIONAL), str(experiment))
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_the_hiding_hides() -> None:
    ended = run(HIDDEN, "packaging", "none.yaml")
    assert ended.returncode != 0 and "No module named 'packaging'" in ended.stderr
