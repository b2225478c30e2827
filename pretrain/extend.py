"""A larger budget for a run that has been trained: the same command with a larger `budget` goes on beyond the end.

A run on a plateau does not depend on its budget, so what was trained up to the beginning of the cool-down stands for
the larger budget too. The checkpoint made there is kept for good; the run goes back to it, and what came after it, the
cool-down with its metrics and its final model, becomes a branch in `branches/`: no figure is lost. A trunk of several
budgets grows by a branch for each new one.

The result is, bit for bit, that of a run which had the larger budget from its beginning and the same warm-up in steps
(the old run's is kept), on the same ranks; the points of validation before the cool-down are the old budget's. A
mixture whose weights change at shares of the budget is the exception: what was handed out before stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.settings import UserError, read_yaml
from pretrain import run_folder
from pretrain.checkpoint import committed, remove
from pretrain.config import ExperimentSettings, differing_keys, noted_changes
from pretrain.metrics import METRICS, last_line

ENDED = ("finished", "branched")
KINDS = ("flops", "tokens", "steps")


@dataclass(frozen=True)
class Growth:
    """A budget that has grown. kind: flops, tokens or steps; before, now: totals, rising."""

    kind: str
    before: list[int]
    now: list[int]


def begun_warmup(run_dir: Path) -> int | None:
    """Warm-up steps of a run that has begun, which a larger budget does not change; None for a new one."""
    try:
        return int(json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["budget"]["warmup_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def grow(settings: ExperimentSettings) -> str | None:
    """Make the run directory ready for a larger budget; returns what was done in words, None where nothing was to do.

    May be cut short anywhere and called again: the new configuration is written last. Raises UserError where the
    budget cannot be changed so, with the reason and the way out.
    """
    path = settings.run_dir / "config.yaml"
    if not path.exists():
        return None
    before, now = read_yaml(path), settings.model_dump(mode="json")
    if before.get("budget") == now["budget"]:
        return None
    if [key for key in differing_keys(before, now) if not key.startswith("budget.")]:
        return None  # another run altogether, which its directory will refuse
    growth = _growth(settings.run_dir, before["budget"], now["budget"])
    if settings.schedule.kind == "cosine":
        raise UserError(
            f"{settings.run_dir}: a cosine depends on its budget from the end of its warm-up on, so no part of this "
            f"run serves a larger one. Train anew in another run_dir, or go on with a new schedule: "
            f"start_from={settings.run_dir} start_from.take=optimizer run_dir=NEW"
        )
    told = _extend_trunk(settings) if len(growth.before) > 1 else _extend_run(settings, before, growth)
    run_folder.note_changes(settings.run_dir, noted_changes(before, now))
    _write(path, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
    return f"budget.{growth.kind} grew from {growth.before[-1]:.6g} to {growth.now[-1]:.6g}; {told}"


def _growth(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> Growth:
    kinds = [next(kind for kind in KINDS if budget.get(kind) is not None) for budget in (before, now)]
    way_out = f"give the old budget, another run_dir, or start_from={folder} in a new run_dir"
    if kinds[0] != kinds[1] or before["convention"] != now["convention"]:
        raise UserError(
            f"{folder}: was begun with budget.{kinds[0]} ({before['convention']}), not budget.{kinds[1]} "
            f"({now['convention']}): only its size may change; {way_out}"
        )
    old, new = ([v] if isinstance(v := budget[kinds[0]], int) else list(v) for budget in (before, now))
    if (len(old) == 1) != (len(new) == 1):
        raise UserError(f"{folder}: budget.{kinds[0]} is {before[kinds[0]]}; one budget stays one; {way_out}")
    if len(old) == 1 and new[0] < old[0]:
        raise UserError(f"{folder}: budget.{kinds[0]} {new[0]:.6g} is smaller than {old[0]:.6g}, its own; {way_out}")
    added = [total for total in new if total not in old]
    if len(old) > 1 and (set(old) - set(new) or min(added) < old[-1]):
        raise UserError(
            f"{folder}: its trunk stands where the branch of {old[-1]:.6g} left, so new budgets must be larger, and "
            f"the old ones ({old}) stay in the list. For a smaller one: start_from={folder}/branches/BUDGET "
            "start_from.take=run start_from.step=STEP in a new run_dir"
        )
    return Growth(kinds[0], old, new)


def _extend_trunk(settings: ExperimentSettings) -> str:
    _cut_metrics(settings.run_dir / METRICS, None)
    return "the trunk goes on to its new branches"


def _extend_run(settings: ExperimentSettings, before: dict[str, Any], growth: Growth) -> str:
    folder = settings.run_dir
    steps = committed(folder / "checkpoints")
    cooled = [path for step, path in steps if not _on_plateau(path, step, settings, growth)]
    if not cooled and (last_line(folder / METRICS) or {}).get("event") not in ENDED:
        return "its cool-down had not begun, it goes on from where it stands"
    plateau = [(step, path) for step, path in steps if path not in cooled]
    if not plateau:
        raise UserError(
            f"{folder}: the checkpoint at the beginning of its cool-down is gone, and nothing else serves a larger "
            f"budget. Go on with a new schedule: start_from={folder} start_from.take=optimizer run_dir=NEW"
        )
    step = plateau[-1][0]
    kept = folder / "branches" / _label(growth)
    _keep_ending(folder, kept, before, cooled or [plateau[-1][1]])
    for path in cooled:
        remove(path)
    for name in ("final", "tracker"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "evaluation.json").unlink(missing_ok=True)
    _cut_metrics(folder / METRICS, step)
    _note(folder, {"budget": growth.before[-1], "step": step, "kept_as": str(kept.relative_to(folder))})
    return f"it goes on from step {step}, where its cool-down began; its old ending is kept as {kept}"


def _on_plateau(path: Path, step: int, settings: ExperimentSettings, growth: Growth) -> bool:
    """Whether no step before this checkpoint was part of a cool-down."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if "cooldown_step" in state:
        return state["cooldown_step"] is None or step <= state["cooldown_step"]
    spent = state["run"][growth.kind if growth.kind != "steps" else "step"]
    return bool(spent < (1 - settings.schedule.decay_share) * growth.before[-1])


