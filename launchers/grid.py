"""The runs of a comparison: its settings, and every model x budget x seed as a run with its directory and arguments."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from pydantic import Field, model_validator
from rich.table import Table

from data_prep.settings import Settings, UserError, load, merge, read_yaml
from model.config import MoRConfig
from model.depth import method_fields, method_of
from model.flops import effective_parameters, training_flops, unique_parameters
from model.hardware import Precision
from pretrain.budget import Plan, plan
from pretrain.config import ExperimentSettings, Flops, make_model_config, read_settings
from pretrain.lock import LOCK
from pretrain.metrics import last_line
from pretrain.precision import of_comparison
from pretrain.report.analysis import MATCHED_SHARE, seeds_needed
from pretrain.report.controls import CONTROLS, control_fields, described
from pretrain.report.records import unpack
from pretrain.report.runs import counted
from pretrain.report.summary import Results
from pretrain.report.sweep import Values, flatten, halving, points_of
from pretrain.stop import REQUEUE_FILE

ORDER_SHIFT = 500_000  # between a seed and the one that orders the data otherwise
SWEEP, NOISE = "sweep", "noise"  # folders of runs that stand beside those of the report


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
    controls: list[str] | dict[str, list[str]] = Field(
        [],
        description=f"rows that take a difference apart: {', '.join(CONTROLS)}; a list is for every model that routes, "
        "by name of the model for that one",
    )
    sweep: dict[str, Any] = Field(
        {}, description="key of the experiment -> values tried for every model, before the runs of the report"
    )
    sweep_models: dict[str, dict[str, Any]] = Field(
        {}, description="name of a model -> keys and values tried for it, beside those of sweep or in their place"
    )
    sweep_seeds: list[int] = Field([1000], min_length=1, description="seeds of the sweeps; none of the report's")
    sweep_runs: float | None = Field(
        None,
        gt=0,
        description="what a model's sweep may spend, in whole runs; null: as many as it has seeds, so that seeds given "
        "later ask for a longer sweep",
    )
    sweep_budget: BudgetEntry | None = Field(
        None,
        description="the budget at which each model is swept once, for every budget of the comparison; null: a sweep "
        "at each of them",
    )
    noise: list[Literal["order", "precision"]] = Field(
        [], description="repeat the baseline in another order of the data, in the other precision: what noise does"
    )
    until: float | None = Field(
        None, gt=0, description="add seeds until every 95% interval is at most so wide to either side, in nats"
    )
    most_seeds: int = Field(10, gt=0, description="seeds at which `until` gives up")
    best_seeds: list[int] = Field(
        [],
        description="further seeds for each architecture's best size at each budget, of three sizes or more, once all "
        "of them have run; on Slurm by submitting the same again",
    )
    evidence: list[Path] = Field(
        [], description="reports whose sweeps, sizes and controls stand for those that are not run here"
    )
    records: list[Path] = Field(
        [], description="records of reports (report/records.tar.xz): runs that finished elsewhere are not run again"
    )
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

    @model_validator(mode="after")
    def _sweeps_apart(self) -> Self:
        shared = sorted({*self.seeds, *self.best_seeds} & set(self.sweep_seeds))
        swept = self.sweep or self.sweep_models
        if self.sweep_budget and not swept:
            raise ValueError("sweep_budget: nothing is swept; give `sweep`, or leave it out")
        if swept and shared:
            raise ValueError(f"sweep_seeds: {shared} are seeds of the report too: a winner would be judged by its luck")
        if again := sorted(set(self.seeds) & set(self.best_seeds)):
            raise ValueError(f"best_seeds: {again} are among seeds already; name further ones")
        if self.best_seeds and any(isinstance(entry.flops, list) for entry in self.budgets):
            raise ValueError("best_seeds: for budgets of one number; a trunk's branches have no best size of their own")
        for name in [*self.sweep_models, *(self.controls if isinstance(self.controls, dict) else ())]:
            if name not in self.models:
                raise ValueError(f"{name!r} is no model of this comparison; there are {', '.join(self.models)}")
        for key, values in {
            k: v for keys in (self.sweep, *self.sweep_models.values()) for k, v in flatten(keys).items()
        }.items():
            if not isinstance(values, list) or len({json.dumps(value) for value in values}) < 2:
                raise ValueError(f"sweep: {key}: give a list of at least two different values (given: {values!r})")
        listed = self.controls.values() if isinstance(self.controls, dict) else [self.controls]
        unknown = [kind for kinds in listed for kind in kinds if kind not in CONTROLS]
        if unknown:
            raise ValueError(f"controls: no {', '.join(unknown)}; there are {', '.join(CONTROLS)}")
        return self


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid. arguments: what follows `pretrain/main.py` on its command line. decided: the precision,
    where the configuration left it to the hardware. unswept: the label without swept values, which names the run before
    its sweep is over."""

    label: str
    settings: ExperimentSettings
    arguments: list[str]
    decided: Precision | None = None
    unswept: str = ""

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


