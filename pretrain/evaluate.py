"""What a trained model is worth: `python -m pretrain.evaluate --checkpoint RUN [--preset paper] [--depths]`.

Validation loss, causal and top-k; the same with the depth of every token capped at 1 .. Nr (paper Fig. 5c); and tasks
of lm-evaluation-harness, which sees the model as any transformers model. Results go to `evaluation.json` in the run's
folder, and, for the final model of a finished run, to its metrics.jsonl and its tracker.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import rich.table
import torch
from pydantic import Field
from rich.console import Console

from data_prep.settings import Settings, UserError, load, run_command
from model.depth import method_of
from model.hardware import Precision, device_here
from pretrain import exits
from pretrain.config import read_data
from pretrain.data import fixed_batches
from pretrain.metrics import METRICS, MetricsFile, Tracker, last_line, tracker_id
from pretrain.opened import Checkpoint, has_causal_decision, open_checkpoint
from pretrain.parallel.settings import ParallelSettings
from pretrain.perplexity import measure
from pretrain.precision import for_evaluation
from pretrain.token_depths import token_depths
from pretrain.validation import Validation

if TYPE_CHECKING:  # what reads the arguments alone does not wait for models and checkpoints
    from transformers import PreTrainedTokenizerFast

    from model.modeling import MoRForCausalLM

PRESETS = Path(__file__).resolve().parents[1] / "configs" / "evaluation"
BOOTSTRAP_ITERATIONS = 1000  # for the standard errors of figures that are no means, such as perplexity
Scores = dict[str, dict[str, float]]


class TaskSettings(Settings):
    """One task of the harness."""

    name: str = Field(description="the task's or group's name in lm-evaluation-harness")
    shots: int | None = Field(
        default=None, ge=0, description="examples before each question; null takes the task's own"
    )
    metric: str | None = Field(default=None, description="the task's figure in the average; null leaves it out")
    benchmark: str | None = Field(default=None, description="tasks of one benchmark count once in the average")


class Preset(Settings):
    """A list of tasks, `configs/evaluation/*.yaml`."""

    tasks: list[TaskSettings] = Field(min_length=1, description="what to evaluate on")


# --- loss ---------------------------------------------------------------------------------------------------------


def make_validation(
    checkpoint: Checkpoint, data: Sequence[str] | None, batch_size: int, limit: int | None
) -> Validation | None:
    """Validation on the data given, or on the run's; None where neither is there.

    Raises UserError where the data does not fit the model or its tokenizer.
    """
    settings, config = checkpoint.settings, checkpoint.model.config
    if data is not None:
        manifest = read_data(data)
    elif settings is not None:
        manifest = settings.data.read()
    else:
        return None
    manifest.check_model(config.vocab_size, min(manifest.sequence_length, config.max_position_embeddings))
    if checkpoint.run is not None:
        facts = json.loads((checkpoint.run / "run.json").read_text(encoding="utf-8"))
        manifest.check_tokenizer(facts["tokenizer_fingerprint"], str(checkpoint.run))
    masking = settings.data.document_masking if settings is not None else True
    return Validation(config, manifest, batch_size, limit, masking)


def losses(validation: Validation, checkpoint: Checkpoint, precision: Precision, depths: bool) -> dict[str, Any]:
    """`validation`: the loss at the model's own depth; with `depths`, the losses with depth capped at 1 .. Nr too, and
    what each recursion does to each token (pretrain/token_depths.py)."""
    from pretrain.parallel.start import start_parallel

    parallel = start_parallel(ParallelSettings.model_validate({"strategy": "single"}), precision)
    model = checkpoint.model
    module: torch.nn.Module = model
    parallel.module = parallel.model = module.to(parallel.device)
    result: dict[str, Any] = {"validation": validation(parallel)}
    if depths:
        caps = range(1, method_of(model.config).levels(model.config) + 1)
        result["depths"] = [{"max_recursions": cap} | validation(parallel, cap) for cap in caps]
        result["token_depths"] = token_depths(validation, parallel, checkpoint.tokenizer.backend_tokenizer)
    model.eval()
    return result


# --- tasks --------------------------------------------------------------------------------------------------------


def run_tasks(
    model: MoRForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[TaskSettings],
    *,
    folder: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    precision: Precision = "fp32",
) -> Scores:
    """Evaluate on tasks of lm-evaluation-harness: task or group -> figure -> value, standard errors included.

    folder: of task files beside the harness's own; limit: questions per task. Raises UserError for an unknown task, and
    where the harness or a task's data is missing. Leaves the generators of random numbers as they were.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError("tasks need lm-evaluation-harness: pip install 'lm-eval' (the extra `evaluate`)") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its bootstrap forks otherwise, and a forked child of a process with threads may hang for ever.
    os.environ["DISABLE_MULTIPROC"] = "1"
    if not has_causal_decision(model.config):
        if batch_size != 1:
            raise UserError("--batch-size: routing of selection 'none' sees a row's padding too; give --batch-size 1")
        model.config.routing_mode = "topk"
    manager = _task_manager(tuple(task.name for task in tasks), folder)
    from pretrain.checkpoint import random_state, set_random_state

    random_numbers = random_state()
    mixed = "bfloat16" if precision == "bf16" else None
    wrapped = HFLM(model, "causal", tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=mixed)
    scores: Scores = {}
    for shots in dict.fromkeys(task.shots for task in tasks):
        names = [task.name for task in tasks if task.shots == shots]
        try:
            results = simple_evaluate(
                wrapped,
                tasks=list(names),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
            )
        except OSError as error:  # no network, no such data set
            raise UserError(f"tasks {', '.join(names)}: their data cannot be read: {error}") from None
        assert results is not None
        scores |= {name: _figures(values) for name, values in results["results"].items()}
    set_random_state(random_numbers)
    return scores