def _label(growth: Growth) -> str:
    label = f"{growth.before[-1]:.6g}".replace("+", "")
    return label if growth.kind == "flops" else f"{label}-{growth.kind}"


def _keep_ending(folder: Path, kept: Path, before: dict[str, Any], checkpoints: Sequence[Path]) -> None:
    """The run as it ended, as a run directory of its own. Files are linked where the file system can."""
    if kept.exists():
        return  # by an earlier attempt
    partial = kept.with_name(f"{kept.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in (METRICS, "evaluation.json"):
        if (folder / name).exists():
            shutil.copy2(folder / name, partial / name)
    for path in [folder / "final", folder / "tracker", *checkpoints]:
        if path.exists():
            shutil.copytree(path, partial / path.relative_to(folder), copy_function=_link)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    name = f"{facts['name']}-{kept.name}"
    warmup = {**before["schedule"], "warmup_steps": facts["budget"]["warmup_steps"]}
    config = before | {"name": name, "run_dir": str(kept), "schedule": warmup}
    _write(partial / "run.json", json.dumps(facts | {"name": name}, indent=1) + "\n")
    _write(partial / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    partial.rename(kept)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _cut_metrics(path: Path, last_step: int | None) -> None:
    """Leave the lines up to `last_step` (None: all) that do not say that the run has ended."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        line = json.loads(text)
        if line.get("event") not in ENDED and (last_step is None or line["step"] <= last_step):
            kept.append(text)
    _write(path, "".join(kept))


def _note(folder: Path, extension: dict[str, Any]) -> None:
    """Add to run.json what was extended, once."""
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    extensions = facts.setdefault("extensions", [])
    if extension not in extensions:
        extensions.append(extension)
        _write(folder / "run.json", json.dumps(facts, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
