"""The doctor passes a sound world and names what is wrong with an unsound one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain import doctor
from pretrain.parallel import Parallel
from pretrain.parallel_settings import ParallelSettings
from tests.helpers.corpus import prepare_tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import settings_for


def alone() -> Parallel:
    return Parallel.start(ParallelSettings(strategy="single"))


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
    assert [f.check for f in findings] == ["ranks", "bandwidth", "disk", "clock", "versions", "memory"]
    assert all(f.passed for f in findings), findings
    assert list((tmp_path / "runs").iterdir()) == []


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
    parallel = Parallel.start(ParallelSettings(strategy="ddp"))
    findings = doctor.examine(parallel, folder, None)
    parallel.finish()
    return [(f.check, f.passed, f.text) for f in findings]


@pytest.mark.slow
def test_two_ranks_see_each_other(tmp_path: Path):
    results = run_ranks(examine_here, 2, tmp_path)
    assert results[0] and all(passed for rank in results for _, passed, _ in rank)
    texts = {check: text for check, _, text in results[0]}
    assert texts["ranks"].startswith("2 ranks on 1 hosts") and "GB/s" in texts["bandwidth"]
