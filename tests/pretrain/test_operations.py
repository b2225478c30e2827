"""What one does with a run after it has ended: a larger budget, other settings, a new run that starts from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.prepare import prepare
from data_prep.settings import UserError, build, read_yaml
from pretrain import extend
from pretrain.checkpoint import committed, folder_of, read_tensors
from pretrain.config import ExperimentSettings, StartSettings
from pretrain.lock import RunLock
from pretrain.manifest import Manifest
from pretrain.parallel.start import start_parallel
from pretrain.parent import skipped_samples
from pretrain.trainer import Trainer
from tests.helpers.corpus import prepare_tiny, tiny_settings
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import figures, read_lines, settings_for, train, trainer_for

SHORT, LONG = 10, 16
WARMUP = {"warmup_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder, samples=200)
    return folder


def run_of(folder: Path, data: Path, steps: int, architecture: str = "mor_token", **changes: Any) -> ExperimentSettings:
    return settings_for(folder, data, architecture, **{"budget": {"steps": steps}, "schedule": WARMUP, **changes})


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("short") / "run"
    train(run_of(folder, data, SHORT))
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that had the larger budget from its beginning."""
    folder = tmp_path_factory.mktemp("long") / "run"
    train(run_of(folder, data, LONG, checkpoint={"every_steps": 4, "keep": 9}))
    return folder


def copied(short: Path, tmp_path: Path) -> Path:
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def training(folder: Path) -> list[dict[str, Any]]:
    return [line for line in figures(read_lines(folder)) if "loss" in line]


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = (read_tensors(committed(folder / "checkpoints")[-1][1]) for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- a larger budget ---


def test_a_larger_budget_gives_the_run_that_had_it_from_the_start(
    tmp_path: Path, data: Path, short: Path, long: Path
) -> None:
    folder, ended = copied(short, tmp_path), read_lines(short)
    train(run_of(folder, data, LONG))
    assert figures(read_lines(folder)) == figures(read_lines(long))
    assert same_tensors(folder, long)
    kept = folder / f"branches/{SHORT}-steps"  # of the old ending nothing is lost
    assert read_lines(kept) == ended
    assert (kept / "final/model.safetensors").read_bytes() == (short / "final/model.safetensors").read_bytes()
    assert [step for step, _ in committed(kept / "checkpoints")] == [SHORT]
    assert facts_of(kept)["name"] == f"mor_token-{SHORT}-steps"
    assert facts_of(folder)["extensions"] == [{"budget": SHORT, "step": 8, "kept_as": f"branches/{SHORT}-steps"}]
    assert trainer_for(run_of(folder, data, LONG)).run() == 0  # again: nothing to do
    train(run_of(folder, data, 20))  # and once more
    assert [e["budget"] for e in facts_of(folder)["extensions"]] == [SHORT, LONG]


@pytest.mark.parametrize("name", ["_keep_ending", "_cut_metrics", "_note", "_write"])
def test_an_extension_that_is_cut_short_is_made_whole_by_the_same_command(
    tmp_path: Path, data: Path, short: Path, long: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = copied(short, tmp_path)

    def dying(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extend, name, dying)
        with pytest.raises(KeyboardInterrupt):
            extend.grow(run_of(folder, data, LONG))
    train(run_of(folder, data, LONG))
    assert figures(read_lines(folder)) == figures(read_lines(long))
    assert read_lines(folder / f"branches/{SHORT}-steps") == read_lines(short)


def test_a_torn_last_line_of_metrics_keeps_no_budget_from_growing_and_no_child_from_its_parent(
    tmp_path: Path, data: Path, short: Path, long: Path
) -> None:
    """As of a run that was killed, or is being written, in its cool-down."""
    folder = copied(short, tmp_path)
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:-2]) + text[-2][:20])
    train(run_of(tmp_path / "child", data, LONG, **start(folder, step=8, take="run")))
    train(run_of(folder, data, LONG))
    assert figures(read_lines(folder)) == figures(read_lines(long))
    assert training(tmp_path / "child") == training(long)


def test_a_branch_is_under_its_trunks_lock(tmp_path: Path, data: Path, short: Path) -> None:
    folder = copied(short, tmp_path)
    train(run_of(folder, data, LONG))
    kept = folder / f"branches/{SHORT}-steps"
    with RunLock(folder, {}), pytest.raises(UserError, match="is at work there"):
        trainer_for(build(ExperimentSettings, read_yaml(kept / "config.yaml"), "test")).run()


