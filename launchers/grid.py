"""The runs of a comparison: its settings, and every model x budget x seed as a run with its directory and arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field
from rich.table import Table

from data_prep.settings import Settings, UserError, load, merge, read_yaml
from model.config import MoRConfig
from model.flops import unique_parameters
from model.hardware import Precision
from pretrain.budget import Plan, plan
from pretrain.config import ExperimentSettings, Flops, make_model_config, read_settings
from pretrain.extend import refuse_unless_grown
from pretrain.metrics import last_line
from pretrain.precision import of_comparison
from pretrain.stop import REQUEUE_FILE


class BudgetEntry(Settings):
    flops: Flops | list[Flops] = Field(
        description="training FLOPs of each run; a list trains one trunk with a branch each"
    )
    convention: Literal["exact", "paper", "palm", "six_n"] = Field("exact", description="how they are counted")


class CompareSettings(Settings):
    """A comparison: every model, at every budget, with every seed."""

    output: Path = Field(description="folder of the comparison: a run directory each, logs/ and report/")
    experiment: Path = Field(description="configs/experiment/*.yaml, what all runs share")
    overrides: dict[str, Any] = Field({}, description="keys of the experiment that this comparison sets otherwise")
    models: dict[str, str | dict[str, Any]] = Field(
        min_length=1, description="name in the report -> configs/model/*.yaml, or fields (with `extends`)"
    )
    budgets: list[BudgetEntry] = Field(min_length=1, description="what every run spends")
    seeds: list[int] = Field([0], min_length=1, description="a run of each model and budget for each seed")
    at_once: int = Field(1, gt=0, description="local runs that go on at the same time")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of a run; null shares the cores among at_once runs"
    )
    mix_precisions: bool = Field(
        False, description="let runs differ in precision; the report then shows each precision apart"
    )
    accelerate: list[str] = Field(
        ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"],
        description="arguments of `accelerate launch`, for instance [--config_file, configs/parallel/fsdp.yaml]",
    )
    scheduler: Literal["local", "slurm"] = Field("local", description="run here, or hand each run to Slurm")
    submit: list[str] = Field([], description="arguments of launchers/submit.py, for instance [--nodes=2]")
    report: str = Field("report", description="name of the report's folder below `output`")
    baseline: str | None = Field(None, description="model to compare with; null: the vanilla model of the same width")
    published: bool = Field(False, description="draw the paper's figures beside these")


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid. arguments: what follows `pretrain/main.py` on its command line. decided: the precision,
    where the configuration left it to the hardware."""

    label: str
    settings: ExperimentSettings
    arguments: list[str]
    decided: Precision | None = None

    @property
    def folder(self) -> Path:
        return self.settings.run_dir

    @property
    def budgets(self) -> list[int]:
        flops = self.settings.budget.flops
        assert flops is not None  # a comparison always gives FLOPs
        return flops if isinstance(flops, list) else [flops]

    @property
    def work(self) -> float:
        """FLOPs of the whole run: a trunk, and what each branch adds to it."""
        plateau = 1 - self.settings.schedule.decay_share if len(self.budgets) > 1 else 0.0
        return self.budgets[-1] * plateau + sum(self.budgets) * (1 - plateau)

    def folders(self) -> list[Path]:
        """The run directories that hold results: the run's own, or those of its branches."""
        if len(self.budgets) == 1:
            return [self.folder]
        begun = [path for path in self.folder.glob("branches/*") if path.suffix != ".partial"]
        return sorted(begun, key=lambda path: float(path.name))

    def finished(self) -> bool:
        """Whether every directory's metrics end with the finished event, and that of this budget."""
        if self.grows():
            return False
        if len(self.budgets) == 1:
            return _event(self.folder) == "finished"
        done = [folder for folder in self.folders() if _event(folder) == "finished"]
        return _event(self.folder) == "branched" and len(done) == len(self.budgets)

    def grows(self) -> bool:
        """Whether its directory was trained to other budgets, from which it is to go on (pretrain/extend.py)."""
        path = self.folder / "config.yaml"
        return path.exists() and read_yaml(path).get("budget") != self.settings.budget.model_dump(mode="json")

    def asks_for_more(self) -> bool:
        """Whether the run, or a branch, was stopped with a checkpoint, to be started again."""
        return any((folder / REQUEUE_FILE).exists() for folder in {self.folder, *self.folders()})

    def share(self) -> float:
        """Share of the run's whole work that is done, by its metrics: the trunk, and what each branch adds to it."""
        line = last_line(self.folder / "metrics.jsonl")
        spent = line["flops"] if line else 0
        if len(self.budgets) == 1:
            return min(1.0, spent / self.budgets[0])
        plateau = 1 - self.settings.schedule.decay_share
        for folder, budget in zip(self.folders(), self.budgets):
            line = last_line(folder / "metrics.jsonl")
            spent += max(0.0, line["flops"] - plateau * budget) if line else 0
        return min(1.0, spent / self.work)


