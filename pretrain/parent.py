"""A run that starts from another one (`start_from`): which checkpoint, what is taken from it, and what run.json says.

    take: weights     the model alone; step, schedule, budget and data begin anew
    take: optimizer   AdamW's moments and its step too; the rest begins anew
    take: run         all of it: this run is the parent up to that step, its FLOPs and metrics included, and goes on
                      with settings of its own. How one goes back before a loss spike.

Any strategy and number of ranks starts from any other. A run saves a checkpoint of its own before its first step, after
which it needs the parent no more.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.settings import UserError
from model.config import MoRConfig
from pretrain.checkpoint import MARKER, Checkpoints, committed, folder_of, read_tensors, verify
from pretrain.config import ExperimentSettings, StartSettings
from pretrain.manifest import Manifest, Mixture
from pretrain.metrics import METRICS, good_lines
from pretrain.parallel.strategy import Parallel

OWN = "model.depth."  # what decides a token's depth: a routed model has it, a recursive one has not
# What decides which layer a tensor belongs to: two models of equal shapes are told apart by it.
LAYOUT = ("num_hidden_layers", "num_recursions", "sharing", "share_norms")


@dataclass(frozen=True)
class Parent:
    """What a run starts from. folder: a checkpoint, or a `from_pretrained` folder. run: its run directory, if any."""

    folder: Path
    run: Path | None

    @property
    def is_checkpoint(self) -> bool:
        return (self.folder / MARKER).is_file()

    @property
    def state(self) -> dict[str, Any]:
        """What the trainer kept in the checkpoint."""
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))

    @property
    def facts(self) -> dict[str, Any]:
        """run.json of the run that it belongs to; empty for a model alone."""
        return {} if self.run is None else json.loads((self.run / "run.json").read_text(encoding="utf-8"))


def find_parent(start: StartSettings, run_dir: Path) -> Parent:
    """The checkpoint that `start_from` names. Raises UserError that says what is there."""
    path = start.path.resolve()
    if path.is_relative_to(run_dir.resolve()):
        raise UserError(f"start_from.path: {start.path} lies in run_dir {run_dir}; give another run_dir")
    if not path.is_dir():
        raise UserError(f"start_from.path: {start.path} is no folder")
    run = next((p for p in (path, path.parent, path.parent.parent) if (p / "run.json").is_file()), None)
    if path != run:
        if start.step is not None:
            raise UserError(f"start_from.step: belongs to a run directory, and {start.path} is one model; leave it out")
        if not ((path / MARKER).is_file() or (path / "config.json").is_file()):
            raise UserError(f"start_from.path: {start.path} is no run, no checkpoint and no exported model")
        return _checked(Parent(path, run), start)
    steps = committed(path / "checkpoints")
    there = ", ".join(str(step) for step, _ in steps) or "none"
    if start.step is not None:
        folder = folder_of(path / "checkpoints", start.step)
        if not (folder / MARKER).is_file():
            raise UserError(
                f"start_from.step: {start.path} has no checkpoint of step {start.step}; it has: {there} "
                "(checkpoint.milestone_every keeps more)"
            )
        return _checked(Parent(folder, path), start)
    if steps:
        return _checked(Parent(steps[-1][1], path), start)
    if (path / "final" / "config.json").is_file():
        return _checked(Parent(path / "final", path), start)
    raise UserError(f"start_from.path: {start.path} has no checkpoint and no final model yet")


def _checked(parent: Parent, start: StartSettings) -> Parent:
    if start.take != "weights" and not parent.is_checkpoint:
        raise UserError(
            f"start_from.take: {parent.folder} is a model alone, it has no {start.take} to take; give take: weights "
            "or a checkpoint"
        )
    return parent


def describe_parent(settings: ExperimentSettings, config: MoRConfig, manifest: Manifest | Mixture) -> dict[str, Any]:
    """What run.json says of the parent: where, which step, what was taken, and the FLOPs that were spent before.

    flops: what the parent had spent at that step, its own parents' included. counted: whether the run's metrics hold
    them. Raises UserError where the parent does not fit the run.
    """
    start = settings.start_from
    assert start is not None
    parent = find_parent(start, settings.run_dir)
    source = MoRConfig.from_json_file(parent.folder / "config.json")
    _check_models(source, config, parent)
    facts, run = parent.facts, parent.state["run"] if parent.is_checkpoint else {}
    if not run and parent.run is not None and (parent.run / METRICS).is_file():
        run = next((line for _, line in reversed(good_lines(parent.run / METRICS))), {})
    if "tokenizer_fingerprint" in facts:
        manifest.check_tokenizer(facts["tokenizer_fingerprint"], f"start_from.path {start.path}")
    convention = facts.get("convention")
    if start.take == "run" and convention != settings.budget.convention:
        raise UserError(
            f"start_from.take: run: the parent counts FLOPs by {convention}, this run by {settings.budget.convention}; "
            "give the parent's budget.convention, or take: optimizer"
        )
    above = facts.get("parent") or {}
    before = above["flops"] if above and not above["counted"] and above["flops"] is not None else 0
    return {
        "path": str(start.path),
        "folder": str(parent.folder),
        "name": facts.get("name"),
        "architecture": source.architecture,
        "step": run.get("step"),
        "tokens": run.get("tokens"),
        "flops": run["flops"] + before if "flops" in run else None,
        "convention": convention,
        "take": start.take,
        "data": start.data_order,
        "skipped_steps": start.skip_steps,
        "counted": start.take == "run",
    }


def _check_models(source: MoRConfig, config: MoRConfig, parent: Parent) -> None:
    """Raise UserError where the parent's weights cannot mean the same in this model."""
    if source.architecture == "vanilla" and config.num_recursions > 1:
        raise UserError(
            f"start_from.path: {parent.folder} is a vanilla model, this run a {config.architecture} one: "
            "initialize_from.folder=MODEL makes the shared layers from an exported vanilla model (a run's final/)"
        )
    for name in LAYOUT:
        here, there = getattr(config, name), getattr(source, name)
        if here != there and (name == "num_hidden_layers" or max(source.num_recursions, config.num_recursions) > 1):
            raise UserError(
                f"start_from.path: {parent.folder} has {name} {there}, this run's model {here}: its layers would not "
                "be the same ones; give the parent's model section, with another routing if wanted"
            )