def test_a_share_of_warm_up_stays_the_steps_that_the_run_was_begun_with(tmp_path: Path, data: Path) -> None:
    share = {"warmup_steps": None, "warmup_share": 0.2}
    train(run_of(tmp_path / "run", data, SHORT, schedule=share))
    train(run_of(tmp_path / "run", data, LONG, schedule=share))
    train(run_of(tmp_path / "long", data, LONG, schedule={"warmup_steps": 2}))
    assert training(tmp_path / "run") == training(tmp_path / "long")


def test_a_new_budget_for_an_old_trunk_adds_a_branch(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def several(*budgets: int) -> ExperimentSettings:
        return run_of(tmp_path / "trunk", data, 0, budget={"steps": None, "flops": list(budgets)})

    keeping = {"checkpoint": {"milestone_every": 2}, "budget": {"steps": None, "flops": [100_000_000, 150_000_000]}}
    train(run_of(tmp_path / "passing", data, 0, **keeping))
    train(several(100_000_000, 150_000_000))
    before = [read_lines(folder) for folder in sorted((tmp_path / "trunk/branches").iterdir())]
    train(several(100_000_000, 150_000_000, 250_000_000))
    folders = sorted((tmp_path / "trunk/branches").iterdir())
    assert [folder.name for folder in folders] == ["1.5e08", "1e08", "2.5e08"]
    assert [read_lines(folder) for folder in folders[:2]] == before
    train(run_of(tmp_path / "alone", data, 0, budget={"steps": None, "flops": 250_000_000}))
    assert figures(read_lines(folders[2])) == figures(read_lines(tmp_path / "alone"))
    with pytest.raises(UserError, match=r"budgets of its branches stay in the list; 1e\+08 are missing"):
        trainer_for(several(150_000_000, 250_000_000, 300_000_000)).run()
    # a trunk whose newest checkpoints are lost passes branches that have ended, and leaves them alone
    ended, again = {folder: read_lines(folder) for folder in folders}, tmp_path / "again"
    shutil.copytree(tmp_path / "trunk", again)
    old = committed(tmp_path / "passing/checkpoints")[0][1]
    for path in (again / "checkpoints").iterdir():
        shutil.rmtree(path)
    shutil.copytree(old, again / "checkpoints" / old.name)
    train(several(100_000_000, 150_000_000, 250_000_000, 300_000_000).model_copy(update={"run_dir": again}))
    assert [read_lines(again / "branches" / folder.name) for folder in folders] == list(ended.values())
    # one that the trunk has passed: from what the branch before it left
    before = {folder: read_lines(folder) for folder in [tmp_path / "trunk", *folders]}
    all_four = several(100_000_000, 150_000_000, 200_000_000, 250_000_000)
    with monkeypatch.context() as patch:  # and the same command after it was cut short
        patch.setattr(extend.Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extend.grow(all_four)
    train(all_four)
    assert {folder: read_lines(folder) for folder in before} == before
    train(run_of(tmp_path / "passed", data, 0, budget={"steps": None, "flops": 200_000_000}))
    assert figures(read_lines(tmp_path / "trunk/branches/2e08")) == figures(read_lines(tmp_path / "passed"))
    assert same_tensors(tmp_path / "trunk/branches/2e08", tmp_path / "passed")
    with pytest.raises(UserError, match=r"branch of 9e\+07 FLOPs leaves .* no checkpoint before that.*milestone_every"):
        trainer_for(several(90_000_000, *all_four.budget.totals)).run()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"steps": 8}}, "smaller than 10.*start_from="),
        ({"budget": {"steps": None, "tokens": 10_000}}, "begun with budget.steps.*only its size may change"),
        ({"budget": {"steps": LONG, "convention": "paper"}}, "begun with budget.steps"),
        ({"budget": {"steps": LONG}, "seed": 4}, "differ: budget.steps, seed.*start_from="),
        ({"seed": 4}, "differ: seed.*start_from="),
        ({"optimizer": {"learning_rate": 1e-3}}, r"differ: optimizer\.learning_rate.*another run_dir"),
    ],
)
def test_what_cannot_change_is_refused_with_the_way_out(
    tmp_path: Path, data: Path, short: Path, changes: dict[str, Any], words: str
) -> None:
    folder = copied(short, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words):
        trainer_for(
            settings_for(folder, data, "mor_token", **{"budget": {"steps": SHORT}, "schedule": WARMUP} | changes)
        ).run()
    assert before == {path: path.read_bytes() for path in before}


