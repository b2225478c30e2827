"""What a run writes into its directory besides metrics and checkpoints: config.yaml, run.json and last_checkpoint (it
outlives them). And what is set aside where a run begins anew. Rank 0 only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.settings import UserError, read_yaml
from model.config import MoRConfig
from model.flops import effective_parameters, unique_parameters
from pretrain.checkpoint import committed
from pretrain.config import ExperimentSettings, differing_keys, noted_changes, refusal
from pretrain.data import bigram_loss
from pretrain.lock import LOCK, owner_of
from pretrain.manifest import Manifest, Mixture
from pretrain.metrics import METRICS, last_step
from pretrain.parallel.strategy import Parallel
from pretrain.parent import describe_parent

LAST_CHECKPOINT = "last_checkpoint"
ASIDE = "before"  # folder of what was there before a run began anew
HISTORY = ("parent", "extensions", "changes")  # keys of run.json that a run which goes on keeps
ROOT = Path(__file__).resolve().parents[1]
# Sources that decide a run's figures; reports, launchers and generation do not.
CODE = ("model/*.py", "model/attention/*.py", "model/convert/uptrain.py", "model/depth/*.py", "pretrain/parallel/*.py")
CODE_HERE = ("config", "data", "manifest", "mixture", "plan", "precision", "schedule", "trainer", "validation")
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers")


def claim(settings: ExperimentSettings) -> None:
    """Write config.yaml, or hold an earlier one against `settings`. Raises UserError if the run is another one."""
    folder = settings.run_dir
    path = folder / "config.yaml"
    resolved = settings.model_dump(mode="json")
    if path.exists():
        before = read_yaml(path)
        keys = differing_keys(before, resolved)
        if keys:
            raise UserError(refusal(folder, keys))
        note_changes(folder, noted_changes(before, resolved))
    elif folder.exists() and any(path.name.split(".")[0] != LOCK and path.name != ASIDE for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no run (no config.yaml); give another run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))


def note_changes(folder: Path, changes: dict[str, list[Any]]) -> None:
    """Write into run.json after which step settings of a run were changed."""
    path = folder / "run.json"
    if not changes or not path.exists():
        return
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts.setdefault("changes", []).append({"after_step": last_step(folder / METRICS), "keys": changes})
    _write(path, json.dumps(facts, indent=1) + "\n")


def note_checkpoint(folder: Path, step: int) -> None:
    """Write down that a checkpoint of `step` is whole, outside the folder of the checkpoints."""
    _write(folder / LAST_CHECKPOINT, f"{step}\n")


def check_history(folder: Path) -> None:
    """No checkpoint is usable: refuse if there were any, for what was trained would be lost.

    Raises UserError that names what is missing. Metrics of a run that had not come to its first checkpoint are kept.
    """
    steps, noted, checkpoints = last_step(folder / METRICS), folder / LAST_CHECKPOINT, folder / "checkpoints"
    damaged = sorted(path.name for path in checkpoints.glob("step-*.damaged*"))
    if not steps:
        return
    if not (noted.exists() or damaged):
        aside = set_aside(folder, [METRICS])
        print(
            f"{folder}: ended after step {steps}, before its first checkpoint; begins anew, its metrics are in {aside}"
        )
        return
    missing = f"step-{int(noted.read_text(encoding='utf-8')):08d}" if noted.exists() else "every checkpoint"
    there = f"damaged: {', '.join(damaged)}" if damaged else f"nothing usable in {checkpoints}"
    raise UserError(
        f"{folder}: {METRICS} holds {steps} steps, but the checkpoint to go on from ({missing}) is missing ({there}). "
        f"Restore it, or add --restart to begin anew; what is here is then kept in {folder / ASIDE}"
    )


def set_aside(folder: Path, names: list[str] | None = None) -> Path:
    """Move what a run has written (or `names` of it) into a new folder within `folder`; returns that folder."""
    number = 1
    while (aside := folder / ASIDE / str(number)).exists():
        number += 1
    partial = aside.with_name(f"{number}.partial")  # an earlier attempt may have been cut short: it is completed
    own = [path for path in folder.iterdir() if path.name != ASIDE and path.name.split(".")[0] != LOCK]
    chosen = [path for path in own if names is None or path.name in names]
    if names is None and own and not (folder / "config.yaml").exists() and not partial.exists():
        raise UserError(f"{folder}: is not empty and holds no run (no config.yaml); give another run_dir")
    if chosen:
        partial.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        path.rename(partial / path.name)
    if partial.exists():
        partial.rename(aside)
    return aside


def set_aside_by_half(folder: Path) -> bool:
    """Whether an earlier beginning anew was cut short: what is left is of the old run."""
    return any((folder / ASIDE).glob("*.partial"))


def describe_run(
    settings: ExperimentSettings,
    config: MoRConfig,
    manifest: Manifest,
    plan: dict[str, int],
    parallel: Parallel,
    energy: str | None = None,
) -> None:
    """Write run.json: what is fixed for the whole run, with `plan` added to its budget.

    energy: whose joules are counted, in words; None where none are.
    Raises UserError if the run has been trained on other data.
    """
    path = settings.run_dir / "run.json"
    before: dict[str, Any] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["data_fingerprint"] != manifest.fingerprint:
            raise UserError(
                f"{manifest.folder}: not the data that {settings.run_dir} was trained on: fingerprint "
                f"{manifest.fingerprint}, the run's {before['data_fingerprint']}; restore it or give another run_dir"
            )
    facts = {
        "name": settings.name,
        "architecture": config.architecture,
        "seed": settings.seed,
        "unique_parameters": unique_parameters(config),
        "effective_parameters": effective_parameters(config),
        "precision": settings.precision,
        "convention": settings.budget.convention,
        "attention": "causal work; document boundaries ignored",
        "corpus": manifest.corpus,
        "licence": manifest.licence,
        "data_fingerprint": manifest.fingerprint,
        **({"mixture": manifest.describe()} if isinstance(manifest, Mixture) else {}),
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "vocab_size": manifest.vocab_size,
        "unigram_loss": manifest.unigram_loss,
        "bigram_loss": before["bigram_loss"] if "bigram_loss" in before else bigram_loss(manifest),
        "document_masking": settings.data.document_masking,
        "sequence_length": manifest.sequence_length,
        "batch_size": settings.batch.size,
        "budget": {**settings.budget.model_dump(mode="json", exclude_none=True), **plan},
        "model": config.to_dict(),
        "versions": versions(),
        "code": list(dict.fromkeys([*before.get("code", []), code_version()])),
        "settings": {
            "optimizer": settings.optimizer.model_dump(mode="json"),
            "schedule": settings.schedule.model_dump(mode="json"),
            "data": {"order_seed": settings.data.order_seed},
        },
        "device": _device_name(parallel),
        **({"energy": energy} if energy else {}),
        **{key: before[key] for key in HISTORY if key in before},
    }
    if settings.start_from is not None and (parent := _known_parent(settings.run_dir, before)) is not None:
        facts["parent"] = parent
    elif settings.start_from is not None:
        facts["parent"] = describe_parent(settings, config, manifest)
    _write(path, json.dumps(facts, indent=1) + "\n")


def _known_parent(folder: Path, before: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the run's parent: by its run.json, of a branch by its trunk's; None where it must be looked up.

    That is also so where the checkpoint that was to be taken is gone before it was.
    """
    above = owner_of(folder) / "run.json"
    if "parent" not in before and above.is_file() and owner_of(folder) != folder:
        before = json.loads(above.read_text(encoding="utf-8"))
    parent = before.get("parent")
    if parent is None or not (committed(folder / "checkpoints") or Path(parent["folder"]).is_dir()):
        return None
    return parent


def versions() -> dict[str, str]:
    """Versions of the packages that a run's figures depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def code_version() -> str:
    """A fingerprint of the sources that decide a run's figures: equal for equal sources, with or without git."""
    found = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    found += [ROOT / "pretrain" / f"{name}.py" for name in CODE_HERE]
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _device_name(parallel: Parallel) -> str:
    if parallel.device.type == "cuda":
        return f"{parallel.world_size} x {torch.cuda.get_device_name(parallel.device)}"
    return f"{parallel.world_size} x cpu, {torch.get_num_threads()} threads each"


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
