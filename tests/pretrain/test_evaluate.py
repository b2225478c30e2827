"""Evaluation of whole tiny runs: losses against the run's own, depth caps, tasks against the harness's own figures."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.settings import UserError
from model.convert.export import to_llama
from pretrain.evaluate import (
    TaskSettings,
    average,
    chosen_tasks,
    main,
    metrics_line,
    run_tasks,
)
from pretrain.metrics import last_line
from pretrain.opened import open_checkpoint
from pretrain.report.runs import read_run
from pretrain.token_depths import summary
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import read_lines, settings_for, train, trainer_for

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WORDS = """
task: tiny_words
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{choices[answer]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_tiny(folder / "tiny")
    return folder / "tiny"


def trained(run_dir: Path, data: Path, architecture: str, **changes: Any) -> Path:
    train(settings_for(run_dir, data, architecture, optimizer={"learning_rate": 0.02}, **changes))
    return run_dir


@pytest.fixture(scope="module")
def expert(tmp_path_factory, data) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "expert", data, "mor_expert")


@pytest.fixture
def task_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = [
        {"text": f"the {word}", "choices": ["a", "the bird", "moufests"], "answer": i % 3}
        for i, word in enumerate(["one", "No lound", "gest", "old", "bulbail has", "x", "y", "rast"])
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for name, text in (("choice", CHOICE), ("words", WORDS)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    return tmp_path


def results_of(run: Path, *options: str) -> dict[str, Any]:
    output = run / "other.json"
    assert main(["--checkpoint", str(run), "--output", str(output), *options]) == 0
    return json.loads(output.read_text())


def test_losses_are_the_runs_own_and_are_recorded_behind_its_last_line(data, tmp_path) -> None:
    run = trained(tmp_path / "run", data, "mor_expert")
    before = read_lines(run)
    assert main(["--checkpoint", str(run), "--depths", "--batch-size", "4"]) == 0
    results = json.loads((run / "evaluation.json").read_text())
    *kept, added = read_lines(run)
    assert kept == before
    assert added.items() > before[-1].items()
    # the run validated on 4 sequences; here on all of them
    assert results["validation"]["validation_tokens"] > before[-1]["validation_tokens"]
    assert added["validation_loss_by_depth"] == [depth["validation_loss"] for depth in results["depths"]]
    assert read_run(run).finished
    assert read_run(run).validations == [line for line in [added] if "validation_loss" in line]
    assert trainer_for(settings_for(run, data, optimizer={"learning_rate": 0.02})).run() == 0  # nothing is left to do
    assert last_line(run / "metrics.jsonl") == added


def test_a_limit_leaves_the_run_alone_and_equals_its_validation(expert) -> None:
    before = read_lines(expert)
    results = results_of(expert, "--limit", "4", "--batch-size", "4")
    assert read_lines(expert) == before
    for key in ("validation_loss", "validation_loss_topk", "validation_tokens", "validation_depth_shares"):
        assert results["validation"][key] == pytest.approx(before[-1][key], rel=1e-6)


@pytest.mark.parametrize("architecture", ["recursive", "mor_expert", "mor_token"])
def test_depth_is_capped(data, tmp_path, architecture) -> None:
    run = trained(tmp_path / "run", data, architecture)
    results = results_of(run, "--depths", "--limit", "4")
    losses = [depth["validation_loss"] for depth in results["depths"]]
    assert [depth["max_recursions"] for depth in results["depths"]] == [1, 2, 3]
    assert losses[-1] == pytest.approx(results["validation"]["validation_loss"], abs=1e-9)
    assert len({round(loss, 7) for loss in losses}) > 1
    if architecture != "recursive":
        for depth in results["depths"]:
            assert sum(depth["validation_depth_shares"][depth["max_recursions"] + 1 :]) == 0
    found = results["token_depths"]
    tokens, classes = found["tokens"], found["classes"].values()
    assert tokens == results["validation"]["validation_tokens"] == sum(row["tokens"] for row in classes)
    for place, loss in enumerate(losses):
        assert sum(row["tokens"] * row["losses"][place] for row in classes) / tokens == pytest.approx(loss, rel=1e-5)
    changes = [row["change"] for row in found["steps"]]
    assert changes == pytest.approx([b - a for a, b in itertools.pairwise(losses)], abs=1e-5)
    shares = results["validation"].get("validation_depth_shares", [])
    taken = {row["depth"]: row["tokens"] / tokens for row in found["depths"]}
    assert [taken.get(depth, 0.0) for depth in range(len(shares))] == pytest.approx(shares)
    whole = sum(row["tokens"] * row["loss"] for row in found["depths"]) / tokens
    assert not shares or whole == pytest.approx(losses[-1], rel=1e-5)


def test_better_and_worse_are_counted_by_token() -> None:
    capped = np.array([[3.0, 3.0, 3.0, 3.0], [2.0, 3.5, 3.005, 3.0], [2.0, 1.0, 3.0, 3.0]])
    found = summary(capped, capped[2], np.array([3, 2, 1, 1]), ["digit", "digit", "whitespace", "digit"])
    assert found["steps"] == [
        {"to": 2, "better": 0.25, "worse": 0.25, "change": pytest.approx(-0.12375)},
        {"to": 3, "better": 0.25, "worse": 0.0, "change": pytest.approx(-0.62625)},
    ]
    assert found["classes"]["digit"] == {"tokens": 3, "losses": [3.0, pytest.approx(8.5 / 3), 2.0], "depth": 2.0}
    taken = [(row["depth"], row["tokens"], row["loss"]) for row in found["depths"]]
    assert taken == [(1, 2, 3.0), (2, 1, 1.0), (3, 1, 2.0)]


def test_a_training_checkpoint_is_the_final_model(expert) -> None:
    step = sorted((expert / "checkpoints").iterdir())[-1]
    options = ["--limit", "4", "--output", str(expert / "step.json")]
    assert main(["--checkpoint", str(step), *options]) == 0
    assert (
        json.loads((expert / "step.json").read_text())["validation"] == results_of(expert, "--limit", "4")["validation"]
    )


def test_tasks_reproduce_the_figures_of_the_harness(data, tmp_path, task_folder) -> None:
    """The vanilla model under our class and, by the harness alone, its export as transformers' Llama."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    checkpoint = open_checkpoint(trained(tmp_path / "run", data, "vanilla"))
    names = ["tiny_choice", "tiny_words"]
    tasks = [TaskSettings(name=names[0], shots=2), TaskSettings(name=names[1], shots=2)]
    ours = run_tasks(checkpoint.model, checkpoint.tokenizer, tasks, folder=task_folder, batch_size=3)
    llama = HFLM(to_llama(checkpoint.model), tokenizer=checkpoint.tokenizer, batch_size=3)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    theirs = simple_evaluate(llama, tasks=names, num_fewshot=2, task_manager=manager, bootstrap_iters=100)
    assert set(ours) == set(names)
    for name, figures in (("tiny_choice", ("acc", "acc_norm")), ("tiny_words", ("acc", "perplexity"))):
        for figure in figures:
            assert ours[name][figure] == pytest.approx(theirs["results"][name][f"{figure},none"], rel=1e-5)
    assert ours["tiny_words"]["perplexity"] > 1


@pytest.mark.slow
def test_tasks_of_a_routed_model_are_recorded(data, tmp_path, task_folder) -> None:
    run = trained(tmp_path / "run", data, "mor_expert", tracker={"mode": "offline"})
    preset = tmp_path / "preset.yaml"
    preset.write_text("tasks: [{name: tiny_choice, shots: 1, metric: acc}, {name: tiny_words, shots: 0, metric: acc}]")
    assert main(["--checkpoint", str(run), "--preset", str(preset), "--task-folder", str(task_folder)]) == 0
    results, line = json.loads((run / "evaluation.json").read_text()), read_lines(run)[-1]
    assert results["shots"] == {"tiny_choice": 1, "tiny_words": 0}
    both = [results["tasks"][name]["acc"] for name in results["tasks"]]
    assert line["tasks/average"] == results["average"] == pytest.approx(sum(both) / 2)
    assert line["event"] == "finished"
    assert len(list((run / "tracker").glob("wandb/offline-run-*"))) == 2  # training, and this evaluation under its id


def test_a_run_without_a_causal_decision_is_evaluated_by_rows(data, tmp_path, task_folder) -> None:
    run = trained(tmp_path / "run", data, "mor_expert", model={"selection": "none"})
    tasks = ["--tasks", "tiny_choice", "--task-folder", str(task_folder)]
    with pytest.raises(UserError, match="--batch-size 1"):
        results_of(run, *tasks)
    results = results_of(run, *tasks, "--batch-size", "1")
    assert results["validation"]["validation_loss"] is None
    assert 0 <= results["tasks"]["tiny_choice"]["acc"] <= 1


def test_averages_count_a_benchmark_once() -> None:
    tasks = [
        TaskSettings(name=n, metric="acc", benchmark=b) for n, b in (("easy", "ARC"), ("hard", "ARC"), ("x", None))
    ]
    scores = {"easy": {"acc": 0.6}, "hard": {"acc": 0.2}, "x": {"acc": 1.0}}
    assert average(tasks, scores) == pytest.approx(0.7)
    assert average([TaskSettings(name="x")], scores) is None
    with pytest.raises(UserError, match="task x has no figure 'em'; it has acc"):
        average([TaskSettings(name="x", metric="em")], scores)
    results = {"tasks": scores, "average": 0.7}
    assert metrics_line(results)["tasks/easy/acc"] == 0.6


def test_the_papers_preset() -> None:
    tasks = chosen_tasks(None, "paper")
    counted = [task for task in tasks if task.metric is not None]
    assert len({task.benchmark for task in counted}) == 6 and all(task.benchmark for task in counted)
    assert {task.name: task.shots for task in tasks if task.shots} == {"mmlu": 5}
    assert [task.name for task in chosen_tasks("a, b", None)] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "NOWHERE"], "holds no config.json"),
        (["--checkpoint", "RUN/final", "--tasks", "tiny_choice", "--task-folder", "NOWHERE"], "--task-folder"),
        (["--checkpoint", "RUN", "--data", "NOWHERE"], "no prepared data"),
        (["--checkpoint", "RUN", "--preset", "papers"], "did you mean"),
        (["--checkpoint", "COPY"], "belongs to no run"),
    ],
)
def test_mistakes_are_named(expert, tmp_path, options, message) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (expert / "final").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    places = {"NOWHERE": str(tmp_path / "nowhere"), "RUN": str(expert), "COPY": str(copy)}
    arguments = [next((o.replace(n, p) for n, p in places.items() if n in o), o) for o in options]
    with pytest.raises(UserError, match=message):
        main([*arguments, "--limit", "2", "--output", str(tmp_path / "out.json")])


def test_without_the_harness_tasks_say_what_to_install(expert, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match="pip install"):
        results_of(expert, "--limit", "1", "--tasks", "piqa")


@pytest.mark.slow
def test_tasks_during_training_change_nothing_else(data, tmp_path, task_folder) -> None:
    """The run with tasks at its validations has the losses of the run without, to the bit, and the tasks' figures."""
    changes = {"relaxation": "lora", "lora_dropout": 0.3, "lora_rank": 2}  # dropout draws random numbers
    rule = {"times": 2, "tasks": ["tiny_choice"], "task_folder": task_folder, "task_limit": 4}
    plain = train(settings_for(tmp_path / "plain", data, model=changes, evaluation={"times": 2}))
    tasks = train(settings_for(tmp_path / "tasks", data, model=changes, evaluation=rule))
    figure = "tasks/tiny_choice/acc"
    assert [figure in line for line in tasks] == ["validation_loss" in line for line in plain]
    assert sum(figure in line for line in tasks) == 2
    keys = ("loss", "validation_loss", "gradient_norm")
    assert [[line.get(key) for key in keys] for line in plain] == [[line.get(key) for key in keys] for line in tasks]
