"""Finished and running runs, read from their directories: `run.json` for what is fixed, `metrics.jsonl` for the rest.

Two words are used throughout the report. A **variant** is a set of runs that differ in their seed alone. A
**comparable set** is a set of runs whose losses may stand in one table: same corpus, tokenizer, sequence length,
evaluation and FLOP convention.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.settings import UserError, read_yaml
from model.config import MoRConfig
from model.depth import method_of, stages_of

# What must agree before two losses are compared: the user's word for it -> the keys of run.json.
CONDITIONS = {
    "corpus": ("corpus", "data_fingerprint"),
    "tokenizer": ("tokenizer_fingerprint", "vocab_size"),
    "sequence length": ("sequence_length",),
    "evaluation (document masking)": ("document_masking",),
    "FLOP convention": ("convention",),
    "precision": ("precision",),
}
REQUIRED_FACTS = [
    *("name", "architecture", "seed", "unique_parameters", "unigram_loss", "model", "budget"),
    *(key for keys in CONDITIONS.values() for key in keys),
]


def shown(value: float | None, format: str = ".4f") -> str:
    """A figure for a reader; a dash where there is none, or none that is finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:{format}}"


def counted(parameters: float) -> str:
    """A number of parameters for a reader, in millions or, below a tenth of one, in thousands."""
    return f"{parameters / 1e6:,.2f}M" if parameters >= 1e5 else f"{parameters / 1e3:,.1f}k"


@dataclass(frozen=True)
class Run:
    """One run directory.

    folder: the run directory.
    facts: `run.json`.
    lines: the good lines of `metrics.jsonl`, in order.
    warnings: what was wrong with the metrics file, one sentence each, naming file and line.
    """

    folder: Path
    facts: dict[str, Any]
    lines: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def architecture(self) -> str:
        return str(self.facts["architecture"])

    @property
    def seed(self) -> int:
        return int(self.facts["seed"])

    @property
    def finished(self) -> bool:
        return self.lines[-1].get("event") == "finished"

    @property
    def last(self) -> dict[str, Any]:
        """The last line: `step`, `tokens`, `flops`, `seconds` so far."""
        return self.lines[-1]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """The lines that carry a validation loss, one per step."""
        by_step = {line["step"]: line for line in self.lines if line.get("validation_loss") is not None}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def last_validation(self) -> dict[str, Any]:
        """The last line that tells of a validation: causal, or by top-k alone where no causal decision can be made."""
        return next((line for line in reversed(self.lines) if "validation_loss" in line), {})

    @property
    def parent(self) -> dict[str, Any] | None:
        """What run.json says of the run that this one started from."""
        return self.facts.get("parent")

    @property
    def depth_lines(self) -> list[dict[str, Any]]:
        """The training lines that carry `depth_shares`."""
        return [line for line in self.lines if line.get("depth_shares")]

    @property
    def condition(self) -> tuple[str, ...]:
        """What must be equal for two runs to be comparable, in the order of `CONDITIONS`."""
        return tuple(", ".join(str(self.facts[key]) for key in keys) for keys in CONDITIONS.values())

    @property
    def condition_name(self) -> str:
        """The condition in words, short enough for a heading."""
        facts = self.facts
        masking = "documents masked" if facts["document_masking"] else "attention across documents"
        computed = f"{facts['sequence_length']} tokens, {masking}, {facts['precision']}"
        return f"{facts['corpus']}, {computed}, FLOPs `{facts['convention']}`"