@functools.cache
def _task_manager(names: tuple[str, ...], folder: Path | None) -> Any:
    """The harness's index of tasks; its own ones, which take long to read, only where `folder` lacks a name."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder: {folder} is no folder")
    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"unknown tasks: {', '.join(unknown)}; see `lm_eval ls tasks`, or give --task-folder")
    return manager


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; a figure behind a filter keeps the filter's name."""
    numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none").replace(",", "/"): float(value) for key, value in numbers.items()}


def average(tasks: Sequence[TaskSettings], scores: Scores) -> float | None:
    """Mean over benchmarks of the mean of their tasks' metrics; None where no task names a metric."""
    groups: dict[str, list[float]] = {}
    for task in tasks:
        if task.metric is None:
            continue
        if task.metric not in scores[task.name]:
            raise UserError(f"task {task.name} has no figure {task.metric!r}; it has {', '.join(scores[task.name])}")
        groups.setdefault(task.benchmark or task.name, []).append(scores[task.name][task.metric])
    return fmean(fmean(group) for group in groups.values()) if groups else None


# --- results ------------------------------------------------------------------------------------------------------


def task_line(scores: Scores) -> dict[str, Any]:
    """Scores as fields of a line of metrics, `tasks/NAME/FIGURE`."""
    return {f"tasks/{name}/{figure}": value for name, values in scores.items() for figure, value in values.items()}


def metrics_line(results: dict[str, Any]) -> dict[str, Any]:
    """The results as fields of a line of metrics: `tasks/NAME/FIGURE`, `tasks/average`, losses by depth as lists."""
    line = task_line(results["tasks"])
    if results["average"] is not None:
        line["tasks/average"] = results["average"]
    if "depths" in results:
        for key in ("validation_loss", "validation_loss_topk", "validation_loss_full"):
            if key not in results["depths"][0]:
                continue
            line[f"{key}_by_depth"] = [depth[key] for depth in results["depths"]]
    return line