def test_a_cosine_is_not_extended_and_neither_is_a_run_whose_plateau_is_gone(
    tmp_path: Path, data: Path, short: Path
) -> None:
    cosine = {"schedule": {"kind": "cosine", **WARMUP}}
    train(run_of(tmp_path / "cosine", data, 4, **cosine))
    with pytest.raises(UserError, match=r"cosine depends on its budget.*start_from.take=optimizer"):
        trainer_for(run_of(tmp_path / "cosine", data, 6, **cosine)).run()
    folder = copied(short, tmp_path)
    shutil.rmtree(folder_of(folder / "checkpoints", 8))
    with pytest.raises(UserError, match=r"beginning of its cool-down is gone.*start_from.take=optimizer"):
        trainer_for(run_of(folder, data, LONG)).run()


# --- what may change ---


def test_a_changed_evaluation_is_taken_and_noted(tmp_path: Path, data: Path, short: Path) -> None:
    folder = copied(short, tmp_path)
    train(run_of(folder, data, LONG, evaluation={"sequences": 2, "every_steps": 3}, metrics={"every_steps": 2}))
    (change,) = facts_of(folder)["changes"]
    assert change == {
        "after_step": 8,
        "keys": {"evaluation.every_steps": [None, 3], "evaluation.sequences": [4, 2]},
    }
    assert [line["step"] for line in read_lines(folder) if "validation_loss" in line] == [9, 12, 15, 16]


def test_epochs_and_samples_are_counted_and_repetition_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_tiny(tmp_path / "data", samples=10)
    settings = settings_for(tmp_path / "run", tmp_path / "data", "vanilla", batch={"size": 160, "micro_size": 160})
    trainer = trainer_for(settings)
    size = len(trainer.loader)
    assert trainer.run() == 0
    lines = read_lines(tmp_path / "run")
    assert [line["samples"] for line in lines[:3]] == [160, 320, 480]
    assert [line["epoch"] for line in lines] == [line["samples"] / size for line in lines]
    assert lines[-1]["epoch"] > 1
    assert capsys.readouterr().out.count("the data repeats itself from here on") == 1


# --- a run that starts from another ---


def start(path: Path, **fields: Any) -> dict[str, Any]:
    return {"start_from": {"path": path, **fields}}


def test_all_of_a_run_taken_is_that_run_going_on(tmp_path: Path, data: Path, long: Path) -> None:
    """Back to step 4 and on with the same data: the curve is the parent's, bit for bit."""
    train(run_of(tmp_path / "again", data, LONG, **start(long, step=4, take="run")))
    assert training(tmp_path / "again") == training(long)
    parent = facts_of(tmp_path / "again")["parent"]
    assert (parent["step"], parent["counted"], parent["flops"]) == (4, True, training(long)[3]["flops"])


def test_the_batches_of_a_spike_are_skipped(tmp_path: Path, data: Path, long: Path) -> None:
    trainer = trainer_for(run_of(tmp_path / "skips", data, LONG, **start(long, step=4, take="run", skip_steps=[6, 8])))
    seen, load = [], trainer.loader.load

    def watched(position: int) -> Any:
        seen.append(position // 4 + 1)  # the parent's step
        return load(position)

    trainer.loader.load = watched  # type: ignore[method-assign]
    assert trainer.run() == 0
    assert seen[:4] == [5, 9, 10, 11]
    assert training(tmp_path / "skips")[:5] == training(long)[:5]
    assert training(tmp_path / "skips")[5]["loss"] != training(long)[5]["loss"]
    assert training(tmp_path / "skips")[-1]["step"] == LONG


def test_the_cool_down_may_be_on_other_data_of_the_same_tokenizer(tmp_path: Path, data: Path, long: Path) -> None:
    others = tiny_settings(tmp_path / "others", seed=5, tokenizer={"load": str(data / "tokenizer.json")})
    prepare(others)
    anneal = start(long, step=12, take="run", data="fresh")
    train(run_of(tmp_path / "new", tmp_path / "others", LONG, **anneal))
    lines = training(tmp_path / "new")
    assert lines[:12] == training(long)[:12] and lines[12]["loss"] != training(long)[12]["loss"]
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in training(long)]
    prepare(tiny_settings(tmp_path / "foreign", seed=6, source={"kind": "synthetic", "documents": 90}))
    with pytest.raises(UserError, match="tokenizer"):
        trainer_for(run_of(tmp_path / "refused", tmp_path / "foreign", LONG, **anneal)).run()