def take_records(compare: CompareSettings) -> int:
    """Put the runs of `records` that lack into the comparison's folder; how many. Raises UserError as `unpack`."""
    return sum(unpack(path, compare.output) for path in compare.records)


def shown_apart(compare: CompareSettings) -> bool:
    """Whether the comparison asks for runs that cannot stand in one table."""
    return compare.mix_precisions or len({entry.convention for entry in compare.budgets}) > 1


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A model at a budget: what is swept together, and run once for each seed.

    label: of its runs, without values and seed. keys: what is swept, dotted key -> values.
    """

    name: str
    label: str
    model: str | dict[str, Any]
    entry: BudgetEntry
    keys: dict[str, list[Any]] = field(default_factory=dict)


def cells_of(compare: CompareSettings) -> list[Cell]:
    """Every model, and its controls, at every budget. Raises UserError where a control cannot be built."""
    cells: list[Cell] = []
    conventions = [entry.convention for entry in compare.budgets]
    for place, entry in enumerate(compare.budgets):
        twin = f"-budget{place}" if conventions.count(entry.convention) > 1 else ""
        suffix = ("" if entry.convention == "exact" else f"-{entry.convention}") + twin
        for name, model in compare.models.items():
            keys = flatten(compare.sweep) | flatten(compare.sweep_models.get(name, {}))
            cells.append(Cell(name, name + suffix, model, entry, keys))
        for name, fields, flops in control_rows(compare, entry):
            budget = entry.model_copy(update={"flops": flops})
            cells.append(Cell(name, name + suffix, fields, budget, flatten(compare.sweep)))
    for cell in cells:
        require_keys(cell)
    return cells


def require_keys(cell: Cell) -> None:
    """Raise UserError for a swept key that means nothing for the model."""
    own = method_of(make_model_config(model_fields(cell.model))).settings
    for key in cell.keys:
        name = key.removeprefix("model.")
        if name != key and name in method_fields() - set(own):
            raise UserError(
                f"sweep: {key}: {cell.name} has no such key; give it under sweep_models, to the models that have it"
            )


def model_fields(model: str | dict[str, Any]) -> dict[str, Any]:
    """The fields of a model that is given as a file, or as fields with `extends`."""
    if isinstance(model, str):
        return read_yaml(model)
    fields = dict(model)
    parent = fields.pop("extends", None)
    return merge(read_yaml(parent), fields) if parent else fields


def control_rows(compare: CompareSettings, entry: BudgetEntry) -> list[tuple[str, dict[str, Any], Any]]:
    """(name, fields, FLOPs) of every control at a budget.

    One that is a model of the comparison already is left out, or another's control: two that route alike see nearly as
    many tokens, and one vanilla model serves both.

    Raises UserError that names a control which cannot be built for the model that asks for it, or for any model.
    """
    if not compare.controls:
        return []
    models = {name: model_fields(model) for name, model in compare.models.items()}
    known, length = data_fields(compare, next(iter(models.values())))
    configs = {name: make_model_config(fields | known) for name, fields in models.items()}
    vanilla = next((models[name] for name, config in configs.items() if config.architecture == "vanilla"), None)
    routes = [name for name, config in configs.items() if method_of(config).settings]
    by_name = isinstance(compare.controls, dict)
    asked = compare.controls if isinstance(compare.controls, dict) else dict.fromkeys(routes, compare.controls)
    rows: list[tuple[str, dict[str, Any], Any]] = []
    taken = [(described(config), entry.flops) for config in configs.values()]
    refused: dict[str, list[str]] = {}
    for name, kind in [(name, kind) for name, kinds in asked.items() for kind in kinds]:
        try:
            fields = control_fields(kind, models[name] | known, vanilla, length)
        except ValueError as error:
            refused.setdefault(kind, []).append(f"{name}: {error}")
            continue
        fields = {key: value for key, value in fields.items() if key in models[name] or key not in known}
        config = make_model_config(fields | known)
        flops = equal_tokens(entry, configs[name], config, length) if kind == "equal_tokens" else entry.flops
        if not any(described(config) == there and _nearly(flops, spent) for there, spent in taken):
            taken.append((described(config), flops))
            rows.append((f"{name}_{kind}", fields, flops))
    wrong = [f"{kind}: {'; '.join(why)}" for kind, why in refused.items() if by_name or len(why) == len(asked)]
    if wrong or not asked:
        raise UserError(f"controls: cannot be built: {' | '.join(wrong) or 'no model here routes tokens'}")
    return rows


def _nearly(one: int | list[int], other: int | list[int]) -> bool:
    """Whether two budgets, or all of two lists of them, are matched."""
    pairs = [list(flops) if isinstance(flops, list) else [flops] for flops in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(abs(a / b - 1) < MATCHED_SHARE for a, b in zip(*pairs, strict=True))


def data_fields(compare: CompareSettings, model: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What the data decides of every model, where it is known yet, and the sequence length."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in flatten(compare.overrides).items()]
    given = ["name=plan", "run_dir=plan", f"model={json.dumps(model)}", "budget.flops=1", *overrides]
    vocabulary, length = data_shape(read_settings(compare.experiment, given))
    return {} if vocabulary is None else {"vocab_size": vocabulary}, length


def equal_tokens(entry: BudgetEntry, model: MoRConfig, vanilla: MoRConfig, length: int) -> int | list[int]:
    """The budget that gives vanilla the tokens which the model gets from `entry`."""
    ratio = Fraction(training_flops(vanilla, length, 1, convention=entry.convention)) / Fraction(
        training_flops(model, length, 1, convention=entry.convention)
    )
    flops = entry.flops
    return [round(one * ratio) for one in flops] if isinstance(flops, list) else round(flops * ratio)


def planned(
    compare: CompareSettings,
    cell: Cell,
    seed: int,
    values: Mapping[str, Any],
    beside: str | None = None,
    flops: Any = None,
    more: Mapping[str, Any] | None = None,
) -> PlannedRun:
    """One run of a cell with swept values. beside: the folder, below the comparison's, of runs that are not reported;
    flops: what such a run spends; more: other keys that it changes."""
    short = f"-{flops:.4g}" if flops is not None else ""
    label, unswept = (
        f"{cell.label}{in_name(named)}{short}-seed{seed}".replace("+", "")
        for named in ({**values, **(more or {})}, more or {})
    )
    folder = compare.output / beside / label if beside else compare.output / label
    keys = flatten(compare.overrides) | dict(values) | dict(more or {})
    arguments = [
        "--config",
        str(compare.experiment),
        f"name={cell.label if beside else cell.name}",
        f"run_dir={folder}",
        f"seed={seed}",
        f"model={model_file(compare, cell.name, cell.model)}",
        f"budget.flops={json.dumps(cell.entry.flops if flops is None else flops)}",
        f"budget.convention={cell.entry.convention}",
        f"tracker.group={compare.output.name}",
        *(f"{key}={json.dumps(value)}" for key, value in keys.items()),
    ]
    settings = read_settings(compare.experiment, arguments[2:])
    apart = f"{beside}-" if beside else ""
    return PlannedRun(apart + label, settings, arguments, unswept=apart + unswept)


def in_name(values: Mapping[str, Any]) -> str:
    """Values as a part of a run's name."""
    return "".join(f"-{key.rpartition('.')[2]}{value}" for key, value in values.items())


