"""Comparisons: the plan; running, resuming, failing and stopping, with a made-up trainer; one real run end to end.

The made-up trainer copies a run directory prepared by `make_run`, so that a test takes a second and no model.
"""

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from rich.console import Console

from data_prep.settings import UserError
from launchers import compare
from launchers import grid as planning
from pretrain.lock import RunLock
from tests.helpers.runs import make_run

CONFIGS = sorted(path for path in Path("configs/compare").glob("*.yaml") if path.name != "paper.yaml")
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "vanilla": TINY,
    "recursive_nr3": {**TINY, "num_recursions": 3},
    "mor_expert_nr3": {**TINY, "num_recursions": 3, "routing": "expert_choice"},
}
TRAINER = """
import pathlib, shutil, signal, sys, time
staged, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
given = dict(argument.partition("=")[::2] for argument in sys.argv[3:])
folder = pathlib.Path(given["run_dir"])
with open(staged / "starts.txt", "a") as file:
    file.write(folder.name + "\\n")
if mode == "fail" and "recursive" in folder.name:
    sys.exit("ValueError: it broke")
folder.mkdir(parents=True, exist_ok=True)
if mode == "wait":
    def stop(number, frame):
        (folder / "checkpoint").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    time.sleep(60)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready").touch()
    time.sleep(60)
if mode == "requeue":
    sys.exit(75)
if mode == "hidden":
    (folder / "requeue").touch()
    sys.exit(1)
if mode == "terminated":
    signal.raise_signal(signal.SIGTERM)
if mode == "broken":
    sys.exit(1)
if mode == "full":
    (folder / "requeue").touch()
    sys.exit(74)
if mode == "sweep" and float(given.get("optimizer.learning_rate", 0)) > 0.1:
    sys.exit("RunFailed: the loss is not finite")
shutil.copytree(staged / folder.name, folder, dirs_exist_ok=True)
"""


def stage(folder, arguments):
    """What the made-up trainer copies for a run of a sweep: rates near 4e-3 do best."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    name = given["name"].partition("_nr3")[0]
    run_dir, seed, rate = Path(given["run_dir"]), int(given["seed"]), float(given.get("optimizer.learning_rate", 3e-3))
    if (folder / run_dir.name).exists():
        return
    loss, budget = 3 + 20 * abs(rate - 4e-3) + 0.05 * (seed % 3), float(given["budget.flops"])
    kind = name + "_nr3" if "_nr3" in given["name"] else name
    make_run(folder / run_dir.name, kind, seed=seed, rate=rate, loss=loss, name=given["name"], budget=budget)


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """(settings, use): a comparison of three models and two seeds, and a function that sets the trainer's mode."""
    experiment = tmp_path / "experiment.yaml"
    data = {"folder": str(tmp_path / "data"), "prepare": "configs/data/smoke.yaml"}
    experiment.write_text(yaml.safe_dump({"data": data, "batch": {"size": 8}}))
    config = tmp_path / "compare.yaml"
    values = {
        "output": str(tmp_path / "out"),
        "experiment": str(experiment),
        "models": MODELS,
        "budgets": [{"flops": 2e10}],
        "seeds": [0, 1],
        "at_once": 2,
    }
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    for name in MODELS:
        for seed in (0, 1):
            make_run(tmp_path / "staged" / f"{name}-seed{seed}", name, seed=seed, loss=3 + 0.1 * seed)
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)

    def use(mode):
        def command(settings, run):
            if mode == "sweep":
                stage(tmp_path / "staged", run.arguments)
            return [sys.executable, str(script), str(tmp_path / "staged"), mode, *run.arguments[2:]]

        monkeypatch.setattr(compare, "local_command", command)

    use("run")
    monkeypatch.setattr(compare, "POLL_SECONDS", 0.05)
    return compare.read_compare(config, []), use


def starts(settings):
    path = settings.output.parent / "staged" / "starts.txt"
    return path.read_text().split() if path.exists() else []


def run(settings):
    """(exit code, what was printed)."""
    text = io.StringIO()
    code = compare.run_locally(settings, compare.plan_runs(settings), Console(file=text, width=200))
    return code, text.getvalue()


