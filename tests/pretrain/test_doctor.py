"""The doctor passes a sound world and names what is wrong with an unsound one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pretrain import doctor
from pretrain.parallel.settings import ParallelSettings
from pretrain.parallel.start import start_parallel
from pretrain.parallel.strategy import Parallel
from pretrain.plan import make_plans
from tests.helpers.corpus import prepare_tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import settings_for


def alone() -> Parallel:
    return start_parallel(ParallelSettings(strategy="single"))


class Pretended(Parallel):
    """One process that hears made-up answers from a second rank."""

    def __init__(self, other: Any) -> None:
        super().__init__(ParallelSettings(strategy="single"), "fp32", 0)
        self.other = other

    def gather(self, value: Any, background: bool = False) -> list[Any]:
        return [value, self.other]


def test_a_sound_process_passes_every_check(tmp_path: Path):
    prepare_tiny(tmp_path / "data")
    findings = doctor.examine(alone(), tmp_path / "runs", settings_for(tmp_path / "run", tmp_path / "data"))
    checks = ["device", "precision", "ranks", "bandwidth", "disk", "clock", "versions", "memory", "duration"]
    assert [f.check for f in findings] == checks
    assert all(f.passed for f in findings), findings
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_machine_alone_says_what_it_computes_and_what_auto_takes(tmp_path: Path):
    device, precision, *_, memory = doctor.examine(alone(), tmp_path, None)
    assert re.search(r"products in fp32 [\d,.]+ GFLOP/s, bf16 [\d,.]+ GFLOP/s, \d+ threads", device.text)
    assert re.match("auto takes (fp32|bf16): .* multipl", precision.text) and "GiB free for a rank" in memory.text


def test_the_duration_of_an_experiment_is_told_from_real_steps_or_from_flops(tmp_path: Path):
    """Of 8 steps each; real ones leave nothing behind, and the run's own directory is not touched."""
    prepare_tiny(tmp_path / "data")
    settings = settings_for(tmp_path / "run", tmp_path / "data")
    text = doctor.check_duration(alone(), settings, tmp_path, 2).text
    assert re.match(r"8 steps of \d+\.\d\d s \(median of 2 real ones\): about \d+ s", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    unprepared = settings_for(tmp_path / "run", tmp_path / "none", batch={"sequence_length": 32})
    text = doctor.check_duration(alone(), unprepared, tmp_path, 2).text
    assert re.match(r"8 steps, at least \d+ s: no real step was taken, .* FLOPs each .* in fp32$", text)
    several = settings_for(tmp_path / "run", tmp_path / "data", budget={"steps": None, "flops": [2e9, 4e9]})
    trunk, *branches = make_plans(several, 10**7, 128)
    steps = [plan.planned_steps for plan in branches]
    assert trunk.trunk and doctor.whole_steps([trunk, *branches], several) == steps[1] + round(0.2 * steps[0])


def test_other_versions_are_named():
    finding = doctor.check_versions(Pretended({"python": "2.7"}))
    assert not finding.passed and "differs" in finding.text and "None" in finding.text


def test_clocks_apart_are_found():
    finding = doctor.check_clock(Pretended(0.0))
    assert not finding.passed


def test_a_rank_that_cannot_write_is_named(tmp_path: Path):
    finding = doctor.check_disk(Pretended("No space left on device"), tmp_path)
    assert not finding.passed and "rank 1 No space left on device" in finding.text


def test_a_model_too_large_is_refused(tmp_path: Path):
    settings = settings_for(
        tmp_path,
        tmp_path / "none",
        model={"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 62},
        batch={"sequence_length": 2048},
    )
    finding = doctor.check_memory(alone(), settings)
    assert not finding.passed and "estimate" in finding.text


def examine_here(folder: Path) -> list[tuple[str, bool, str]]:
    parallel = start_parallel(ParallelSettings(strategy="ddp"))
    findings = doctor.examine(parallel, folder, None)
    parallel.finish()
    return [(f.check, f.passed, f.text) for f in findings]


@pytest.mark.slow
def test_two_ranks_see_each_other(tmp_path: Path):
    results = run_ranks(examine_here, 2, tmp_path)
    assert results[0] and all(passed for rank in results for _, passed, _ in rank)
    texts = {check: text for check, _, text in results[0]}
    assert texts["ranks"].startswith("2 ranks on 1 hosts") and "GB/s" in texts["bandwidth"]
