"""Steps of today's models, before and after: this checkout and another one of this repository, step by step in turn.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_before.py FOLDER [--rounds 9] [--json FILE]

FOLDER is the other checkout (`git worktree add FOLDER COMMIT`), whose models a process of its own builds from that
checkout's code alone. A round runs one forward and backward pass of each model on either side, in an order that turns
with every round, by CPU time, so that what else the machine does hits both alike; a ratio is the median over rounds of
this side's seconds divided by the other's. Peaks are all that a step holds (weights, gradients, activations).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.bench_model import Stepped

ROOT = Path(__file__).resolve().parents[2]
# What a side runs: its checkout's own models and steps, and those of `bench_model` that this side knows by name.
WORKER = """
import json, sys, time
import torch
from tests.benchmarks.bench_model import CPU_BASE, make_step, peak_bytes, timed, variants
from model.modeling import MoRForCausalLM

rows, length, dtype = json.loads(sys.argv[1])
torch.manual_seed(0)
batch, steps, peaks = torch.randint(1, CPU_BASE["vocab_size"], (rows, length)), {}, {}
for name, config in variants(CPU_BASE, False).items():
    torch.manual_seed(0)
    model = MoRForCausalLM(config).train()
    steps[name] = make_step(model, batch, None, dtype)
    loss = [steps[name]() for _ in range(2)][-1].loss.item()
    peaks[name] = {"peak": peak_bytes(steps[name], model, "cpu"), "loss": loss}
print(json.dumps(peaks), flush=True)
for line in sys.stdin:
    print(timed(steps[line.strip()], "cpu", time.process_time), flush=True)
"""


def side_of(folder: Path, shape: tuple[int, int, str]) -> Stepped:
    """The models of a checkout: CPU seconds of their steps, peak and loss of each."""
    command = [sys.executable, "-c", WORKER, json.dumps(shape)]
    return Stepped(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)})


def measure(before: Path, rounds: int, shape: tuple[int, int, str]) -> list[dict[str, Any]]:
    """A row for each model that both sides have."""
    sides = {"before": side_of(before, shape), "after": side_of(ROOT, shape)}
    names = [name for name in sides["after"].described if name in sides["before"].described]
    seconds: dict[str, dict[str, list[float]]] = {name: {side: [] for side in sides} for name in names}
    for place in range(rounds):
        for name in names:
            for side in list(sides)[:: 1 if place % 2 else -1]:
                seconds[name][side].append(sides[side].step(name))
    rows = []
    for name, done in seconds.items():
        pairs = sorted(after / before for before, after in zip(done["before"], done["after"], strict=True))
        peaks = {side: sides[side].described[name] for side in sides}
        row = {"name": name, "seconds": done, "ratio": statistics.median(pairs), "ratios": pairs}
        row["losses"] = {side: found["loss"] for side, found in peaks.items()}
        rows.append(row | {"peaks": {side: found["peak"] for side, found in peaks.items()}})
    for side in sides.values():
        side.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=1, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="precision of autocast")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args()
    rows = measure(options.before.resolve(), options.rounds, (options.rows, options.length, options.dtype))
    table = Table(title=f"{options.rows} x {options.length} tokens, {options.dtype}, {options.rounds} rounds, CPU time")
    for column in ("model", "before ms", "after ms", "after / before", "middle half", "peak MiB", "after", "losses"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        ratios, peaks = row["ratios"], row["peaks"]
        quarter = len(ratios) // 4
        table.add_row(
            row["name"],
            *(f"{statistics.median(row['seconds'][side]) * 1e3:.0f}" for side in ("before", "after")),
            f"{row['ratio']:.3f}",
            f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}",
            f"{peaks['before'] / 2**20:.0f}",
            f"{peaks['after'] / 2**20:.0f} ({peaks['after'] / peaks['before']:.3f})",
            ", ".join(f"{row['losses'][side]:.4f}" for side in ("before", "after")),
        )
    Console(width=140).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