@pytest.mark.parametrize("topk", [3.25, None])
def test_a_run_without_a_causal_loss_ends_no_comparison(grid, topk):
    """`selection: none` has none, and what is not finite is null."""
    settings, _ = grid
    for seed in (0, 1):
        path = settings.output.parent / f"staged/mor_expert_nr3-seed{seed}/metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        known = {"validation_loss": None, "validation_loss_topk": topk}
        lines = [line | known if "validation_loss" in line else line for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, text = run(settings)
    assert code == 0 and text.count("finished, validation loss") == 6
    assert f"mor_expert_nr3-seed1: finished, validation loss {'–' if topk is None else '3.2500 (top-k'}" in text
    assert (settings.output / "report/report.md").exists()


def test_plan_gives_every_run_its_own_directory_and_arguments(grid):
    settings, _ = grid
    runs = compare.plan_runs(settings)
    assert [r.label for r in runs[:4]] == [
        "vanilla-seed0",
        "recursive_nr3-seed0",
        "mor_expert_nr3-seed0",
        "vanilla-seed1",
    ]
    assert len({r.folder for r in runs}) == 6
    first = runs[2].arguments
    assert first[:2] == ["--config", str(settings.experiment)]
    assert {"seed=0", "name=mor_expert_nr3", "budget.flops=20000000000", "budget.convention=exact"} <= set(first)
    assert runs[2].settings.model == MODELS["mor_expert_nr3"] and runs[3].settings.seed == 1


def test_plan_matches_flops_within_half_a_step(grid):
    settings, _ = grid
    rows = [row for planned in compare.plan_runs(settings)[:3] for _, row in planning.plans_of(planned)]
    assert len(rows) == 3
    for row in rows:
        assert abs(row.flops - 2e10) <= row.flops / row.steps / 2
    assert rows[2].tokens > rows[0].tokens == rows[1].tokens  # routing buys tokens


def test_a_budget_below_one_step_is_refused_before_anything_runs(grid):
    settings, _ = grid
    small = settings.model_copy(update={"budgets": [planning.BudgetEntry(flops=1000)]})
    with pytest.raises(UserError, match=r"vanilla-seed0: budget 1000 is below one step"):
        compare.plan_table(compare.plan_runs(small))


def test_unknown_keys_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown key 'seed'; nearest valid: .*seeds"):
        compare.read_compare(CONFIGS[0], ["seed=3"])


def test_everything_runs_and_is_reported_and_a_second_call_runs_nothing(grid):
    settings, _ = grid
    code, text = run(settings)
    assert code == 0 and len(starts(settings)) == 6
    results = json.loads((settings.output / "report" / "results.json").read_text())
    assert [r["seed"] for r in results["runs"]] == [0, 1] * 3
    assert "0 of 6 runs are finished already" in text and "mor_expert_nr3-seed1: finished" in text
    code, text = run(settings)
    assert code == 0 and len(starts(settings)) == 6 and "6 of 6 runs are finished already" in text


def test_a_failed_run_stops_no_other_and_is_tried_again(grid, monkeypatch):
    settings, use = grid
    reported = []
    monkeypatch.setattr(
        "pretrain.report.write.write_report", lambda folders, *_, **__: reported.append([f.name for f in folders])
    )
    use("fail")
    code, text = run(settings)
    assert code == 1
    assert "recursive_nr3-seed0: failed with exit code 1" in text and "ValueError: it broke" in text
    use("run")
    assert run(settings)[0] == 0
    assert sorted(starts(settings)[6:]) == ["recursive_nr3-seed0", "recursive_nr3-seed1"]  # two at once
    others = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("vanilla", "mor_expert_nr3")]
    assert reported[0] == others and len(reported[1]) == 6


@pytest.mark.parametrize("mode", ["requeue", "hidden", "terminated"])
def test_a_run_that_stopped_on_request_is_no_failure(grid, mode):
    """By its exit code, by the file that stands for it behind a launcher, or because SIGTERM met it at its start."""
    settings, use = grid
    use(mode)
    code, text = run(settings)
    assert code == 1 and "vanilla-seed0: stopped on request" in text and "failed" not in text