def said(values: Mapping[str, Any]) -> str:
    """Swept values in words."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def plan_runs(compare: CompareSettings, gpus: bool | None = None) -> list[PlannedRun]:
    """Every run of the grid, seeds outermost, so that a first answer for all models comes early.

    A run's directory is named by model, convention (where it is not `exact`), swept values and seed: two comparisons
    with one output folder share the runs that they have in common. Where the precision is `auto` it is decided here,
    once for all runs. Where a sweep is not over yet, the run stands here with the experiment's own values.

    gpus: whether the runs will have any; None: where they run here, as this machine, under Slurm as `submit` asks for.
    Raises UserError where a run's settings are wrong or its directory belongs to another configuration.
    """
    cells = cells_of(compare)
    settled = [winner(compare, cell) or {} for cell in cells]
    runs = [planned(compare, cell, seed, won) for seed in compare.seeds for cell, won in zip(cells, settled)]
    return with_configurations(compare, runs, gpus)


def with_configurations(compare: CompareSettings, runs: list[PlannedRun], gpus: bool | None) -> list[PlannedRun]:
    """The runs with their precision decided, none of them in a directory of another configuration."""
    runs = with_precision(compare, runs, will_have_gpus(compare) if gpus is None else gpus)
    for run in runs:
        require_same_configuration(run)
    return runs


# --- sweeps and noise -------------------------------------------------------------------------------------------


def sweep_of(compare: CompareSettings, cell: Cell) -> Cell:
    """The cell whose sweep settles this one: itself, or the model at the one budget that is swept."""
    if compare.sweep_budget is None:
        return cell
    convention = compare.sweep_budget.convention
    label = cell.name + ("" if convention == "exact" else f"-{convention}")
    return replace(cell, label=label, entry=compare.sweep_budget)


def sweeps_of(compare: CompareSettings) -> list[Cell]:
    """The cells that are swept, each once."""
    return list({swept.label: swept for cell in cells_of(compare) if (swept := sweep_of(compare, cell)).keys}.values())


def rounds_of(compare: CompareSettings, cell: Cell) -> list[tuple[int, float]]:
    """The rounds of a cell's sweep; all of them together spend at most `sweep_runs` runs of the report."""
    if not cell.keys:
        return []
    return halving(len(points_of(cell.keys)), (compare.sweep_runs or len(compare.seeds)) / len(compare.sweep_seeds))


