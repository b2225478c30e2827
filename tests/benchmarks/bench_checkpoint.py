"""How long training stands still for a checkpoint of 200 MB, saved in the background against saved at once; and resume.

    python tests/benchmarks/bench_checkpoint.py [--megabytes 200] [--rounds 7]

The stall of a save is the time in which training stands still for it: the call, and the update's wait for the copy that
runs beside the next forward and backward pass. How much longer these passes take beside copy and write is shown apart;
on a CPU it depends on whether a core is free for them. Rounds are interleaved and medians reported, so that a busy
machine slows all alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pretrain.checkpoint import Checkpoints
from pretrain.parallel.settings import ParallelSettings
from pretrain.parallel.start import start_parallel
from pretrain.parallel.strategy import Parallel

GOAL = 0.1  # stall in the background over stall at once


def prepared(megabytes: int) -> Parallel:
    """One process whose model and optimizer hold so many megabytes: fp32 weights and two moments."""
    parallel = start_parallel(ParallelSettings(strategy="single"))
    width = round((megabytes * 1e6 / 12 / 16) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(16)))
    parallel.prepare(model, lambda module: torch.optim.AdamW(module.parameters()))
    take_passes(parallel)
    parallel.optimizer_step(1e-3)
    return parallel


def take_passes(parallel: Parallel) -> None:
    """Forward and backward, a few tenths of a second."""
    width = next(parallel.module.parameters()).shape[1]
    parallel.micro_step(parallel.forward(input=torch.ones(128, width)).sum(), last=True)


def seconds_of_a_step(parallel: Parallel, store: Checkpoints | None, step: int) -> tuple[float, float]:
    """(stall, passes): from the end of an update, over a save to `store`, to the beginning of the next update."""
    times = [time.perf_counter()]
    if store:
        store.save(parallel, {}, step)
    times.append(time.perf_counter())
    take_passes(parallel)
    times.append(time.perf_counter())
    if store:
        store.wait_for_copy()
    times.append(time.perf_counter())
    return times[1] - times[0] + times[3] - times[2], times[2] - times[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="weights and optimizer states together")
    parser.add_argument("--rounds", type=int, default=7, help="saves of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = prepared(arguments.megabytes)
    steps: dict[str, list[tuple[float, float]]] = {"none": [], "background": [], "at once": []}
    loads: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        stores = {name: Checkpoints(Path(scratch, name), 1, asynchronous=name == "background") for name in steps}
        for step in range(arguments.rounds + 1):
            for name, store in stores.items():
                steps[name].append(seconds_of_a_step(parallel, store if name != "none" else None, step))
                store.wait()  # a real interval between saves is longer than a save
                parallel.optimizer_step(1e-3)
            started = time.perf_counter()
            path = stores["at once"].latest(parallel)
            assert path is not None
            stores["at once"].load(parallel, path)
            loads.append(time.perf_counter() - started)
    # the first round makes the buffers
    found = {name: [statistics.median(part) for part in zip(*taken[1:], strict=True)] for name, taken in steps.items()}
    ratio = found["background"][0] / found["at once"][0]
    title = f"checkpoint of {arguments.megabytes} MB, median of {arguments.rounds}"
    table = Table("save", "stall, s", "of at once", "passes beside it, s", title=title)
    for name, (stall, passes) in found.items():
        table.add_row(name, f"{stall:.3f}", f"{stall / found['at once'][0]:.1%}", f"{passes:.3f}")
    table.add_row("verify and load", f"{statistics.median(loads):.3f}", "", "")
    Console().print(table)
    return 0 if ratio < GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
