"""Joules: counters that begin anew, what is left out, who counts for whom; and what training and the report do of them.

Counters are files of a made-up powercap folder, or stand-ins that use a joule each time they are asked.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.energy import Counter, EnergyMeter, board, packages
from tests.helpers.corpus import prepare_tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import read_lines, settings_for, trainer_for

CPU = torch.device("cpu")
PACKAGES = "CPU packages by RAPL, whole, with whatever else ran on the machines"
BOARDS = "GPU boards by NVML, whole"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder)
    return folder


def zone(folder: Path, number: str, name: str, microjoules: int = 0, ends: int = 10**9) -> Path:
    """A zone of powercap; returns the file of its counter."""
    path = folder / number
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{ends}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


ENDS = (262_143_328_850, 1_000)
STRETCHES = st.lists(
    st.tuples(st.booleans(), st.tuples(*(st.integers(0, ends - 1) for ends in ENDS))), min_size=1, max_size=8
)


@given(start=st.tuples(*(st.integers(0, ends - 1) for ends in ENDS)), stretches=STRETCHES)
def test_what_counts_is_what_was_used_between_resume_and_pause(
    tmp_path_factory: pytest.TempPathFactory, start: tuple[int, ...], stretches: list[tuple[bool, tuple[int, ...]]]
) -> None:
    """However often the two counters begin anew, once a stretch at most; stretches that do not count leave no trace."""
    folder = tmp_path_factory.mktemp("powercap")
    files = [
        zone(folder, f"intel-rapl:{number}", f"package-{number}", now, ends)
        for number, (now, ends) in enumerate(zip(start, ENDS, strict=True))
    ]
    meter, expected, now = EnergyMeter.of_rank(CPU, True, folder), 0, list(start)
    for counts, used in stretches:
        if counts:
            meter.resume()
        now = [(one + more) % ends for one, more, ends in zip(now, used, ENDS, strict=True)]
        for file, value in zip(files, now, strict=True):
            file.write_text(f"{value}\n")
        if counts:
            expected += sum(used)
            meter.pause()
    assert meter.take() == pytest.approx(expected / 1e6, abs=1e-6)
    assert meter.take() == 0


def test_a_stretch_that_is_taken_midway_is_told_in_two_parts(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    meter = EnergyMeter.of_rank(CPU, True, tmp_path)
    meter.resume()
    file.write_text("7000000\n")
    assert meter.take() == 2.0
    file.write_text("10500000\n")
    meter.pause()
    file.write_text("99000000\n")
    assert meter.take() == 3.5


def test_only_whole_packages_are_read(tmp_path: Path) -> None:
    """A package's cores and memory have zones of their own, the whole platform one that holds the packages."""
    for number, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "package-1"), ("2", "psys")):
        zone(tmp_path, f"intel-rapl:{number}", name, 10 ** len(number))
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 77)
    assert [read() for read, _ in packages(tmp_path)] == [10, 10]
    assert packages(tmp_path / "none") == []
    assert EnergyMeter.of_rank(CPU, False, tmp_path).counters == {}, "another rank of the machine answers for them"
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:1" / "energy_uj").mkdir()  # unreadable, to root as well
    assert packages(tmp_path) == [], "one package of two is not what the machine took"


class Nvml:
    """As pynvml answers for one board, which is asked so often before it fails."""

    class NVMLError(Exception):
        pass

    def __init__(self, uuid: str, answers: int) -> None:
        self.uuid, self.answers, self.millijoules = uuid, answers, 4_000_000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise self.NVMLError("not found")
        return f"handle of {uuid}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == f"handle of {self.uuid}"
        self.answers -= 1
        if self.answers < 0:
            raise self.NVMLError("not supported")
        self.millijoules += 1500
        return self.millijoules


def test_a_board_is_found_by_its_id_and_one_that_fails_is_unknown_from_then_on() -> None:
    meter = EnergyMeter({"boards": board("ab-1", Nvml("GPU-ab-1", 4))})
    meter.resume()
    assert meter.take() == 1.5
    meter.pause()
    assert meter.take() == 1.5
    meter.resume()
    assert math.isnan(meter.take())
    assert board("ab-1", Nvml("GPU-ab-1", 0)) == [] and board("cd-2", Nvml("GPU-ab-1", 9)) == []


BOTH, CORES, GPU, NONE = {"packages", "boards"}, {"packages"}, {"boards"}, set[str]()