def test_the_request_of_an_earlier_start_does_not_hide_a_failure(grid):
    settings, use = grid
    folder = compare.plan_runs(settings)[1].folder
    folder.mkdir(parents=True)
    (folder / "requeue").touch()
    use("broken")
    assert "recursive_nr3-seed0: failed with exit code 1" in run(settings)[1]


def test_a_run_without_room_for_its_checkpoint_failed(grid):
    settings, use = grid
    use("full")
    code, text = run(settings)
    assert code == 1 and "vanilla-seed0: failed with exit code 74 (a checkpoint could not be saved)" in text


def test_interrupting_stops_every_run_with_its_checkpoint(grid):
    settings, use = grid
    use("wait")
    runs = compare.plan_runs(settings)

    def interrupt():
        while not all((planned.folder / "ready").exists() for planned in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert [(planned.folder / "checkpoint").exists() for planned in runs[:3]] == [True, True, False]
    ours = [child for child in psutil.Process().children() if "trainer.py" in " ".join(child.cmdline())]
    assert not ours


def test_a_second_interrupt_ends_the_runs_at_once_and_leaves_no_process(grid):
    settings, use = grid
    use("stubborn")
    runs = compare.plan_runs(settings)

    def interrupt():
        while not all((planned.folder / "ready").exists() for planned in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # no Ctrl-C: the runs keep their time
        time.sleep(0.5)
        assert [child for child in psutil.Process().children() if "trainer.py" in " ".join(child.cmdline())]
        os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert time.monotonic() - began < 50, "the runs were waited for"
    assert not [child for child in psutil.Process().children() if "trainer.py" in " ".join(child.cmdline())]


def test_a_directory_of_another_configuration_is_refused_by_key(grid):
    settings, _ = grid
    folder = compare.plan_runs(settings)[0].folder
    folder.mkdir(parents=True)
    other = compare.plan_runs(settings.model_copy(update={"overrides": {"optimizer": {"learning_rate": 1e-4}}}))[0]
    (folder / "config.yaml").write_text(yaml.safe_dump(other.settings.model_dump(mode="json")))
    with pytest.raises(UserError, match=r"vanilla-seed0: belongs to .*optimizer\.learning_rate"):
        compare.plan_runs(settings)


def test_several_budgets_train_one_trunk_with_branches(grid):
    settings, _ = grid
    entry = planning.BudgetEntry(flops=[1e10, 2e10])
    (planned, *_) = compare.plan_runs(settings.model_copy(update={"budgets": [entry]}))
    assert planned.budgets == [10**10, 2 * 10**10] and planned.share() == 0
    make_run(planned.folder, finished=False, budget=1.6e10)  # the trunk, up to the last branch
    assert planned.share() == pytest.approx(1.6 / 2.2, abs=0.01)
    path = planned.folder / "metrics.jsonl"
    path.write_text(
        path.read_text() + json.dumps({**json.loads(path.read_text().splitlines()[-1]), "event": "branched"})
    )
    for label, budget in (("1e10", 1e10), ("2e10", 2e10)):
        assert not planned.finished()
        make_run(planned.folder / "branches" / label, budget=budget)
    assert planned.finished() and planned.share() == pytest.approx(1, abs=0.01)
    assert [folder.name for folder in planned.folders()] == ["1e10", "2e10"]


def test_a_second_comparison_in_the_same_folder_is_refused_while_the_first_is_at_work(grid, monkeypatch):
    settings, _ = grid
    monkeypatch.setattr(compare, "prepare_data", lambda data: None)
    config = settings.output.parent / "compare.yaml"
    with RunLock(settings.output, {}), pytest.raises(UserError, match=rf"process {os.getpid()} on .* is at work there"):
        compare.main(["--config", str(config)])
    assert not starts(settings)


def test_only_the_budget_of_a_comparison_may_grow(grid):
    """And a run whose budget has grown is not finished, also where its trunk gets a branch more."""
    settings, _ = grid

    def planned(flops, **changes):
        budgets = [planning.BudgetEntry(flops=flops)]
        return compare.plan_runs(settings.model_copy(update={"budgets": budgets, **changes}))[0]

    for before, after in ((2e10, 3e10), ([1e10, 2e10], [1e10, 15e9, 2e10])):
        shutil.rmtree(settings.output, ignore_errors=True)
        first = planned(before)
        make_run(first.folder)
        if isinstance(before, list):
            path = first.folder / "metrics.jsonl"
            path.write_text(path.read_text().replace("finished", "branched"))
            for label in ("1e10", "2e10", "1.5e10.partial"):
                make_run(first.folder / "branches" / label)
        (first.folder / "config.yaml").write_text(yaml.safe_dump(first.settings.model_dump(mode="json")))
        assert planned(before).finished() and not planned(after).finished()
        with pytest.raises(UserError, match=r"differ: .*batch\.size"):
            planned(after, overrides={"batch": {"size": 4}})
        with pytest.raises(UserError, match=r"smaller than|stay in the list"):
            planned(1e9 if isinstance(before, float) else [1e10, 3e10])


def test_conventions_share_what_they_have_in_common():
    exact = compare.plan_runs(compare.read_compare(Path("configs/compare/cpu_seeds.yaml"), []))
    both = compare.plan_runs(compare.read_compare(Path("configs/compare/honest_count.yaml"), []))
    assert {r.folder for r in exact} < {r.folder for r in both} and len(both) == 24
    table = {(r.settings.name, r.settings.budget.convention): planning.plans_of(r)[0][1].steps for r in both}
    assert table["vanilla", "exact"] == table["vanilla", "paper"] == table["recursive_nr3", "paper"]
    assert table["mor_expert_nr3", "paper"] > 1.05 * table["mor_expert_nr3", "exact"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_ready_made_comparison_can_be_planned(path, tmp_path):
    settings = compare.read_compare(path, [f"output={tmp_path}"])
    runs = compare.plan_runs(settings)
    assert len(runs) == len(planning.cells_of(settings)) * len(settings.seeds)
    assert planning.sweep_cost(settings) <= 1.001
    first = [planned for planned in runs if planned.settings.seed == settings.seeds[0]]
    assert compare.plan_table(runs).row_count == sum(len(planned.budgets) for planned in first)


def test_table3_is_planned_to_the_authors_steps(tmp_path):
    runs = compare.plan_runs(compare.read_compare(Path("configs/compare/table3.yaml"), [f"output={tmp_path}"]))
    steps = {planned.settings.name: planning.plans_of(planned)[0][1].steps for planned in runs}
    authors = {"vanilla": 9438, "recursive_nr4": 8883, "mor_expert_nr2": 12619, "mor_expert_nr3_shared_kv": 14672}
    for name, count in authors.items():
        assert abs(steps[name] - count) <= 1, name


def test_slurm_receives_the_whole_comparison():
    settings = compare.read_compare(Path("configs/compare/table3.yaml"), [])
    command = compare.submit_command(settings, Path("configs/compare/table3.yaml"), ["seeds=[1]"])
    assert command[1:] == ["launchers/submit.py", "--compare", "configs/compare/table3.yaml", "--nodes=1",
                           "--gpus-per-node=8", "seeds=[1]"]  # fmt: skip


# --- sweeps, controls, seeds ----------------------------------------------------------------------------------------


def changed(settings, **changes):
    return compare.CompareSettings.model_validate(settings.model_dump() | changes)


def one_model(settings, **changes):
    return changed(settings, models={"vanilla": TINY}, seeds=[0], at_once=4, **changes)


RATES = {"optimizer.learning_rate": [2e-3, 4e-3, 8e-3, 0.5]}  # the last one diverges


def test_a_sweep_runs_before_the_report_and_its_winner_is_reported(grid):
    """Halving: four short runs, of which one fails, then two of twice the length; a second call runs nothing."""
    settings, use = grid
    use("sweep")
    swept = one_model(settings, sweep=RATES)
    assert planning.sweep_cost(swept) <= 1
    code, text = run(swept)
    begun = starts(settings)
    assert code == 0 and "vanilla: optimizer.learning_rate 0.004 won its sweep" in text, text
    assert len(begun) == 7 and begun[-1] == "vanilla-learning_rate0.004-seed0"
    assert all(name.endswith("-seed1000") for name in begun[:-1])
    budgets = [name.split("-")[-2] for name in begun[:-1]]
    assert budgets == ["2.5e09"] * 4 + ["5e09"] * 2
    results = json.loads((settings.output / "report" / "results.json").read_text())
    (found,) = results["sweep"]
    assert found["winner"] == {"optimizer.learning_rate": 4e-3} and not found["edge"]
    checks = {check["question"]: check for check in results["checklist"]}
    assert checks["learning rate"]["passed"] and not checks["seeds"]["holds_up"]
    assert run(swept)[0] == 0 and [name for name in starts(settings)[7:] if "0.5" not in name] == []


def test_one_sweep_of_a_model_can_serve_every_budget(grid):
    """Swept at the budget that is named, once; the checklist takes it for each budget that it is long enough for."""
    settings, use = grid
    use("sweep")
    budgets = [{"flops": flops} for flops in (1e10, 2e10, 2e11)]
    rates = {"optimizer.learning_rate": [2e-3, 4e-3, 8e-3, 1.6e-2]}
    swept = one_model(settings, sweep=rates, sweep_budget={"flops": 2e10}, sweep_runs=2, budgets=budgets)
    assert planning.sweep_cost(swept) == pytest.approx(2 * 2e10 / 2.3e11)
    code, text = run(swept)
    assert code == 0, text
    short, ended = [name for name in starts(settings) if name.endswith("-seed1000")], starts(settings)[6:]
    assert [name.split("-")[-2] for name in short] == ["5e09"] * 4 + ["1e10"] * 2
    assert sorted(ended) == [f"vanilla-budget{place}-learning_rate0.004-seed0" for place in range(3)]
    results = json.loads((settings.output / "report" / "results.json").read_text())
    (check,) = [check for check in results["checklist"] if check["question"] == "learning rate"]
    (long,) = [row["name"] for row in results["variants"] if row["flops"] > 1e11]
    assert list(check["holds_up"]) == [long] and "5% of its own" in check["holds_up"][long]


def test_the_best_size_of_each_architecture_gets_further_seeds(grid, monkeypatch):
    """At each budget its own, by the seeds of the comparison; not before all sizes have run, and once."""
    settings, use = grid
    use("sweep")
    sizes = {f"vanilla_h{size}": TINY | {"hidden_size": size} for size in (16, 32, 48)}
    models = sizes | {"recursive_nr3": MODELS["recursive_nr3"]}  # of one size: none is its best
    budgets = [{"flops": 1e12}, {"flops": 2e12}]
    asked = changed(settings, models=models, budgets=budgets, seeds=[0], best_seeds=[1, 2], at_once=4)
    assert planning.plan_best(asked) == []
    best = {"vanilla_h32-budget0": 0.2, "vanilla_h48-budget1": 0.1}
    for planned in compare.plan_runs(asked):
        loss = 3.0 - best.get(planned.label.removesuffix("-seed0"), 0)
        kind = "recursive_nr3" if "recursive" in planned.label else "vanilla"
        width = {"hidden_size": planned.settings.model.get("hidden_size")}
        for seed in (0, 1, 2):
            folder = settings.output.parent / "staged" / planned.label.replace("seed0", f"seed{seed}")
            budget = planned.settings.budget.flops
            make_run(folder, kind, seed=seed, loss=loss + seed, budget=budget, name=planned.settings.name, model=width)
    reported = []
    monkeypatch.setattr(compare, "report", lambda _, runs, *rest: reported.extend(runs) or (None, 0))
    code, text = run(asked)
    assert code == 0, text
    further = [f"{name}-seed{seed}" for name in best for seed in (1, 2)]
    assert sorted(starts(settings)[-4:]) == sorted(further) and len(starts(settings)) == 12
    assert {planned.label for planned in reported} == {*starts(settings)}
    assert [(r.label, r.finished()) for r in planning.plan_best(asked)] == [(name, True) for name in further]
    with pytest.raises(ValueError, match=r"best_seeds: \[0\] are among seeds"):
        changed(asked, best_seeds=[0, 1])
    with pytest.raises(ValueError, match="best_seeds: for budgets of one number"):
        changed(asked, budgets=[{"flops": [1e12, 2e12]}])
    with pytest.raises(UserError, match="no architecture has three sizes"):
        planning.plan_best(changed(asked, models=MODELS))
    wide = {"differences": [{"high": 1.0, "mean": 0.0, "by_seed": [0.0, 1.0]}]}
    assert not {1, 2} & set(planning.more_seeds(changed(asked, until=0.1), wide))
    with pytest.raises(ValueError, match="a winner would be judged by its luck"):
        changed(asked, sweep=RATES, sweep_seeds=[1])


def test_a_budget_to_sweep_at_needs_a_sweep(grid):
    with pytest.raises(ValueError, match="sweep_budget: nothing is swept"):
        one_model(grid[0], sweep_budget={"flops": 2e10})


def test_seeds_that_are_added_keep_the_rate_that_won(grid, monkeypatch):
    settings, use = grid
    use("sweep")
    asked = iter([[1], []])
    monkeypatch.setattr(compare, "more_seeds", lambda *_: next(asked))
    code, text = run(one_model(settings, sweep=RATES, until=0.01))
    assert code == 0, text
    reported = [name for name in starts(settings) if not name.endswith("-seed1000")]
    assert reported == [f"vanilla-learning_rate0.004-seed{seed}" for seed in (0, 1)]


def test_a_comparison_goes_on_from_records_of_another_machine(grid, tmp_path, capsys, monkeypatch):
    """Runs, sweeps and branches that finished there are not run again, and the report comes out the same."""
    settings, use = grid
    use("sweep")
    swept = one_model(settings, sweep=RATES, noise=["order"])
    assert run(swept)[0] == 0
    report = settings.output / "report"
    before, begun = json.loads((report / "results.json").read_text()), len(starts(settings))
    kept = shutil.copy(report / "records.tar.xz", tmp_path / "records.tar.xz")
    shutil.rmtree(settings.output)
    there = swept.model_copy(update={"records": [kept]})
    ended = [name for name in starts(settings) if "0.5" not in name]  # the one that diverged left no record
    assert planning.take_records(there) == len(set(ended)) and planning.take_records(there) == 0
    assert run(there)[0] == 0
    assert {name.partition("-flops")[0] for name in starts(settings)[begun:]} <= set(starts(settings)) - set(ended)
    assert json.loads((report / "results.json").read_text()) == before
    assert (report / "records.tar.xz").read_bytes() == Path(kept).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sweep": RATES, "sweep_seeds": [1, 7]}, r"\[1\] are seeds of the report too"),
        ({"sweep": {"optimizer.learning_rate": [1e-3]}}, "at least two different values"),
        ({"sweep_models": {"nobody": RATES}}, "'nobody' is no model of this comparison"),
        ({"controls": ["shallow"]}, "no shallow; there are shallower"),
    ],
)
def test_sweeps_and_controls_that_make_no_sense_are_refused(grid, changes, said):
    with pytest.raises(ValueError, match=said):
        changed(grid[0], **changes)


@pytest.mark.parametrize("key", ["model.router_alpha", "optimizer.lerning_rate"])
def test_a_key_that_a_model_lacks_is_refused_by_name(grid, key):
    with pytest.raises(UserError, match=r"vanilla has no such key|unknown key 'optimizer.lerning_rate'"):
        planning.plan_round(changed(grid[0], sweep={key: [0.1, 0.2]}), 0)


def test_controls_are_rows_of_the_grid(grid):
    """Built from the model that routes; what is a model of the comparison already is not run twice."""
    asked = list(planning.CONTROLS)
    runs = planning.plan_runs(changed(grid[0], controls=asked, seeds=[0]))
    names = [planned.settings.name for planned in runs]
    built = [f"mor_expert_nr3_{kind}" for kind in asked if kind != "recursive"]
    assert names == [*MODELS, *built]
    by_name = {planned.settings.name: planned for planned in runs}
    tokens = {name: planning.plans_of(planned)[0][1].tokens for name, planned in by_name.items()}
    step = 8 * 64
    assert abs(tokens["mor_expert_nr3_equal_tokens"] - tokens["mor_expert_nr3"]) <= step
    assert by_name["mor_expert_nr3_gate_only"].settings.model["capacity_factors"] == [1.0, 1.0, 1.0]


def test_one_vanilla_model_gives_its_tokens_to_two_that_see_nearly_as_many(grid):
    models = MODELS | {"mor_token_nr3": {**TINY, "num_recursions": 3, "routing": "token_choice"}}
    runs = planning.plan_runs(changed(grid[0], models=models, controls=["equal_tokens"], seeds=[0]))
    assert [planned.settings.name for planned in runs] == [*models, "mor_expert_nr3_equal_tokens"]


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        ({"recursive_nr3": ["gate_only"]}, "gate_only: recursive_nr3: there is none for recursive"),
        ({"mor_expert_nr3": ["gate_only", "shallower"], "vanilla": ["shallower"]}, "shallower: vanilla: it costs"),
    ],
)
def test_a_control_that_cannot_be_built_is_refused_by_name(grid, controls, said):
    with pytest.raises(UserError, match=said):
        planning.plan_runs(changed(grid[0], controls=controls))