def test_a_parent_in_training_gives_the_checkpoint_that_was_noted(
    tmp_path: Path, data: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves newer ones, and removes the older, while its child starts."""
    parent, aside = copied(short, tmp_path), tmp_path / "later"
    newest, before = (folder_of(parent / "checkpoints", step) for step in (SHORT, 8))
    newest.rename(aside)
    settings, taking = run_of(tmp_path / "new", data, 3, **start(parent)), Trainer.begin_from_parent

    def meanwhile(trainer: Trainer, *arguments: Any) -> Any:
        aside.rename(newest)
        return taking(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "begin_from_parent", meanwhile)
        train(settings)
    noted, own = read_tensors(before), read_tensors(folder_of(tmp_path / "new/checkpoints", 0))
    assert facts_of(tmp_path / "new")["parent"]["step"] == 8
    assert all(torch.equal(tensor, noted[name]) for name, tensor in own.items() if name.startswith("model/"))

    def removed(trainer: Trainer, *arguments: Any) -> Any:
        shutil.rmtree(newest)
        return taking(trainer, *arguments)

    settings = run_of(tmp_path / "other", data, 3, **start(parent))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "begin_from_parent", removed)
        with pytest.raises(UserError, match=f"step-{SHORT:08d}"):
            trainer_for(settings).run()
    train(settings)
    assert facts_of(tmp_path / "other")["parent"]["step"] == 8


def test_branches_need_the_trunks_parent_only_once(tmp_path: Path, data: Path, short: Path) -> None:
    parent = copied(short, tmp_path)
    budget = {"steps": None, "flops": [100_000_000, 150_000_000]}
    trainer = trainer_for(run_of(tmp_path / "trunk", data, 0, budget=budget, **start(parent)))
    starts = trainer.start_branch

    def meanwhile(branch: Any) -> None:
        shutil.rmtree(parent, ignore_errors=True)
        starts(branch)

    trainer.start_branch = meanwhile  # type: ignore[method-assign]
    assert trainer.run() == 0
    folders = [tmp_path / "trunk", *(tmp_path / "trunk/branches").iterdir()]
    assert [facts_of(folder)["parent"]["step"] for folder in folders] == [SHORT] * 3


def test_samples_to_skip_follow_the_parents_steps() -> None:
    settings = StartSettings.model_validate({"path": "x", "take": "run", "skip_steps": [6, 8]})
    assert skipped_samples(settings, 4, 20, 5) == (20, 32)
    with pytest.raises(UserError, match="must be below 6"):
        skipped_samples(settings, 4, 24, 6)


@pytest.mark.parametrize("take", ["weights", "optimizer"])
def test_weights_and_optimizer_are_taken_and_the_rest_begins_anew(
    tmp_path: Path, data: Path, long: Path, take: str
) -> None:
    settings = run_of(tmp_path / "new", data, 3, optimizer={"learning_rate": 1e-3}, **start(long, step=12, take=take))
    assert train(settings)[0]["step"] == 1
    source, own = (
        read_tensors(folder_of(root / "checkpoints", step)) for root, step in ((long, 12), (tmp_path / "new", 0))
    )
    taken = {name for name in source if take == "optimizer" or name.startswith("model/")}
    assert all(torch.equal(source[name], own[name]) for name in taken)
    assert (own.keys() == taken) or take == "weights"
    parent = facts_of(tmp_path / "new")["parent"]
    assert (parent["step"], parent["counted"], parent["take"]) == (12, False, take)


def test_a_run_needs_its_parent_only_once(tmp_path: Path, data: Path, short: Path) -> None:
    parent = copied(short, tmp_path)
    settings = run_of(tmp_path / "new", data, 3, **start(parent))
    trainer = trainer_for(settings)
    trainer.stop_at = 1  # type: ignore[attr-defined]
    after_step = trainer.after_step

    def stopping(*arguments: Any) -> None:
        after_step(*arguments)
        (tmp_path / "new/stop").touch()

    trainer.after_step = stopping  # type: ignore[method-assign]
    assert trainer.run() == 75
    shutil.rmtree(parent)
    assert train(settings)[-1]["event"] == "finished"


@pytest.mark.parametrize(
    ("source", "target"), [("mor_token", "recursive"), ("recursive", "mor_expert"), ("vanilla", "vanilla")]
)
def test_routing_may_come_and_go_between_parent_and_child(tmp_path: Path, data: Path, source: str, target: str) -> None:
    train(run_of(tmp_path / "parent", data, 3, source))
    train(run_of(tmp_path / "child", data, 3, target, **start(tmp_path / "parent/final")))
    there = read_tensors(committed(tmp_path / "parent/checkpoints")[-1][1])
    own = read_tensors(folder_of(tmp_path / "child/checkpoints", 0))
    shared = {name for name in there.keys() & own.keys() if name.startswith("model/")}
    assert shared and all("model.depth." in name for name in own.keys() - shared if name.startswith("model/"))
    assert all(torch.equal(there[name], own[name]) for name in shared)


@pytest.mark.parametrize(
    ("fields", "changes", "words"),
    [
        ({"step": 5}, {}, r"no checkpoint of step 5; it has: 4, 8, 12, 13, 16"),
        ({"take": "run"}, {}, r"spent this run's budget by step 16 already"),
        ({"take": "run", "step": 4}, {"budget": {"steps": LONG, "convention": "paper"}}, "counts FLOPs by exact"),
        ({"take": "run", "step": 4}, {"seed": 3, "budget": {"steps": LONG}}, "seed 3 orders the data differently"),
        (
            {"take": "run", "step": 8, "skip_steps": [6, 9]},
            {"budget": {"steps": LONG}},
            "start_from.step must be below 6",
        ),
        ({}, {"model": {"hidden_size": 32}}, "of another model: .*16.*32"),
        ({}, {"model": {"share_norms": False}}, "has share_norms True, this run's model False"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(
    tmp_path: Path, data: Path, long: Path, fields: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    given = {"budget": {"steps": 4}, "schedule": WARMUP, **start(long, **fields)} | changes
    with pytest.raises(UserError, match=words):
        trainer_for(settings_for(tmp_path / "new", data, "mor_token", **given)).run()


def test_a_start_is_a_path_or_its_fields(tmp_path: Path) -> None:
    assert StartSettings.model_validate("runs/x").path == Path("runs/x")
    with pytest.raises(ValueError, match="skip_steps needs data: continue"):
        StartSettings.model_validate({"path": "x", "skip_steps": [1, 2]})


# --- on ranks ---


def on_ranks(several: list[ExperimentSettings]) -> None:
    """Train one after the other, in one launch."""
    parallel = start_parallel(several[0].parallel, "fp32", 0)
    for settings in several:
        trainer = Trainer(settings, Manifest.read(settings.data.folder), parallel)
        assert trainer.run() == 0
        parallel.barrier()
    parallel.finish()


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "other"), [("ddp", "zero2"), ("zero2", "fsdp2"), ("fsdp2", "ddp")])
def test_the_operations_on_two_ranks(tmp_path: Path, data: Path, strategy: str, other: str) -> None:
    """A larger budget with a changed evaluation, back before a spike, weights to its own and to another strategy."""

    def settings(name: str, steps: int, strategy: str = strategy, **changes: Any) -> ExperimentSettings:
        section = {"strategy": strategy, "watchdog_seconds": 0}
        section |= {"min_unit_parameters": 0} if strategy == "fsdp2" else {}
        rule = {"batch": {"micro_size": 1}, "checkpoint": {"milestone_every": 4}, "parallel": section}
        return run_of(tmp_path / name, data, steps, "mor_expert", **rule | changes)

    back = start(tmp_path / "run", step=4, take="run", skip_steps=[6, 7])
    fewer = {"evaluation": {"sequences": 2}}
    several = [settings("run", SHORT), settings("run", LONG, **fewer), settings("long", LONG, **fewer)]
    several += [settings("back", 8, **back), settings("same", 3, **start(tmp_path / "run"))]
    run_ranks(on_ranks, 2, several)
    run_ranks(on_ranks, 2, [settings("weights", 3, other, **start(tmp_path / "run"))])
    assert training(tmp_path / "run") == training(tmp_path / "long")
    assert same_tensors(tmp_path / "run", tmp_path / "long")
    assert read_lines(tmp_path / f"run/branches/{SHORT}-steps")[-1]["event"] == "finished"
    assert facts_of(tmp_path / "run")["changes"][0]["keys"] == {"evaluation.sequences": [4, 2]}
    assert training(tmp_path / "back")[:5] == training(tmp_path / "run")[:5]
    assert training(tmp_path / "back")[5]["loss"] != training(tmp_path / "run")[5]["loss"]
    losses = [[line["loss"] for line in training(tmp_path / name)] for name in ("weights", "same")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert facts_of(tmp_path / "weights")["parent"]["step"] == LONG