@dataclass(frozen=True)
class Variant:
    """Runs of one name and one configuration, a seed each.

    runs: at least one, in order of their seeds.
    """

    name: str
    runs: list[Run]

    @property
    def architecture(self) -> str:
        return self.runs[0].architecture

    @property
    def model(self) -> dict[str, Any]:
        """The model's configuration (`MoRConfig` fields)."""
        return dict(self.runs[0].facts["model"])

    @property
    def flops(self) -> float:
        """Mean training FLOPs over the runs, in the runs' convention."""
        return sum(run.last["flops"] for run in self.runs) / len(self.runs)

    @property
    def tokens(self) -> float:
        """Mean training tokens over the runs."""
        return sum(run.last["tokens"] for run in self.runs) / len(self.runs)

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    def losses(self, key: str = "validation_loss") -> dict[int, float]:
        """Final loss of each seed that has one, nats per token; `key` names the evaluation (causal or top-k)."""
        found = {run.seed: run.last_validation.get(key) for run in self.runs}
        return {seed: float(loss) for seed, loss in found.items() if loss is not None}

    @property
    def has_losses(self) -> bool:
        """Whether every seed ended with a causal validation loss that is finite."""
        return len(self.losses()) == len(self.runs)

    def mean_recursions(self) -> float:
        """Mean recursions that a training token executed, over the last lines of all runs; 1 where nothing recurs.

        A recursion behind a gate is executed by those that passed it; any other, by every token.
        """
        stages = stages_of(MoRConfig.from_dict(self.model))
        gates = {use.recursion: stage.gate for stage in stages for use in stage.uses if use.recursion is not None}
        shares = [run.depth_lines[-1]["depth_shares"] for run in self.runs if run.depth_lines] or [[]]
        executed = [sum(1.0 if gate is None else sum(row[gate + 1 :]) for gate in gates.values()) for row in shares]
        return sum(executed) / len(executed) if gates else 1.0


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read `metrics.jsonl` up to its last good line.

    Returns the lines and the warnings. Reading stops before the first line that is cut short, lacks a field or goes
    back in steps, FLOPs or tokens; the warning names file and line. Raises UserError if there is no such file.
    """
    try:
        raw = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a run directory?") from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(raw, start=1):
        fault = None
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            fault = "is cut short or not JSON"
        else:
            fault = _line_fault(line, lines[-1] if lines else None)
        if fault:
            at = f"step {lines[-1]['step']} (line {number - 1})" if lines else "nothing"
            left = f", {len(raw) - number} more after it" if number < len(raw) else ""
            return lines, [f"{path}, line {number} {fault}; used up to {at}, left out that line{left}"]
        lines.append(line)
    return lines, []


def _line_fault(line: Any, before: dict[str, Any] | None) -> str | None:
    if not isinstance(line, dict):
        return "is not an object"
    for key in ("step", "tokens", "flops"):
        value = line.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return f"has no number under {key!r}"
        if before is not None and value < before[key]:
            return f"goes backwards in {key!r} ({before[key]} to {value})"
    return None


def read_run(folder: str | Path) -> Run:
    """Read one run directory. Raises UserError naming file and key."""
    folder = Path(folder)
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give the directory of a run (`run_dir`) or one that holds runs"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    facts.setdefault("precision", _precision_of(folder))
    missing = [key for key in REQUIRED_FACTS if key not in facts]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; it was not written by this version of the trainer")
    lines, warnings = read_metrics(folder / "metrics.jsonl")
    return Run(folder, facts, lines, warnings)


def _precision_of(folder: Path) -> str:
    """Of a run whose run.json does not name it yet: as config.yaml has it."""
    path = folder / "config.yaml"
    return str(read_yaml(path).get("precision", "unknown")) if path.exists() else "unknown"


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Read run directories; a folder of runs stands for the runs in it, a trunk of several budgets for its branches.

    Returns the runs with at least one validation, and warnings. Raises UserError where nothing is left.
    """
    runs: dict[Path, Run] = {}
    warnings: list[str] = []
    given = [Path(folder) for folder in folders]
    for folder in given:
        below = sorted(path.parent for path in folder.glob("*/run.json"))
        for path in [folder] if (folder / "run.json").exists() or not below else below:
            found = (branch.parent for branch in path.glob("branches/*/run.json"))
            branches = sorted(branch for branch in found if branch.suffix != ".partial")
            # a run whose budget grew stands beside its old endings; a trunk is its branches
            own = [path] if not branches or "extensions" in read_run(path).facts else []
            for run_folder in [*own, *branches]:
                runs.setdefault(run_folder.resolve(), read_run(run_folder))
    kept = []
    for run in runs.values():
        warnings += run.warnings
        if not run.last_validation:
            warnings.append(f"{run.folder}: no validation loss yet; left out")
            continue
        warnings += _remarks(run)
        if not run.finished:
            warnings.append(f"{run.folder}: not finished (step {run.last['step']}); left out of matched comparisons")
        kept.append(run)
    if not kept:
        raise UserError("\n".join([f"no run with a validation loss in: {', '.join(map(str, given))}", *warnings]))
    return kept, warnings


def _remarks(run: Run) -> list[str]:
    """What a reader of the run's figures must know, one sentence each."""
    found = []
    if run.last_validation.get("validation_loss") is None:
        config = MoRConfig.from_dict(run.facts["model"])
        why = method_of(config).refuses(config, "causal") or "its last one is not finite"
        found.append(f"{run.folder}: no causal validation loss ({why}); left out of differences and figures")
    if (epoch := run.last.get("epoch") or 0) > 1:
        found.append(f"{run.folder}: its data repeats itself: {epoch:.2f} epochs")
    if (parent := run.parent) is not None:
        counted = "its FLOPs here hold" if parent["counted"] else "its FLOPs here leave out"
        spent = "an unknown number of FLOPs" if parent["flops"] is None else f"{parent['flops']:.4g} FLOPs"
        found.append(f"{run.folder}: starts from {parent['path']} ({parent['take']}); {counted} {spent} of the parent")
    for change in run.facts.get("changes", []):
        keys = ", ".join(change["keys"])
        found.append(f"{run.folder}: {keys} changed after step {change['after_step']}")
    return found


def comparable_sets(runs: Sequence[Run], allow_mixed: bool = False) -> list[list[Run]]:
    """Split runs into comparable sets, in order of appearance.

    Raises UserError that names what differs and two runs, unless `allow_mixed`.
    """
    sets: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        sets.setdefault(run.condition, []).append(run)
    if len(sets) > 1 and not allow_mixed:
        (first, *_), (second, *_) = list(sets.values())[:2]
        differ = [
            f"{what}: {a} in {first.folder}, {b} in {second.folder}"
            for what, a, b in zip(CONDITIONS, first.condition, second.condition)
            if a != b
        ]
        raise UserError(
            "these runs cannot stand in one comparison; --allow-mixed shows them apart.\n  " + "\n  ".join(differ)
        )
    return list(sets.values())


def variants(runs: Sequence[Run]) -> list[Variant]:
    """Group comparable runs into variants. Where configurations share a name, budget or folder tells them apart.

    Raises UserError if two runs of one variant have the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        parent = run.parent and {key: run.parent[key] for key in ("take", "data", "architecture", "step")}
        key = json.dumps([run.name, run.facts["model"], run.facts["budget"], parent], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    result = []
    names = _distinct_names([group[0] for group in groups.values()])
    for name, group in zip(names, groups.values()):
        group = sorted(group, key=lambda run: run.seed)
        for one, two in itertools.pairwise(group):
            if one.seed == two.seed:
                raise UserError(f"{one.folder} and {two.folder} are the same configuration and seed; give one of them")
        result.append(Variant(name, group))
    return result


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    for suffix in (lambda run: f"{run.last['flops']:.2g} FLOPs", lambda run: run.folder.name):
        names = [name if names.count(name) == 1 else f"{name} ({suffix(run)})" for name, run in zip(names, runs)]
    return names