def sweep_flops(cell: Cell, share: float) -> int:
    """What a run of a sweep spends: a share of the cell's budget, of several the smallest."""
    flops = cell.entry.flops
    return round(share * (flops[0] if isinstance(flops, list) else flops))


def round_runs(compare: CompareSettings, cell: Cell, number: int) -> list[PlannedRun]:
    """The runs of a round of a cell's sweep. Raises UserError where the round before it is not over."""
    return [
        planned(compare, cell, seed, values, SWEEP, sweep_flops(cell, rounds_of(compare, cell)[number][1]))
        for values in taking_part(compare, cell, number)
        for seed in compare.sweep_seeds
    ]


def taking_part(compare: CompareSettings, cell: Cell, number: int) -> list[Values]:
    """The points of a round: all, then the best of the round before it, in the order of the grid."""
    points, rounds = points_of(cell.keys), rounds_of(compare, cell)
    for before, (count, _) in enumerate(rounds[1 : number + 1]):
        points = ranked(compare, cell, points, rounds[before][1])[:count]
    return points


def ranked(compare: CompareSettings, cell: Cell, points: Sequence[Values], share: float) -> list[Values]:
    """Points by their mean loss in one round, the best first; one whose run failed or diverged is the last."""
    losses = []
    for values in points:
        runs = [planned(compare, cell, seed, values, SWEEP, sweep_flops(cell, share)) for seed in compare.sweep_seeds]
        lines = [last_line(run.folder / "metrics.jsonl") or {} for run in runs]
        if not any(line.get("event") == "finished" for line in lines):
            losses.append(math.inf if any(run.folder.exists() for run in runs) else math.nan)
            continue
        found = [line.get("validation_loss") for line in lines]
        known = [float(loss) for loss in found if loss is not None]
        losses.append(sum(known) / len(known) if len(known) == len(found) else math.inf)
    if all(math.isnan(loss) for loss in losses):
        raise UserError(f"{cell.label}: a round of its sweep has not run yet; run the rounds in order")
    order = sorted(range(len(points)), key=lambda index: (math.isnan(losses[index]), losses[index]))
    return [points[index] for index in order]