def record(checkpoint: Checkpoint, results: dict[str, Any]) -> bool:
    """Append the results to a finished run's metrics.jsonl and tracker; False where the run is not finished.

    The line repeats the run's last one, `event: finished` included, so that it stays the last word on the run.
    """
    if checkpoint.run is None or checkpoint.settings is None or not checkpoint.is_final:
        return False
    last = last_line(checkpoint.run / METRICS)
    if last is None or last.get("event") != "finished":
        return False
    line = last | metrics_line(results)
    metrics = MetricsFile(checkpoint.run / METRICS, last["step"])
    metrics.write(line)
    metrics.close()
    folder = checkpoint.run / "tracker"
    tracker = Tracker(checkpoint.settings, folder, tracker_id(folder, None))
    tracker.log(line)
    tracker.finish()
    return True


def token_tables(found: dict[str, Any]) -> list[rich.table.Table]:
    """What each recursion does to tokens, as tables."""
    title = f"Tokens whose loss moves by {found['moved']} nats or more, {found['routing_mode']}"
    steps = rich.table.Table("from at most", "better", "worse", "mean change", title=title, title_justify="left")
    for row in found["steps"]:
        moved = (f"{row['better']:.1%}", f"{row['worse']:.1%}", f"{row['change']:+.4f}")
        steps.add_row(f"{row['to'] - 1} to {row['to']}", *moved)
    caps = [f"at most {row['to']}" for row in ({"to": 1}, *found["steps"])]
    classes = rich.table.Table("next token", "tokens", "mean depth", *caps, title="Loss by class", title_justify="left")
    for name, row in found["classes"].items():
        depth = "–" if row["depth"] is None else f"{row['depth']:.2f}"
        classes.add_row(name, f"{row['tokens']:,}", depth, *(f"{loss:.4f}" for loss in row["losses"]))
    taken = rich.table.Table("depth", "tokens", "loss", "loss at most 1", title="Loss by depth", title_justify="left")
    for row in found["depths"]:
        taken.add_row(str(row["depth"]), f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['loss_at_one']:.4f}")
    return [table for table in (steps, classes, taken) if table.row_count]


def show(results: dict[str, Any], console: Console) -> None:
    """The results as tables."""
    rows = [("as trained", results.get("validation"))]
    rows += [(f"at most {depth['max_recursions']}", depth) for depth in results.get("depths", [])]
    key, how = (
        ("full", "at full depth")
        if any(line and "validation_loss_full" in line for _, line in rows)
        else ("topk", "top-k")
    )
    table = rich.table.Table("recursions", "loss, causal", how, title="Validation loss", title_justify="left")
    for name, line in rows:
        if line is not None:
            figures = (line["validation_loss"], line[f"validation_loss_{key}"])
            table.add_row(name, *("–" if value is None else f"{value:.4f}" for value in figures))
    if table.row_count:
        console.print(table)
    if (found := results.get("token_depths")) is not None:
        for table in token_tables(found):
            console.print(table)
    table = rich.table.Table("task", "shots", "figure", "value", "± error", title="Tasks", title_justify="left")
    for name, values in results["tasks"].items():
        shots = results["shots"].get(name)
        for figure, value in values.items():
            if "_stderr" not in figure:
                filter_name = figure.partition("/")
                error = values.get(f"{filter_name[0]}_stderr{''.join(filter_name[1:])}")
                cells = ["own" if shots is None else str(shots), figure, f"{value:.4f}"]
                table.add_row(name, *cells, "" if error is None else f"{error:.4f}")
    if results["average"] is not None:
        table.add_row("average over benchmarks", "", "", f"{results['average']:.4f}", "")
    if table.row_count:
        console.print(table)


# --- command line -------------------------------------------------------------------------------------------------