def take_parent(parallel: Parallel, settings: ExperimentSettings) -> dict[str, Any]:
    """Fill the model, and the optimizer where it is taken, from the parent; returns its trainer's state. Collective."""
    start = settings.start_from
    assert start is not None
    parent = parallel.gather(parallel.on_main("finding the parent", lambda: _noted_parent(start, settings.run_dir)))[0]
    if parent.is_checkpoint:
        with parallel.busy(f"verifying {parent.folder.name}"):
            faults = parallel.gather(verify(parent.folder, parallel.rank, parallel.world_size), background=True)
        if fault := next((f for f in faults if f is not None), None):
            if parallel.gather(not (parent.folder / MARKER).is_file())[0]:
                raise UserError(
                    f"start_from.path: {parent.folder} was removed while it was read, as a run in training does with "
                    "its older ones; the same command again takes its newest, start_from.step a milestone"
                )
            raise UserError(f"start_from.path: {parent.folder} is damaged: {fault}; give another checkpoint")
    if start.take == "weights":
        _take_weights(parallel, parent, settings.run_dir)
        return parent.state if parent.is_checkpoint else {}
    report = print if parallel.is_main else lambda message: None
    return Checkpoints(parent.folder.parent, report=report).load(parallel, parent.folder)


def _noted_parent(start: StartSettings, run_dir: Path) -> Parent:
    """The checkpoint that run.json names, which may no longer be the newest of a run that is being trained."""
    noted = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["parent"]["folder"]
    return find_parent(start.model_copy(update={"path": Path(noted), "step": None}), run_dir)


def _take_weights(parallel: Parallel, parent: Parent, run_dir: Path) -> None:
    """Set every tensor of the model from the parent's. Rank 0 reads and lays them out, every rank takes its part."""
    shapes = {name: tuple(shape) for name, shape in parallel.model_shapes().items()}
    between = run_dir / "start.safetensors"
    parallel.on_main("reading the parent", lambda: _write_weights(parent, shapes, between))
    with parallel.busy("taking the parent's weights"), safe_open(between, framework="pt") as file:
        for name in sorted(file.keys()):
            parallel.set_model_tensor(name, file.get_tensor(name))
    parallel.gather(None, background=True)  # every rank has read it
    if parallel.is_main:
        between.unlink()


def _write_weights(parent: Parent, shapes: dict[str, tuple[int, ...]], target: Path) -> None:
    """Write those tensors of the parent that the model has. Raises UserError where others than routers' differ."""
    tensors = _weights(parent)
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(shapes.keys() | there.keys()):
        if shapes.get(name) == there.get(name):
            continue
        if (name not in shapes or name not in there) and name.startswith(OWN):
            continue  # it begins anew, or is left behind
        raise UserError(
            f"start_from.path: {parent.folder} is of another model: {name} is {there.get(name, 'absent')} there and "
            f"{shapes.get(name, 'absent')} here; give its model section"
        )
    new, left = sorted(shapes.keys() - there.keys()), sorted(there.keys() - shapes.keys())
    if new or left:
        print(f"{parent.folder}: begin anew: {', '.join(new) or 'none'}; left behind: {', '.join(left) or 'none'}")
    partial = target.with_name(f"{target.name}.partial")
    save_file({name: tensors[name].contiguous() for name in shapes if name in tensors}, partial)
    os.replace(partial, target)


def _weights(parent: Parent) -> dict[str, Tensor]:
    if parent.is_checkpoint:
        found = read_tensors(parent.folder)
        return {name.removeprefix("model/"): t for name, t in found.items() if name.startswith("model/")}
    from model.modeling import MoRForCausalLM

    model = MoRForCausalLM.from_pretrained(parent.folder).float()
    persistent = model.state_dict().keys()
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def skipped_samples(start: StartSettings, parent_batch: int, position: int, step: int) -> tuple[int, int] | None:
    """Samples, by their position in the order of the data, that `skip_steps` leaves out; None for none.

    position, step: of the parent's checkpoint. parent_batch: samples of one of its steps. Raises UserError for steps
    that the parent had taken already.
    """
    if start.skip_steps is None:
        return None
    first, last = start.skip_steps
    if first <= step:
        raise UserError(
            f"start_from.skip_steps: {first} to {last}, but the checkpoint stands after step {step} and has seen them; "
            f"start_from.step must be below {first}"
        )
    return position + (first - 1 - step) * parent_batch, position + (last - step) * parent_batch


def copy_metrics(settings: ExperimentSettings, step: int) -> None:
    """Give a run that takes all of its parent the parent's metrics up to `step`, where it has none yet."""
    start, target = settings.start_from, settings.run_dir / METRICS
    if start is None or start.take != "run" or target.exists():
        return
    parent = find_parent(start, settings.run_dir)
    if parent.run is None or not (parent.run / METRICS).is_file():
        return
    kept = []
    for text, line in good_lines(parent.run / METRICS):
        if line["step"] > step:
            break
        if "event" not in line:
            kept.append(text)
    partial = target.with_name(f"{METRICS}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, target)