def winner(compare: CompareSettings, cell: Cell) -> Values | None:
    """The swept values of the lowest loss, {} without a sweep; None while the sweep is not over.

    A run that failed, as one that diverged does, comes last in its round and holds up nothing.
    """
    cell = sweep_of(compare, cell)
    rounds = rounds_of(compare, cell)
    if not rounds:
        return {}
    try:
        points = taking_part(compare, cell, len(rounds) - 1)
        runs = [run for run in round_runs(compare, cell, len(rounds) - 1) if not run.finished()]
        if any(run.asks_for_more() or not run.folder.exists() or (run.folder / LOCK).exists() for run in runs):
            return None
        return ranked(compare, cell, points, rounds[-1][1])[0]
    except UserError:
        return None


def plan_round(compare: CompareSettings, number: int, gpus: bool | None = None) -> list[PlannedRun]:
    """The runs of one round of every cell's sweep; empty past the last round."""
    cells = [cell for cell in sweeps_of(compare) if len(rounds_of(compare, cell)) > number]
    return with_configurations(compare, [run for cell in cells for run in round_runs(compare, cell, number)], gpus)


def round_size(compare: CompareSettings, number: int) -> int:
    """Runs of a round, known before the round before it has run."""
    rounds = [rounds_of(compare, cell) for cell in sweeps_of(compare)]
    return sum(found[number][0] for found in rounds if len(found) > number) * len(compare.sweep_seeds)


def round_count(compare: CompareSettings) -> int:
    """Rounds of the longest sweep."""
    return max((len(rounds_of(compare, cell)) for cell in sweeps_of(compare)), default=0)


def sweep_cost(compare: CompareSettings) -> float:
    """FLOPs of all sweeps over those of the runs of the report."""
    swept = reported = 0.0
    for cell in sweeps_of(compare):
        for count, share in rounds_of(compare, cell):
            swept += count * len(compare.sweep_seeds) * sweep_flops(cell, share)
    for cell in cells_of(compare):
        flops = cell.entry.flops
        reported += len(compare.seeds) * (flops[-1] if isinstance(flops, list) else flops)
    return swept / reported


def plan_noise(compare: CompareSettings, gpus: bool | None = None) -> list[PlannedRun]:
    """The baseline's repetitions in another order of the data and in the other precision, for each seed."""
    cells = cells_of(compare)
    cell = next((cell for cell in cells if cell.name == compare.baseline), cells[0])
    values = winner(compare, cell) or {}
    runs: list[PlannedRun] = []
    for seed in compare.seeds if compare.noise else ():
        (own,) = with_configurations(compare, [planned(compare, cell, seed, values)], gpus)
        precision = own.settings.precision
        changes: dict[str, dict[str, Any]] = {
            "order": {"data.order_seed": seed + ORDER_SHIFT, "precision": precision},
            "precision": {"precision": "fp32" if precision == "bf16" else "bf16"},
        }
        runs += [planned(compare, cell, seed, values, NOISE, more=changes[kind]) for kind in compare.noise]
    return with_configurations(compare, runs, gpus)