def _event(folder: Path) -> str | None:
    return (last_line(folder / "metrics.jsonl") or {}).get("event")


def read_compare(path: Path, overrides: Sequence[str]) -> CompareSettings:
    """Read a comparison and its `key=value` overrides. Raises UserError that names the file and the key."""
    return load(CompareSettings, path, overrides)


def shown_apart(compare: CompareSettings) -> bool:
    """Whether the comparison asks for runs that cannot stand in one table."""
    return compare.mix_precisions or len({entry.convention for entry in compare.budgets}) > 1


# --- the plan ---------------------------------------------------------------------------------------------------


def plan_runs(compare: CompareSettings, gpus: bool | None = None) -> list[PlannedRun]:
    """Every run of the grid, seeds outermost, so that a first answer for all models comes early.

    A run's directory is named by model, convention (where it is not `exact`) and seed: two comparisons with one output
    folder share the runs that they have in common. Where the precision is `auto` it is decided here, once for all runs.

    gpus: whether the runs will have any; None: where they run here, as this machine, under Slurm as `submit` asks for.
    Raises UserError where a run's settings are wrong or its directory belongs to another configuration.
    """
    runs = []
    conventions = [entry.convention for entry in compare.budgets]
    for seed in compare.seeds:
        for place, entry in enumerate(compare.budgets):
            for name, model in compare.models.items():
                twin = f"-budget{place}" if conventions.count(entry.convention) > 1 else ""
                convention = "" if entry.convention == "exact" else f"-{entry.convention}"
                label = f"{name}{convention}{twin}-seed{seed}"
                arguments = [
                    "--config",
                    str(compare.experiment),
                    f"name={name}",
                    f"run_dir={compare.output / label}",
                    f"seed={seed}",
                    f"model={model_file(compare, name, model)}",
                    f"budget.flops={json.dumps(entry.flops)}",
                    f"budget.convention={entry.convention}",
                    f"tracker.group={compare.output.name}",
                    *(f"{key}={json.dumps(value)}" for key, value in flatten(compare.overrides).items()),
                ]
                settings = read_settings(compare.experiment, arguments[2:])
                runs.append(PlannedRun(label, settings, arguments))
    runs = with_precision(compare, runs, will_have_gpus(compare) if gpus is None else gpus)
    for run in runs:
        require_same_configuration(run)
    return runs


def with_precision(compare: CompareSettings, runs: Sequence[PlannedRun], gpus: bool) -> list[PlannedRun]:
    """The runs with `auto` decided: for all alike, or for each where they may differ."""
    if all(run.settings.precision != "auto" for run in runs):
        return list(runs)
    together = None if compare.mix_precisions else of_comparison([run.folder for run in runs], gpus)
    result = []
    for run in runs:
        precision = together or of_comparison([run.folder], gpus)
        settings = run.settings.model_copy(update={"precision": precision})
        arguments = [*run.arguments, f"precision={precision}"]
        result.append(PlannedRun(run.label, settings, arguments, decided=precision))
    return result


