"""How long training stands still for a checkpoint of 200 MB, saved in the background against saved at once; and resume.

    python tests/benchmarks/bench_checkpoint.py [--megabytes 200] [--rounds 5]

Rounds are interleaved, medians reported, so that a busy machine slows both alike.
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
from pretrain.parallel import Parallel, ParallelSettings

GOAL = 0.1  # stall in the background over stall at once


def prepared(megabytes: int) -> Parallel:
    """One process whose model and optimizer hold so many megabytes: fp32 weights and two moments."""
    parallel = Parallel.start(ParallelSettings(strategy="single"))
    width = round((megabytes * 1e6 / 12 / 16) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(16)))
    parallel.prepare(model, lambda module: torch.optim.AdamW(module.parameters()))
    parallel.micro_step(parallel.forward(input=torch.ones(1, width)).sum(), last=True)
    parallel.optimizer_step(1e-3)
    return parallel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="weights and optimizer states together")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    arguments = parser.parse_args()
    parallel = prepared(arguments.megabytes)
    stalls: dict[bool, list[float]] = {True: [], False: []}
    loads: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        stores = {kind: Checkpoints(Path(scratch, str(kind)), keep=1, asynchronous=kind) for kind in stalls}
        for step in range(arguments.rounds):
            for kind, store in stores.items():
                started = time.perf_counter()
                store.save(parallel, {}, step)
                stalls[kind].append(time.perf_counter() - started)
                store.wait()  # a real interval between saves is longer than a save
            started = time.perf_counter()
            path = stores[False].latest(parallel)
            assert path is not None
            stores[False].load(parallel, path)
            loads.append(time.perf_counter() - started)
    background, at_once = statistics.median(stalls[True]), statistics.median(stalls[False])
    table = Table("save", "stall, s", title=f"checkpoint of {arguments.megabytes} MB, median of {arguments.rounds}")
    table.add_row("at once", f"{at_once:.3f}")
    table.add_row("in the background", f"{background:.3f} ({background / at_once:.1%})")
    table.add_row("verify and load", f"{statistics.median(loads):.3f}")
    Console().print(table)
    return 0 if background / at_once < GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