@pytest.mark.parametrize(
    ("ranks", "on_gpus", "said"),
    [
        ([(True, CORES)], False, PACKAGES),
        ([(True, NONE)], False, None),
        ([(True, CORES), (False, NONE), (True, CORES), (False, NONE)], False, PACKAGES),
        ([(True, CORES), (False, NONE), (True, NONE), (False, NONE)], False, None),
        ([(True, BOTH), (False, GPU)], True, f"{PACKAGES}; {BOARDS}"),
        ([(True, BOTH), (False, GPU), (True, GPU), (False, GPU)], True, BOARDS),
        ([(True, BOTH), (False, NONE)], True, None),
        ([(True, CORES)], True, None),
    ],
)
def test_a_kind_counts_where_all_machines_or_ranks_read_it(
    ranks: list[tuple[bool, set[str]]], on_gpus: bool, said: str | None
) -> None:
    meter = EnergyMeter({kind: [] for kind in ranks[0][1]})
    assert meter.agree(ranks, on_gpus) == said
    assert len(meter.counters) == (said or "").count(" by ")


# --- training ---------------------------------------------------------------------------------------------------


def a_joule_a_look(looks: int = 10**9) -> Counter:
    """A counter that has used one more joule whenever it is read, and fails after so many looks."""
    counts = itertools.count(1)

    def read() -> int:
        if (count := next(counts)) > looks:
            raise OSError("gone")
        return 10**6 * count

    return read, math.inf


def trained(folder: Path, data: Path, looks: int = 10**9, counter: bool = True, **changes: Any) -> list[dict[str, Any]]:
    """The lines of training steps of a run whose packages are such a counter."""
    settings = settings_for(
        folder, data, "vanilla", checkpoint={"every_steps": 3}, metrics={"every_steps": 1}, **changes
    )
    meter = EnergyMeter({"packages": [a_joule_a_look(looks)]} if counter else {})
    assert trainer_for(settings, meter).run() == 0
    return [line for line in read_lines(folder) if "loss" in line]


def test_steps_count_and_what_is_between_them_does_not(tmp_path: Path, data: Path) -> None:
    """A look at a step's beginning, its sums and its end: two joules a step, of the last one its update left out."""
    lines = trained(tmp_path, data, evaluation={"times": 2})
    assert [line["joules"] for line in lines] == [2 * step - 1 for step in range(1, 9)]
    assert read_lines(tmp_path)[-1]["joules"] == 15
    assert json.loads((tmp_path / "run.json").read_text())["energy"] == PACKAGES


def test_where_nothing_is_read_no_line_says_anything(tmp_path: Path, data: Path) -> None:
    assert not any("joules" in line for line in trained(tmp_path, data, counter=False))
    assert "energy" not in json.loads((tmp_path / "run.json").read_text())


def test_a_counter_that_fails_ends_the_count_and_not_the_run(tmp_path: Path, data: Path) -> None:
    lines = trained(tmp_path, data, looks=10)
    assert [line.get("joules") for line in lines] == [1, 3, 5, *[None] * 5]


@pytest.mark.parametrize(("counts_before", "counts_after"), [(True, True), (True, False), (False, True)])
def test_a_resume_keeps_the_sum_where_all_steps_are_known(
    tmp_path: Path, data: Path, counts_before: bool, counts_after: bool
) -> None:
    """Stopped after step 3, whose checkpoint the second half goes on from."""
    settings = settings_for(tmp_path, data, "vanilla", checkpoint={"every_steps": 3}, metrics={"every_steps": 1})
    trainer = trainer_for(settings, EnergyMeter({"packages": [a_joule_a_look()]} if counts_before else {}))
    step = trainer.training_step

    def stopping() -> dict[str, Any]:
        line = step()
        trainer.stopping = trainer.state.step == 3
        return line

    trainer.training_step = stopping  # type: ignore[method-assign]
    trainer.run()
    lines = trained(tmp_path, data, counter=counts_after)
    assert [line["step"] for line in lines] == list(range(1, 9))
    before = [1, 3, 5] if counts_before else [None] * 3
    after = [6, 8, 10, 12, 14] if counts_before and counts_after else [None] * 5
    assert [line.get("joules") for line in lines] == before + after


def train_on_two_machines(folder: Path, data: Path) -> list[float]:
    """Each of two ranks answers for its machine's packages."""
    os.environ["LOCAL_RANK"] = "0"
    changes = {"batch": {"micro_size": 2}, "parallel": {"strategy": "ddp"}, "metrics": {"every_steps": 1}}
    meter = EnergyMeter({"packages": [a_joule_a_look()]})
    trainer = trainer_for(settings_for(folder, data, "vanilla", **changes), meter)
    assert trainer.run() == 0
    trainer.parallel.finish()
    return [line["joules"] for line in read_lines(folder) if "loss" in line]


@pytest.mark.slow
def test_joules_are_those_of_all_machines(tmp_path: Path, data: Path) -> None:
    assert run_ranks(train_on_two_machines, 2, tmp_path, data)[0] == [2 * (2 * step - 1) for step in range(1, 9)]
