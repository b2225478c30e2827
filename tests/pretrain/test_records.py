"""Records of runs: a report made again from them says the same; what is there, or lies outside, is left alone."""

import io
import json
import tarfile

import pytest

from data_prep.settings import UserError
from pretrain.report import records
from pretrain.report.runs import read_run, read_runs
from pretrain.report.write import write_report
from tests.helpers.runs import MODELS, make_run


def report_of(folder, output):
    results = write_report([folder], output)
    return json.loads(json.dumps(results).replace(str(folder), "FOLDER"))


@pytest.fixture
def runs(tmp_path):
    """A folder of finished runs, two seeds each, one with more lines than a record keeps, and one that goes on."""
    folder = tmp_path / "runs"
    for name in MODELS:
        for seed in (0, 1):
            make_run(folder / f"{name}-{seed}", name, seed=seed, loss=3 + 0.1 * seed, lines=300 if seed else 8)
    make_run(folder / "wide", name="wide", hidden_size=64, finished=False)
    for rate in (1e-3, 3e-3, 9e-3):
        make_run(folder / "sweep" / f"vanilla-{rate}", seed=1000, rate=rate, loss=3 + rate)
    return folder


def test_a_report_made_again_from_its_records_says_the_same(runs, tmp_path):
    first = report_of(runs, tmp_path / "first")
    unfinished = [row for row in first["runs"] if not row["finished"]]
    assert len(unfinished) == 1
    again = tmp_path / "again"
    assert records.unpack(tmp_path / "first" / records.FILE, again) == 2 * len(MODELS) + 3
    second = report_of(again, tmp_path / "second")
    assert second["differences"] == first["differences"] and second["sweep"] == first["sweep"]
    assert second["runs"] == [row for row in first["runs"] if row["finished"]]
    before, after = (read_run(folder / "mor_expert_nr3-1") for folder in (runs, again))
    training = [[line for line in run.lines if "validation_loss" not in line] for run in (before, after)]
    assert (len(training[0]), len(training[1]), after.validations) == (300, 101, before.validations)
    assert training[1][-1] == training[0][-1]
    kept = [(tmp_path / name / records.FILE).read_bytes() for name in ("first", "second")]
    assert kept[0] == kept[1]


def test_what_is_there_already_stays(runs, tmp_path):
    write_report([runs], tmp_path / "report")
    (runs / "vanilla-0" / "mine.txt").write_text("mine")
    assert records.unpack(tmp_path / "report" / records.FILE, runs) == 0
    assert (runs / "vanilla-0" / "mine.txt").read_text() == "mine" and not list(runs.glob("*.partial"))


def test_no_path_of_a_machine_is_in_a_record(tmp_path):
    folder = make_run(
        tmp_path / "runs" / "child",
        parent={"path": "runs/parent", "folder": str(tmp_path), "take": "run", "counted": True, "flops": 1.0},
    )
    records.pack(read_runs([folder])[0], tmp_path / records.FILE)
    records.unpack(tmp_path / records.FILE, tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "child" / "run.json").read_text()


def test_what_is_no_record_or_lies_outside_is_refused(tmp_path):
    (tmp_path / "text").write_text("no archive")
    with tarfile.open(tmp_path / "outside", "w:xz") as archive:
        entry = tarfile.TarInfo("../outside/run.json")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    for name in ("text", "outside", "missing"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as records"):
            records.unpack(tmp_path / name, tmp_path / "target")
    assert not (tmp_path / "outside" / "run.json").exists() and not list((tmp_path / "target").glob("*"))
