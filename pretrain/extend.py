"""A larger budget for a run that has been trained: the same command with a larger `budget` goes on beyond the end.

A run on a plateau does not depend on its budget, so what was trained up to the beginning of the cool-down stands for
the larger budget too. The checkpoint made there is kept for good; the run goes back to it, and what came after it, the
cool-down with its metrics and its final model, becomes a branch in `branches/`: no figure is lost. A trunk of several
budgets grows by a branch for each new one; one whose place the trunk has passed begins at a checkpoint before it.

The result is, bit for bit, that of a run which had the larger budget from its beginning and the same warm-up in steps
(the old run's is kept), on the same ranks; the points of validation before the cool-down are the old budget's. A
mixture whose weights change at shares of the budget is the exception: what was handed out before stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data_prep.settings import UserError, read_yaml
from pretrain import run_folder
from pretrain.checkpoint import MARKER, Marker, committed, folder_of, remove
from pretrain.config import ExperimentSettings, differing_keys, noted_changes, refusal
from pretrain.metrics import METRICS, good_lines, last_line
from pretrain.plan import branch_settings

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
    growth = _growth(settings, before["budget"], now["budget"])
    told = _extend_trunk(settings, growth) if len(growth.before) > 1 else _extend_run(settings, before, growth)
    run_folder.note_changes(settings.run_dir, noted_changes(before, now))
    _write(path, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
    return f"budget.{growth.kind} grew from {_listed(growth.before)} to {_listed(growth.now)}; {told}"


def refuse_unless_grown(settings: ExperimentSettings, before: dict[str, Any]) -> None:
    """Refuse a run directory of the configuration `before`, unless these settings are the same with a larger budget.

    Changes nothing. Raises UserError as `grow` and the run would, but for checkpoints that are missing.
    """
    now = settings.model_dump(mode="json")
    keys = differing_keys(before, now)
    if [key for key in keys if not key.startswith("budget.")]:
        raise UserError(refusal(settings.run_dir, keys))
    if keys:
        _growth(settings, before["budget"], now["budget"])


def _listed(totals: Sequence[int]) -> str:
    return ", ".join(f"{total:.6g}" for total in totals)


def _growth(settings: ExperimentSettings, before: dict[str, Any], now: dict[str, Any]) -> Growth:
    folder = settings.run_dir
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
    if len(old) > 1 and (gone := sorted(set(old) - set(new))):
        raise UserError(f"{folder}: the budgets of its branches stay in the list; {_listed(gone)} are missing")
    if settings.schedule.kind == "cosine":
        raise UserError(
            f"{folder}: a cosine depends on its budget from the end of its warm-up on, so no part of this run serves a "
            "larger one. Train anew in another run_dir, or go on with a new schedule: "
            f"start_from={folder} start_from.take=optimizer run_dir=NEW"
        )
    return Growth(kinds[0], old, new)


def _extend_trunk(settings: ExperimentSettings, growth: Growth) -> str:
    folder, told = settings.run_dir, []
    trunk = committed(folder / "checkpoints")
    stands = _spent(trunk[-1][1], growth) if trunk else 0
    passed = [
        budget for budget in growth.now if budget not in growth.before and not _before_cooling(settings, stands, budget)
    ]
    bases = [(budget, _base(settings, trunk, budget, growth)) for budget in passed]  # refused before anything is made
    for budget, (step, path) in bases:
        _begin_branch(settings, budget, step, path)
        told.append(f"the branch of {budget:.6g} goes on from step {step}, {path}")
    if growth.now[-1] > growth.before[-1]:
        _cut_metrics(folder / METRICS, None)
        told.append("the trunk goes on to its new branches")
    return "; ".join(told) or "the trunk has not come to its new branches yet"


def _before_cooling(settings: ExperimentSettings, spent: int, budget: int) -> bool:
    """Whether a run that has spent so much is before the cool-down of this budget."""
    return spent / budget < 1 - settings.schedule.decay_share


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _spent(checkpoint: Path, growth: Growth) -> int:
    """What of the budget a run had spent at a checkpoint."""
    return int(_state(checkpoint)["run"][growth.kind if growth.kind != "steps" else "step"])


def _base(
    settings: ExperimentSettings, trunk: Sequence[tuple[int, Path]], budget: int, growth: Growth
) -> tuple[int, Path]:
    """(step, folder) of the last checkpoint before the cool-down of `budget`: the trunk's, or a branch's."""
    folder, plateau = settings.run_dir, list(trunk)
    for root in sorted((folder / "branches").glob("*/checkpoints")):
        for step, path in committed(root):
            if "cooldown_step" in _state(path) and _on_plateau(path, step, settings, growth):
                plateau.append((step, path))
    found = [(step, path) for step, path in plateau if _before_cooling(settings, _spent(path, growth), budget)]
    if not found:
        there = ", ".join(str(step) for step, _ in sorted(plateau)) or "none"
        place = (1 - settings.schedule.decay_share) * budget
        raise UserError(
            f"{folder}: the branch of {budget:.6g} FLOPs leaves the trunk at {place:.6g}, and no checkpoint before "
            f"that is left (steps of the plateau that are: {there}; checkpoint.milestone_every keeps more). Give "
            f"another budget, or train it by itself in a new run_dir; or, from the run as it is, with a new schedule: "
            f"start_from={folder} start_from.take=optimizer run_dir=NEW"
        )
    return max(found, key=lambda item: item[0])


def _begin_branch(settings: ExperimentSettings, budget: int, step: int, base: Path) -> None:
    """A branch's directory as if it had been trained by itself up to `step`, whose checkpoint is `base`."""
    warmup = begun_warmup(settings.run_dir)
    assert warmup is not None  # a run with checkpoints has its run.json
    branch = branch_settings(settings, budget, warmup)
    if branch.run_dir.exists():
        return  # by an earlier attempt
    partial = branch.run_dir.with_name(f"{branch.run_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint = folder_of(partial / "checkpoints", step)
    shutil.copytree(base, checkpoint, copy_function=_link)
    content = json.dumps(_state(base) | {"tracker_id": None, "cooldown_step": None}, indent=1)
    _write(checkpoint / "state.json", content)  # in place of the link
    marker = Marker.read(base)
    entry = (len(content.encode()), hashlib.sha256(content.encode()).hexdigest())
    (checkpoint / MARKER).unlink()
    replace(marker, files=marker.files | {"state.json": entry}).write(checkpoint)
    kept = [text for text, line in good_lines(base.parent.parent / METRICS) if line["step"] <= step]
    _write(partial / METRICS, "".join(kept))
    config = branch.model_dump(mode="json")
    _write(partial / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    partial.rename(branch.run_dir)


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
    state = _state(path)
    if "cooldown_step" in state:
        return state["cooldown_step"] is None or step <= state["cooldown_step"]
    return _before_cooling(settings, _spent(path, growth), growth.before[-1])


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
    kept = [
        text
        for text, line in good_lines(path)
        if line.get("event") not in ENDED and (last_step is None or line["step"] <= last_step)
    ]
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