def test_until_adds_seeds_until_the_interval_is_narrow(grid):
    settings, use = grid
    use("sweep")
    for prepared in (settings.output.parent / "staged").glob("*-seed?"):
        shutil.rmtree(prepared)
    two = {name: MODELS[name] for name in ("vanilla", "mor_expert_nr3")}
    code, text = run(changed(settings, models=two, seeds=[0], until=0.5, most_seeds=4))
    assert code == 0 and "--until 0.5: adds seeds 1, 2" in text and text.count("adds seeds") == 1
    results = json.loads((settings.output / "report" / "results.json").read_text())
    assert results["seeds"] == [0, 1, 2]
    tight = compare.more_seeds(changed(settings, until=1e-9, most_seeds=2), results)
    assert tight == [], "the budget of seeds is spent"


def test_noise_repeats_the_baseline(grid):
    runs = planning.plan_noise(changed(grid[0], noise=["order", "precision"], seeds=[3]))
    order, precision = (planned.settings for planned in runs)
    assert order.data.order_seed not in (None, 3) and order.seed == precision.seed == 3
    assert {order.precision, precision.precision} == {"bf16", "fp32"} and order.run_dir.parent.name == "noise"


@pytest.mark.slow
def test_a_real_comparison_from_nothing_to_the_report(tmp_path, capsys):
    """Real trainer, real data: FLOPs agree, models learn, the second call does nothing, a larger budget goes on."""
    config, two = tmp_path / "compare.yaml", {name: MODELS[name] for name in ("vanilla", "mor_expert_nr3")}
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        yaml.safe_dump(
            {
                "data": {"folder": str(tmp_path / "data"), "prepare": "configs/data/smoke.yaml"},
                "batch": {"size": 4},
                "precision": "fp32",
                "evaluation": {"times": 2, "sequences": 16},
                "tracker": {"mode": "disabled"},
            }
        )
    )
    values = {"output": str(tmp_path / "out"), "experiment": str(experiment), "models": two,
              "budgets": [{"flops": 4e10}], "at_once": 2, "threads": 1}  # fmt: skip
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    assert compare.main(["--config", str(config)]) == 0
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    runs = {r["name"]: r for r in results["runs"]}
    assert set(runs) == set(two)
    flops = [r["flops"] for r in runs.values()]
    assert max(flops) / min(flops) < 1.01
    assert all(r["validation_loss"] < results["unigram_loss"] for r in runs.values())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/metrics.jsonl")}
    assert compare.main(["--config", str(config)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/metrics.jsonl")}
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    assert compare.main(["--config", str(config), "budgets=[{flops: 5e10}]"]) == 0
    told = capsys.readouterr().out
    assert "0 of 2 runs are finished already" in told and told.count("finished, validation loss") == 2
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    grown = {r["name"]: r for r in results["runs"]}
    assert set(grown) == {*two, *(f"{name}-4e10" for name in two)}  # their first endings stand beside
    for name, run in runs.items():
        ended = grown.pop(f"{name}-4e10")
        assert (ended["flops"], ended["validation_loss"]) == (run["flops"], run["validation_loss"])
        assert grown[name]["flops"] == pytest.approx(5e10, rel=0.01)
        facts = json.loads((tmp_path / "out" / f"{name}-seed0" / "run.json").read_text())
        assert [entry["budget"] for entry in facts["extensions"]] == [4e10], "it went on, it did not begin anew"
    assert compare.main(["--config", str(config), "budgets=[{flops: 5e10}]"]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"4e\+10 is smaller than 5e\+10, its own"):
        compare.main(["--config", str(config)])
