"""What a step costs beyond its arithmetic: loader and bookkeeping, FSDP2 against DDP on two ranks, and a resume.

    python -m tests.benchmarks.bench_step [--rounds 5] [--steps 20]

Rounds are interleaved and medians compared, so that a busy machine slows all alike. The model is the CPU comparison's
expert-choice model with its batch, the data are random tokens. Exit code 1 where a bar is missed.

    bookkeeping  a step of the trainer (data, sums, line of metrics, clock) against forward, backward and update of the
                 same model on a batch at hand, in turn; bar: 2% more
    strategies   a step of the trainer on two ranks of one core each; bar: FSDP2 at most 1.1 times DDP
    resume       from the start of `pretrain/main.py` to its first new line of metrics; bar: 10 s
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from data_prep.settings import merge, read_yaml
from pretrain import run_folder
from pretrain.config import ExperimentSettings
from pretrain.plan import RunState
from pretrain.trainer import Trainer
from tests.benchmarks.bench_loader import write_random_folder
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import read_lines, trainer_for

ROOT = Path(__file__).resolve().parents[2]
BOOKKEEPING, STRATEGIES, RESUME_SECONDS = 0.02, 1.1, 10.0
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2_keep": {"strategy": "fsdp2", "reshard_after_forward": False},
}


def settings_for(run_dir: Path, data: Path, steps: int, **changes: Any) -> ExperimentSettings:
    """The CPU comparison's settings on other data, for so many steps."""
    values = read_yaml(ROOT / "configs" / "experiment" / "compare_cpu.yaml") | {"budget": {"steps": steps}}
    values["data"] = {"folder": str(data)}
    values |= {"run_dir": str(run_dir), "tracker": {"mode": "disabled"}, "evaluation": {"times": 0, "sequences": 8}}
    values["model"] = read_yaml(ROOT / "configs" / "model" / "cpu_mor_expert_nr3.yaml")
    return ExperimentSettings.model_validate(merge(values, changes))


def open_trainer(settings: ExperimentSettings) -> Trainer:
    """A trainer whose steps are taken by hand."""
    trainer = trainer_for(settings)
    trainer.plan = trainer.plans[0]
    trainer.stop = type("NoStop", (), {"requested": False})()
    if trainer.parallel.is_main:
        run_folder.claim(settings)
    trainer.parallel.barrier()
    trainer.open_run()
    return trainer


def whole_step(trainer: Trainer) -> None:
    before = RunState(**vars(trainer.state))
    trainer.after_step(before, trainer.training_step())


def bare_step(trainer: Trainer, batch: list[Any]) -> None:
    """What no trainer can do without, on a batch at hand."""
    for micro in batch:
        output = trainer.parallel.forward(
            input_ids=micro.input_ids,
            targets=micro.targets,
            document_ids=micro.document_ids,
            num_items_in_batch=trainer.tokens_per_step,
        )
        output.loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.parallel.optimizer.step()
    trainer.parallel.optimizer.zero_grad()


def bookkeeping(folder: Path, data: Path, steps: int) -> tuple[float, float]:
    """Median seconds of (a trainer's step, a bare step)."""
    torch.set_num_threads(1)
    trainer = open_trainer(settings_for(folder / "bookkeeping", data, 4 * steps))
    batch = list(next(trainer.loader))
    taken: dict[str, list[float]] = {"whole": [], "bare": []}
    for number in range(2 * steps):
        for kind in ("whole", "bare") if number % 2 else ("bare", "whole"):
            started = time.perf_counter()
            whole_step(trainer) if kind == "whole" else bare_step(trainer, batch)
            taken[kind].append(time.perf_counter() - started)
    trainer.loader.close()
    return statistics.median(taken["whole"][2:]), statistics.median(taken["bare"][2:])


def step_seconds(run_dir: Path, data: Path, steps: int, parallel: dict[str, Any]) -> float:
    """Median seconds of a step, as one of two ranks."""
    settings = settings_for(run_dir, data, steps + 2, parallel=parallel, batch={"micro_size": 4})
    trainer = open_trainer(settings)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        whole_step(trainer)
        seconds.append(time.perf_counter() - started)
    trainer.loader.close()
    trainer.parallel.finish()
    return statistics.median(seconds[2:])


def strategies(folder: Path, data: Path, rounds: int, steps: int) -> dict[str, float]:
    """Median over the rounds of each strategy's seconds a step on two ranks."""
    found: dict[str, list[float]] = {name: [] for name in KINDS}
    for number in range(rounds):
        for name, parallel in KINDS.items():
            run_dir = folder / f"{name}-{number}"
            found[name].append(max(run_ranks(step_seconds, 2, run_dir, data, steps, parallel)))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def resume(folder: Path, data: Path, rounds: int) -> float:
    """Median seconds from starting a run again to its first new line of metrics."""
    settings = settings_for(folder / "resume", data, 3 + 2 * rounds, checkpoint={"every_steps": 1, "keep": 1})
    config = folder / "resume.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "pretrain/main.py", "--config", str(config)]
    seconds = []
    for number in range(rounds + 1):
        lines = len(read_lines(settings.run_dir)) if number else 0
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        metrics = settings.run_dir / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") <= lines):
            time.sleep(0.01)
        seconds.append(time.perf_counter() - started)
        process.kill()
        process.wait()
    return statistics.median(seconds[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="launches of each strategy, and resumes")
    parser.add_argument("--steps", type=int, default=20, help="steps that a median is taken of")
    arguments = parser.parse_args()
    table = Table("what", "found", "bar", title="costs of a step")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_random_folder(folder / "data", 256, 2_000_000)
        whole, bare = bookkeeping(folder, data, arguments.steps)
        table.add_row("loader and bookkeeping", f"{whole / bare - 1:.1%} of {bare * 1e3:.0f} ms", f"{BOOKKEEPING:.0%}")
        steps = strategies(folder, data, arguments.rounds, arguments.steps)
        ratios = {name: seconds / steps["ddp"] for name, seconds in steps.items()}
        for name in ("fsdp2", "fsdp2_keep"):
            found = f"{ratios[name]:.3f} of {steps['ddp'] * 1e3:.0f} ms"
            table.add_row(f"{name} over ddp, two ranks", found, f"{STRATEGIES}" if name == "fsdp2" else "")
        again = resume(folder, data, arguments.rounds)
        table.add_row("resume to first step", f"{again:.1f} s", f"{RESUME_SECONDS:.0f} s")
    Console().print(table)
    return int(whole / bare - 1 > BOOKKEEPING or ratios["fsdp2"] > STRATEGIES or again > RESUME_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main())