def will_have_gpus(compare: CompareSettings) -> bool:
    """Whether the runs will have GPUs: this machine's, or those that launchers/submit.py asks for unless told 0."""
    if compare.scheduler == "local":
        return torch.cuda.is_available()
    return not re.search(r"--gpus-per-node[= ]0\b", " ".join(compare.submit))


def model_file(compare: CompareSettings, name: str, model: str | dict[str, Any]) -> str:
    """The YAML file of a model: the one that was given, or one written for fields that were given in its place."""
    if isinstance(model, str):
        return model
    fields = dict(model)
    parent = fields.pop("extends", None)
    fields = merge(read_yaml(parent), fields) if parent else fields
    path = compare.output / "models" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return str(path)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def require_same_configuration(run: PlannedRun) -> None:
    """Refuse, before anything runs, a run directory that another configuration has used, but for a larger budget."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    try:
        refuse_unless_grown(run.settings, read_yaml(path))
    except UserError as error:
        raise UserError(f"{error}. Of a comparison: remove it, or give another folder with output=FOLDER") from None


def data_shape(settings: ExperimentSettings) -> tuple[int | None, int]:
    """(vocabulary or None where it is not known yet, sequence length) of the data, prepared or to be prepared."""
    for folder, _ in settings.data.folders:  # of a mixture all are alike
        manifest = folder / "manifest.json"
        if manifest.exists():
            facts = json.loads(manifest.read_text(encoding="utf-8"))
            return facts["vocab_size"], facts["sequence_length"]
    folder, prepare = settings.data.folders[0]
    if prepare is None:
        raise UserError(f"{folder / 'manifest.json'}: no such file, and data.prepare does not say how to make it")
    source = read_yaml(prepare)
    return source.get("tokenizer", {}).get("vocab_size"), int(source["sequence_length"])


def plan_table(runs: Sequence[PlannedRun]) -> Table:
    """Steps, tokens and FLOPs of each model and budget. Raises UserError for a budget below one step."""
    table = Table(title="Plan", title_justify="left")
    for name in ("model", "params", "budget", "FLOPs/token", "steps", "tokens", "off by"):
        table.add_column(name, justify="left" if name == "model" else "right")
    seeds = sorted({run.settings.seed for run in runs})
    for run in runs:
        if run.settings.seed != seeds[0]:
            continue
        for config, row in plans_of(run):
            table.add_row(
                row.model,
                f"{unique_parameters(config) / 1e6:,.2f}M",
                f"{row.budget:.4g} {row.convention}",
                f"{row.flops_per_token:.4g}",
                f"{row.steps:,}",
                f"{row.tokens / 1e6:,.2f}M",
                f"{-row.residual / row.budget:+.2%}",
            )
    table.caption = f"{len(runs)} runs: each row for seeds {', '.join(map(str, seeds))}; expected routing"
    return table


def plans_of(run: PlannedRun) -> list[tuple[MoRConfig, Plan]]:
    """The model and the plan of each budget of one run."""
    settings = run.settings
    vocabulary, length = data_shape(settings)
    fields = {"max_position_embeddings": length, **settings.model}
    config = make_model_config(fields | ({} if vocabulary is None else {"vocab_size": vocabulary}))
    rows = []
    for budget in run.budgets:
        try:
            row = plan(
                config,
                budget,
                model=settings.name,
                smallest_budget=min(run.budgets),
                convention=settings.budget.convention,
                sequence_length=length,
                batch_size=settings.batch.size,
                warmup=settings.schedule.warmup_share,
                decay=settings.schedule.decay_share,
            )
        except ValueError as error:
            raise UserError(f"{run.label}: {error}") from None
        rows.append((config, row))
    return rows
