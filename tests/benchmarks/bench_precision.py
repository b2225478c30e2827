"""Does `precision: auto` take the faster one? Training steps in each fixed precision and in what `auto` stands for.

    python -m tests.benchmarks.bench_precision [--rows 1] [--rounds 7] [--json FILE]

The models are those of `make compare` (configs/model/cpu_*.yaml, vocabulary 4,096) at sequences of 256 tokens; a step
is forward and backward. Rounds are interleaved, each with one step of every precision, so that what else the machine
does hits all alike; figures are medians over rounds, ratios are medians of the ratios of one round. bf16 is pinned here
on purpose, so the batch stays small: on a CPU that does not multiply it a step takes many times as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.settings import read_yaml
from model.config import MoRConfig
from model.hardware import DTYPES, PRECISIONS, Precision, auto_precision, describe, device_here
from model.modeling import MoRForCausalLM

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("cpu_vanilla", "cpu_mor_expert_nr3", "cpu_mor_token_nr3")
LENGTH, VOCABULARY = 256, 4096


def make_step(name: str, rows: int, device: torch.device) -> Callable[[Precision], None]:
    """A step of one model in a given precision."""
    torch.manual_seed(0)
    fields = read_yaml(ROOT / "configs" / "model" / f"{name}.yaml")
    config = MoRConfig(**fields | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH})
    model = MoRForCausalLM(config).to(device).train()
    batch = torch.randint(0, VOCABULARY, (rows, LENGTH), device=device)

    def step(precision: Precision) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, DTYPES["bf16"], enabled=precision == "bf16"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        loss.item()  # waits for the accelerator

    return step


def measure(name: str, rows: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step of one model by precision, and how long each takes for what `auto` takes."""
    step, auto = make_step(name, rows, device), auto_precision(device)[0]
    kinds: dict[str, Precision] = {"auto": auto} | {precision: precision for precision in PRECISIONS}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, precision in kinds.items():
            started = time.perf_counter()
            step(precision)
            if number:  # the first round warms up
                seconds[kind].append(time.perf_counter() - started)
    ratios = {
        kind: statistics.median(one / own for one, own in zip(seconds[kind], seconds["auto"], strict=True))
        for kind in PRECISIONS
    }
    return {
        "model": name,
        "auto": auto,
        "seconds": {kind: statistics.median(values) for kind, values in seconds.items()},
        "over_auto": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1, help="sequences of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    device, console = device_here(), Console(width=120)
    table = Table(
        title=f"{describe(device)}, {torch.get_num_threads()} threads, {options.rows} x {LENGTH} tokens a step"
    )
    for column in ("model", "auto is", "auto, s", "fp32, s", "bf16, s", "fp32 / auto", "bf16 / auto"):
        table.add_column(column, justify="left" if column == "model" else "right")
    results = [measure(name, options.rows, options.rounds, device) for name in MODELS]
    for row in results:
        times = [f"{row['seconds'][kind]:.3f}" for kind in ("auto", "fp32", "bf16")]
        table.add_row(row["model"], row["auto"], *times, *(f"{row['over_auto'][kind]:.2f}" for kind in PRECISIONS))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"device": describe(device), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