# --- seeds ------------------------------------------------------------------------------------------------------


def plan_best(compare: CompareSettings, gpus: bool | None = None) -> list[PlannedRun]:
    """The runs of `best_seeds`: of each architecture and budget the size of the lowest mean loss over `seeds`.

    Of architectures with three sizes or more among `models`, all of which have finished; empty before. Raises UserError
    where no architecture has so many.
    """
    sizes: dict[tuple[str, str], list[tuple[Cell, int]]] = {}
    for cell in cells_of(compare) if compare.best_seeds else ():
        if cell.name in compare.models:
            config = make_model_config(model_fields(cell.model))
            of_one = sizes.setdefault((config.architecture, cell.label.removeprefix(cell.name)), [])
            of_one.append((cell, effective_parameters(config)))
    several = [same for same in sizes.values() if len({size for _, size in same}) >= 3]
    if compare.best_seeds and not several:
        raise UserError("best_seeds: no architecture has three sizes among `models`, so that none has a best one")
    runs: list[PlannedRun] = []
    for same in several:
        losses = [(loss, cell) for cell, _ in same if (loss := ended_at(compare, cell)) is not None]
        if len(losses) == len(same):
            _, cell = min(losses, key=lambda found: found[0])
            runs += [planned(compare, cell, seed, winner(compare, cell) or {}) for seed in compare.best_seeds]
    return with_configurations(compare, runs, gpus) if runs else []


def ended_at(compare: CompareSettings, cell: Cell) -> float | None:
    """Mean causal loss of a cell over the seeds of the comparison; None while one of its runs has not ended."""
    if (won := winner(compare, cell)) is None:
        return None
    lines = []
    for seed in compare.seeds:
        run = planned(compare, cell, seed, won)
        lines.append(last_line(run.folder / "metrics.jsonl") if run.finished() else None)
    losses = [line.get("validation_loss") for line in lines if line is not None]
    known = [float(loss) for loss in losses if loss is not None]
    return sum(known) / len(known) if len(known) == len(compare.seeds) else None


def more_seeds(compare: CompareSettings, results: Results | None) -> list[int]:
    """Seeds to add until every interval is as narrow as `until`, as the spread so far lets expect; at most most_seeds.

    results: of the report on the seeds so far. The rule looks at the widths of intervals alone, never at which model is
    ahead.
    """
    if compare.until is None or results is None or len(compare.seeds) >= compare.most_seeds:
        return []
    sets = results.get("sets", [results])
    rows = [row for one in sets for row in one["differences"]]
    widths = [math.inf if row["high"] is None else row["high"] - row["mean"] for row in rows]
    if not rows or max(widths) <= compare.until:
        return []
    wanted = max([3, *(seeds_needed(row["by_seed"], compare.until) for row in rows if len(row["by_seed"]) > 1)])
    count = min(max(wanted, len(compare.seeds) + 1), compare.most_seeds) - len(compare.seeds)
    taken = {*compare.seeds, *compare.sweep_seeds, *compare.best_seeds}
    free = (seed for seed in itertools.count() if seed not in taken)
    return list(itertools.islice(free, count))


def with_seeds(compare: CompareSettings, seeds: Sequence[int]) -> dict[str, Any]:
    """What changes of a comparison that gets these seeds beside its own: the sweeps that are over stand."""
    settled = {"sweep_runs": compare.sweep_runs or len(compare.seeds)} if compare.sweep or compare.sweep_models else {}
    return {"seeds": [*compare.seeds, *seeds], **settled}


# --- precision, files, sizes --------------------------------------------------------------------------------------


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
        result.append(replace(run, settings=settings, arguments=arguments, decided=precision))
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
    fields = model_fields(model)
    path = compare.output / "models" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return str(path)


def require_same_configuration(run: PlannedRun) -> None:
    """Refuse, before anything runs, a run directory that another configuration has used, but for a larger budget."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    from pretrain.extend import refuse_unless_grown  # reads checkpoints, and so brings torch's compiler

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
                counted(unique_parameters(config)),
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
