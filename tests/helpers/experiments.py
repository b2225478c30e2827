"""Whole training runs in this process: tiny models on a tiny corpus, seconds each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.settings import build, merge
from pretrain.config import ExperimentSettings
from pretrain.energy import EnergyMeter
from pretrain.parallel.start import start_parallel
from pretrain.trainer import Trainer
from tests.helpers.variants import EXIT, EXPERT, MOD, RECURSIVE, TOKEN, UT

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ROUTED = {
    "vanilla": TINY,
    "recursive": TINY | RECURSIVE,
    "mor_expert": TINY | EXPERT,
    "mor_token": TINY | TOKEN,
    "mod": TINY | MOD,
    "ut": TINY | UT | {"act_combine": "frozen"},
    "early_exit": TINY | EXIT | {"num_hidden_layers": 5, "exit_rotation": 2, "exit_threshold": 0.01},
}


def settings_for(run_dir: Path, data: Path, architecture: str = "mor_expert", **changes: Any) -> ExperimentSettings:
    """Settings of a tiny run of 8 steps; `changes` are merged into them.

    Under fsdp2 every layer is a unit, as tiny ones are only where that is asked for.
    """
    values: dict[str, Any] = {
        "name": architecture,
        "run_dir": run_dir,
        "model": ROUTED[architecture],
        "data": {"folder": data},
        "budget": {"steps": 8},
        "batch": {"size": 4, "micro_size": 4},
        "precision": "fp32",
        "evaluation": {"times": 0, "sequences": 4},
        "tracker": {"mode": "disabled"},
        "checkpoint": {"asynchronous": False},
    }
    if changes.get("parallel", {}).get("strategy") == "fsdp2":
        values["parallel"] = {"min_unit_parameters": 0}
    return build(ExperimentSettings, merge(values, changes), "test")


def trainer_for(settings: ExperimentSettings, energy: EnergyMeter | None = None) -> Trainer:
    """A trainer on one process."""
    parallel = start_parallel(settings.parallel, settings.precision, settings.seed)
    return Trainer(settings, settings.data.read(), parallel, energy)


def train(settings: ExperimentSettings) -> list[dict[str, Any]]:
    """Train to the end; returns the lines of metrics.jsonl."""
    assert trainer_for(settings).run() == 0
    return read_lines(settings.run_dir)


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def figures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what the clock and the machine decide."""
    clock = {"seconds", "joules", "tokens_per_second", "memory_bytes", "mfu", "slowest_rank"}
    return [{k: v for k, v in line.items() if k not in clock and not k.endswith("_seconds")} for line in lines]
