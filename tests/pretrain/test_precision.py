"""What `auto` stands for, who decides it, and that what exists goes on in its own precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.settings import UserError
from model import hardware
from model.hardware import CPU
from pretrain import precision
from pretrain.config import ExperimentSettings
from pretrain.manifest import Manifest
from pretrain.parallel.start import start_parallel
from pretrain.parallel.strategy import Parallel
from pretrain.trainer import Trainer
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import settings_for

PLACE = torch.device("cpu")
CAPABLE = {
    "AMX": CPU(amx_bf16=True, avx512_bf16=True, packs_bf16=True),
    "AVX512-BF16": CPU(avx512_bf16=True, packs_bf16=True),
    "Arm": CPU(arm_bf16=True, packs_bf16=True),
}
PLAIN = {"AVX2": CPU(), "AVX-512 without bf16": CPU(packs_bf16=True), "converts only": CPU(avx_ne_convert=True)}


@pytest.fixture
def pretend(monkeypatch):
    """Makes this machine's CPU another one."""

    def become(cpu: CPU) -> None:
        monkeypatch.setattr(hardware, "physical_cpu", lambda: cpu)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    monkeypatch.delenv(hardware.SWITCH, raising=False)
    return become


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare_tiny(folder)
    return folder


def started(settings: ExperimentSettings) -> tuple[Trainer, Parallel]:
    parallel = start_parallel(settings.parallel, settings.precision, settings.seed)
    settings = precision.settle(settings, parallel)
    return Trainer(settings, Manifest.read(settings.data.folder), parallel), parallel


@pytest.mark.parametrize(
    ("cpu", "expected"), [(c, "bf16") for c in CAPABLE.values()] + [(c, "fp32") for c in PLAIN.values()]
)
def test_auto_asks_the_hardware(cpu, expected, pretend, monkeypatch):
    pretend(cpu)
    assert hardware.auto_precision(PLACE)[0] == expected
    assert precision.expected("auto", gpus=False) == expected and precision.expected("auto", gpus=True) == "bf16"
    assert hardware.loading_dtype(torch.bfloat16, PLACE) == hardware.DTYPES[expected]
    assert hardware.packs(torch.bfloat16, PLACE) == (cpu.packs_bf16 and torch.backends.mkldnn.is_available())
    monkeypatch.setenv(hardware.SWITCH, "1")
    assert hardware.auto_precision(PLACE)[0] == "fp32" and not hardware.packs(torch.bfloat16, PLACE)
    assert hardware.loading_dtype(torch.bfloat16, PLACE) == torch.float32
    assert hardware.loading_dtype(torch.float64, PLACE) == torch.float64


def test_the_switch_says_one_or_nought(monkeypatch):
    monkeypatch.setenv(hardware.SWITCH, "yes")
    with pytest.raises(ValueError, match=r"MOR_PLAIN_CPU: expected 1 .* or 0, got 'yes'"):
        hardware.cpu()


def test_a_new_run_records_what_auto_took_and_goes_on_in_it_on_another_machine(tmp_path, data, pretend, capsys):
    pretend(CPU())
    settings = settings_for(tmp_path / "run", data, precision="auto", budget={"steps": 3})
    trainer, parallel = started(settings)
    assert parallel.precision == "fp32" and trainer.run() == 0
    assert "precision: fp32 (auto: " in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["precision"] == "fp32"
    assert json.loads((tmp_path / "run/run.json").read_text())["precision"] == "fp32"
    pretend(CAPABLE["AMX"])
    again, parallel = started(settings)
    assert parallel.precision == "fp32" and again.settings.precision == "fp32"
    assert "precision: fp32 (as this run was started)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was started in fp32.*leave out precision=bf16, or give another run_dir"):
        started(settings_for(tmp_path / "run", data, precision="bf16", budget={"steps": 3}))
    fresh = precision.settle(settings, start_parallel(settings.parallel, "auto"), restart=True)
    assert fresh.precision == "bf16"  # what is set aside decides nothing


def test_a_run_in_bf16_goes_on_where_that_is_slow_and_says_so(pretend):
    pretend(CPU())
    chosen, line = precision.decided("auto", "bf16", PLACE, "runs/x")
    assert chosen == "bf16" and "as this run was started" in line and "times as long as in fp32 (measured now)" in line
    pretend(CAPABLE["AVX512-BF16"])
    assert precision.decided("bf16", None, PLACE, "runs/x") == ("bf16", "bf16 (as configured)")


def test_a_checkpoint_of_another_precision_is_refused(tmp_path, data, pretend):
    """One that was copied into the run directory of another run."""
    settings = settings_for(tmp_path / "run", data, budget={"steps": 2})
    trainer, _ = started(settings)
    with pytest.raises(UserError, match=r"was trained in bf16, this run in fp32"):
        trainer.require_precision("step-00000002", {"settings": {"precision": "bf16"}})
    trainer.require_precision("step-00000002", {"settings": {"precision": "fp32"}})


def test_what_torch_refuses_is_one_line(monkeypatch):
    def refuse(*_):
        raise RuntimeError("\"addmm\" not implemented for 'BFloat16'\nmore")

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    with pytest.raises(UserError, match=r"^precision: torch refuses bf16 on .*addmm.*; use precision=fp32 or auto$"):
        precision.decided("bf16", None, PLACE, "runs/x")
    assert precision.decided("fp32", None, PLACE, "runs/x")[0] == "fp32"


def test_an_unknown_precision_is_one_line():
    with pytest.raises(UserError, match=r"^precision: expected auto, fp32 or bf16, got 'fp8'$"):
        precision.expected("fp8", gpus=False)


def test_a_comparison_decides_once(tmp_path, pretend):
    pretend(CPU())
    folders = [tmp_path / name for name in ("a", "b", "c")]
    assert precision.of_comparison(folders, gpus=False) == "fp32"
    for folder, started_in in zip(folders, ("bf16", "bf16"), strict=False):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"precision: {started_in}\n")
    assert precision.of_comparison(folders, gpus=False) == "bf16"
    folders[2].mkdir()
    (folders[2] / "config.yaml").write_text("precision: fp32\n")
    with pytest.raises(UserError, match=r"several precisions.*name one"):
        precision.of_comparison(folders, gpus=False)


def test_evaluation_takes_what_is_fast_and_says_what_it_left(pretend):
    pretend(CPU())
    chosen, line = precision.for_evaluation(None, "bf16", PLACE)
    assert chosen == "fp32" and "trained in bf16, which --precision bf16 asks for" in line
    assert precision.for_evaluation("bf16", "bf16", PLACE)[0] == "bf16"
    assert precision.for_evaluation(None, None, PLACE)[0] == "fp32"
    pretend(CAPABLE["AMX"])
    assert precision.for_evaluation(None, "bf16", PLACE) == ("bf16", "bf16 (as trained)")
    assert precision.for_evaluation("auto", "fp32", PLACE)[0] == "fp32"