def evaluate(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command line asks for; what `evaluation.json` holds."""
    from pretrain.run_folder import versions

    tasks = chosen_tasks(given.tasks, given.preset)
    checkpoint = open_checkpoint(given.checkpoint.resolve())
    validation = make_validation(checkpoint, given.data, given.batch_size, given.limit)
    if validation is None and (not tasks or given.depths):
        raise UserError(f"{given.checkpoint}: belongs to no run; give --data FOLDER, or tasks alone")
    precision, sentence = for_evaluation(given.precision, checkpoint.trained_in, device_here())
    print(f"precision: {sentence}", flush=True)
    config = checkpoint.model.config
    results: dict[str, Any] = {
        "checkpoint": str(given.checkpoint),
        "model": checkpoint.folder.name,
        "architecture": config.architecture,
        "precision": precision,
        "limit": given.limit,
        "versions": versions(),
    }
    if validation is not None:
        manifest = validation.manifest
        results |= {"corpus": manifest.corpus, "data_fingerprint": manifest.fingerprint}
        results["document_masking"] = validation.document_masking
        results |= losses(validation, checkpoint, precision, given.depths)
    options = {"folder": given.task_folder, "batch_size": given.batch_size, "limit": given.limit}
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    results["tasks"] = run_tasks(model, tokenizer, tasks, precision=precision, **options) if tasks else {}
    results["shots"] = {task.name: task.shots for task in tasks}
    results["average"] = average(tasks, results["tasks"])
    output = given.output or (checkpoint.run or checkpoint.folder) / "evaluation.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)
    recorded = given.limit is None and record(checkpoint, results)
    console = Console()
    show(results, console)
    where = f"{output}, {checkpoint.run / METRICS}" if recorded and checkpoint.run else str(output)
    console.print(f"results: {where}", soft_wrap=True, highlight=False)
    return results


def calibrate(given: argparse.Namespace) -> dict[str, Any]:
    """Fit the exits' classifier and find their threshold, as asked; what `calibration.json` holds."""
    checkpoint = open_checkpoint(given.checkpoint.resolve())
    validation = make_validation(checkpoint, given.data, given.batch_size, given.calibration_prompts)
    if validation is None:
        raise UserError(f"{given.checkpoint}: belongs to no run; give --data FOLDER")
    from pretrain.run_folder import versions

    model, manifest = checkpoint.model, validation.manifest
    folder = given.output or (checkpoint.run or checkpoint.folder) / "calibrated"
    results: dict[str, Any] = {"checkpoint": str(given.checkpoint), "corpus": manifest.corpus, "versions": versions()}
    try:
        if given.fit_classifier:
            wanted = given.fit_classifier * given.batch_size
            batches = (b.input_ids for b in fixed_batches(manifest, "train", given.batch_size, samples=wanted))
            lines = exits.fit_classifier(model, batches)
            results["classifier"] = {"steps": len(lines), "first": lines[0], "last": lines[-1]}
            print(f"classifier: {len(lines)} steps, loss {lines[0]['loss']:.4f} to {lines[-1]['loss']:.4f}", flush=True)
        if given.calibrate:
            rows = [b.input_ids for b in fixed_batches(manifest, "validation", 1, samples=given.calibration_prompts)]
            start, end = given.prompt_tokens, given.prompt_tokens + given.output_tokens
            if end > rows[0].shape[1]:
                raise ValueError(
                    f"--prompt-tokens: {start} and --output-tokens {given.output_tokens} are more than the "
                    f"{rows[0].shape[1]} tokens of a sequence; give fewer"
                )
            prompts, references = ([row[0, cut].tolist() for row in rows] for cut in (slice(start), slice(start, end)))
            found = exits.calibrate(model, prompts, references, given.calibrate, given.delta, given.epsilon)
            results["calibration"] = dataclasses.asdict(found)
            show_calibration(found, Console())
    except ValueError as error:
        raise UserError(str(error)) from None
    if not given.fit_classifier and results["calibration"]["threshold"] is None:
        print("no threshold passed its test: nothing was written", flush=True)
        return results
    exits.save_calibrated(model, checkpoint.tokenizer.backend_tokenizer, folder, results)
    print(f"results: {folder}", flush=True)
    return results


def show_calibration(found: exits.Calibration, console: Console) -> None:
    """The thresholds that were tested, and which was taken."""
    title = f"Thresholds: {found.kind} distance at most {found.delta}, level {found.epsilon}, {found.prompts} prompts"
    table = rich.table.Table("threshold", "distance", "p-value", "layers", "FLOPs (exact) of full depth's", title=title)
    for trial in found.trials:
        mark = " *" if trial.threshold == found.threshold else ""
        figures = (f"{trial.risk:.4f}", f"{trial.p_value:.2g}", f"{trial.layers:.2f}", f"{trial.flops:.3f}")
        table.add_row(f"{trial.threshold:.4g}{mark}", *figures)
    console.print(table)


def chosen_tasks(names: str | None, preset: str | None) -> list[TaskSettings]:
    """Tasks by name, with their own number of shots, or those of a preset (its name or its YAML file)."""
    if preset is not None:
        path = Path(preset) if preset.endswith(".yaml") else PRESETS / f"{preset}.yaml"
        return load(Preset, path).tasks
    return [TaskSettings(name=name.strip()) for name in (names or "").split(",") if name.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description="Evaluate a trained model.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="run directory, one of its checkpoints, or an exported model")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--tasks", help="tasks of lm-evaluation-harness, separated by commas")
    tasks.add_argument("--preset", help="tasks and shots of configs/evaluation/NAME.yaml, or of a YAML file")
    tasks.add_argument(
        "--perplexity", type=Path, metavar="FILE", help="of a text, or of each `text` of a .jsonl; nothing else is run"
    )
    add("--stride", type=_positive, metavar="N", help="with --perplexity: tokens scored by a window (half the context)")
    add("--task-folder", type=Path, metavar="DIR", help="task files of one's own, beside the harness's")
    add(
        "--data",
        nargs="+",
        metavar="DIR",
        help="prepared folder to validate on, or several, or an experiment's YAML file (default: the run's)",
    )
    add("--depths", action="store_true", help="the loss with depth capped at 1 .. Nr, or at each exit, too")
    add(
        "--limit", type=_positive, metavar="N", help="only the first N questions of a task, validation sequences, texts"
    )
    add("--batch-size", type=_positive, default=8, metavar="N", help="sequences in a forward pass (%(default)s)")
    precisions = ["auto", "bf16", "fp32"]
    add("--precision", choices=precisions, help="of the forward pass (default auto: the run's where it is fast here)")
    add("--output", type=Path, metavar="FILE", help="where the results go (default: evaluation.json in the run)")
    _add_calibration(parser)
    given = parser.parse_args(arguments)
    if given.calibrate or given.fit_classifier:
        if given.perplexity or given.tasks or given.preset or given.depths or given.limit:
            parser.error("--calibrate and --fit-classifier: stand alone; leave the other measurements out")
        calibrate(given)
        return 0
    if given.stride and not given.perplexity:
        parser.error("--stride: only with --perplexity")
    if given.perplexity and (given.data or given.task_folder):
        parser.error("--perplexity: has no use for --data and --task-folder; leave them out")
    (measure if given.perplexity else evaluate)(given)
    return 0


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "exits", "what they need once their model is trained (pretrain/exits.py)"
    ).add_argument
    add(
        "--calibrate",
        choices=("text", "risk"),
        help="find the exits' threshold by Learn then Test, so that answers stay within --delta of full depth's "
        "(text), or come no more than that further from the corpus (risk); the model goes with it to RUN/calibrated, "
        "or --output",
    )
    add("--delta", type=float, default=0.1, help="largest mean distance, 1 - ROUGE-L of the tokens (%(default)s)")
    add("--epsilon", type=float, default=0.05, help="probability of being wrong about that (%(default)s)")
    add("--calibration-prompts", type=_positive, default=200, metavar="N", help="validation sequences (%(default)s)")
    add("--prompt-tokens", type=_positive, default=32, metavar="N", help="of each that are given (%(default)s)")
    add("--output-tokens", type=_positive, default=32, metavar="N", help="that are to be answered (%(default)s)")
    add("--fit-classifier", type=_positive, metavar="STEPS", help="train the classifier, the model left as it is")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    run_command(main)
