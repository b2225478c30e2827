"""Look at a machine or an allocation before a run: what it computes in a second, its ranks, bandwidth, memory, disk,
clocks and versions, what precision `auto` takes, and how long an experiment will take here.

python -m pretrain.doctor [--config configs/experiment/NAME.yaml] [--folder RUNS] [--steps N] [key=value ...]
torchrun --nproc_per_node N -m pretrain.doctor ...

Started exactly as the run will be. Prints a line for each check; exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from data_prep.settings import UserError, run_command
from model.flops import training_flops
from model.hardware import PRECISIONS, auto_precision, describe, require_bf16
from model.memory import training_memory
from pretrain.config import ExperimentSettings, make_model_config, micro_size_of, read_settings, resolve_model
from pretrain.parallel.settings import ParallelSettings
from pretrain.parallel.timing import duration
from pretrain.plan import Plan, make_plans, placement_of
from pretrain.precision import decided, expected, product_rate, recorded, settle

if TYPE_CHECKING:
    from pretrain.parallel.strategy import Parallel

MEBIBYTE, GIBIBYTE = 2**20, 2**30
STEPS = 5  # real steps that the duration of an experiment is told from
LARGEST_SKEW = 1.0  # seconds between clocks; beyond it, checkpoints and logs of nodes cannot be put in order


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, the same on every rank."""

    check: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.check:<10} {self.text}"


def check_ranks(parallel: Parallel) -> Finding:
    """Every rank hears every other, and no two share an accelerator."""
    seen = parallel.gather((parallel.rank, socket.gethostname(), str(parallel.device)))
    hosts = sorted({host for _, host, _ in seen})
    devices = [(host, device) for _, host, device in seen if device != "cpu"]
    complete = [rank for rank, _, _ in seen] == list(range(parallel.world_size))
    shared = len(set(devices)) != len(devices)
    text = f"{parallel.world_size} ranks on {len(hosts)} hosts ({', '.join(hosts)}), {parallel.settings.strategy}"
    return Finding("ranks", complete and not shared, text + (", two ranks share a device" if shared else ""))


def check_bandwidth(parallel: Parallel, mebibytes: int = 64, rounds: int = 3) -> Finding:
    """All-reduce of one buffer. Bus bandwidth: bytes * 2 (n - 1) / n over the time of the fastest round."""
    if parallel.world_size == 1:
        return Finding("bandwidth", True, "one rank, nothing to exchange")
    buffer = torch.ones(mebibytes * MEBIBYTE // 4, device=parallel.device)
    times = []
    for _ in range(rounds):
        parallel.barrier()
        started = time.perf_counter()
        total = parallel.all_reduce(buffer)
        right = bool(total[-1] == parallel.world_size)  # reading it waits for the accelerator
        times.append(time.perf_counter() - started)
    slowest = max(parallel.gather(min(times)))
    share = 2 * (parallel.world_size - 1) / parallel.world_size
    speed = mebibytes * MEBIBYTE * share / slowest / 1e9
    return Finding("bandwidth", not parallel.agree(not right), f"all-reduce of {mebibytes} MiB: {speed:.2f} GB/s")


def check_disk(parallel: Parallel, folder: Path, mebibytes: int = 64) -> Finding:
    """Every rank writes, reads back, and sees what rank 0 wrote: checkpoints need one file system for all."""
    folder.mkdir(parents=True, exist_ok=True)
    note, own = folder / "doctor-note", folder / f"doctor-{parallel.rank}"
    if parallel.is_main:
        note.write_text("seen")
    parallel.barrier()
    started, fault = time.perf_counter(), ""
    try:
        fault = "" if note.is_file() else "does not see what rank 0 wrote"
        data = os.urandom(MEBIBYTE) * mebibytes
        with own.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if own.read_bytes() != data:
            fault = "reads back other bytes than it wrote"
    except OSError as error:
        fault = str(error)
    seconds = time.perf_counter() - started
    own.unlink(missing_ok=True)
    faults = parallel.gather(fault)
    if parallel.is_main:
        note.unlink(missing_ok=True)
    if any(faults):
        return Finding("disk", False, "; ".join(f"rank {rank} {text}" for rank, text in enumerate(faults) if text))
    free = psutil.disk_usage(str(folder)).free / GIBIBYTE
    speed = mebibytes * MEBIBYTE / max(parallel.gather(seconds)) / 1e6
    return Finding("disk", True, f"{folder}: {speed:.0f} MB/s a rank written and read, {free:.0f} GiB free")


def check_clock(parallel: Parallel) -> Finding:
    """Clocks of all ranks, read right after a barrier."""
    parallel.barrier()
    clocks = parallel.gather(time.time())
    skew = max(clocks) - min(clocks)
    return Finding("clock", skew < LARGEST_SKEW, f"clocks differ by {skew:.3f} s at most")


def check_versions(parallel: Parallel) -> Finding:
    """The same packages on every rank."""
    from pretrain.run_folder import versions

    own = {"python": platform.python_version()} | versions()
    everywhere = parallel.gather(own)
    differing = sorted(name for name in own if len({found.get(name) for found in everywhere}) > 1)
    if differing:
        name = differing[0]
        return Finding("versions", False, f"{name} differs: {[found.get(name) for found in everywhere]}")
    return Finding("versions", True, ", ".join(f"{name} {version}" for name, version in own.items()))


def check_memory(parallel: Parallel, settings: ExperimentSettings) -> Finding:
    """Memory that a rank can have against what the experiment is estimated to take."""
    if settings.data.prepared:
        manifest = settings.data.read()
        config, length = resolve_model(settings, manifest), manifest.sequence_length
    elif settings.batch.sequence_length:
        config, length = make_model_config(settings.model), settings.batch.sequence_length
    else:
        raise UserError(
            f"{settings.data.folders[0][0]} is not prepared; give batch.sequence_length for the memory estimate"
        )
    placement = placement_of(settings, parallel.settings, parallel.world_size, parallel.device.type == "cuda")
    needed = training_memory(config, length, micro_size_of(settings.batch, parallel.world_size), placement).total
    free = free_memory(parallel)
    text = f"estimate {needed / GIBIBYTE:.2f} GiB a rank, {free / GIBIBYTE:.2f} GiB free"
    return Finding("memory", needed <= free, text)


def free_memory(parallel: Parallel) -> int:
    """Bytes that a rank can have, on the rank that can have least."""
    if parallel.device.type == "cuda":
        free = torch.cuda.mem_get_info(parallel.device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(parallel.gather(free)))


def check_free_memory(parallel: Parallel) -> Finding:
    """Memory that a rank can have, where no experiment says how much it takes."""
    return Finding("memory", True, f"{free_memory(parallel) / GIBIBYTE:.2f} GiB free for a rank")


# --- speed --------------------------------------------------------------------------------------------------------


def check_device(parallel: Parallel) -> Finding:
    """FLOP/s of matrix products in fp32 and bf16, of the slowest rank; a precision that torch refuses is named."""
    device, rates = parallel.device, {}
    try:
        require_bf16(device)
    except ValueError:
        rates["bf16"] = 0.0
    for precision in PRECISIONS:
        rates.setdefault(precision, product_rate(precision, device))
    everywhere = parallel.gather(rates)
    slowest = {name: min(found[name] for found in everywhere) for name in PRECISIONS}
    told = [f"{name} {rate / 1e9:,.1f} GFLOP/s" if rate else f"{name} refused" for name, rate in slowest.items()]
    how = ""
    if device.type == "cpu":
        how = f", {torch.get_num_threads()} threads a rank, kernels for {torch.backends.cpu.get_cpu_capability()}"
    return Finding("device", True, f"{describe(device)}: matrix products in {', '.join(told)}{how}")


def check_precision(parallel: Parallel, settings: ExperimentSettings | None) -> Finding:
    """What `auto` takes here and why, and what the experiment will be computed in, where that is something else."""

    def decide() -> tuple[bool, str]:
        auto, reason = auto_precision(parallel.device)
        text = f"auto takes {auto}: {reason}"
        if settings is None:
            return True, text
        before = recorded(settings.run_dir)
        try:
            own = decided(settings.precision, before, parallel.device, str(settings.run_dir))[1]
        except UserError as error:
            return False, str(error)
        return True, text if settings.precision == "auto" and before is None else f"{own}; {text}"

    return Finding("precision", *parallel.gather(parallel.on_main("deciding the precision", decide))[0])


def check_duration(parallel: Parallel, settings: ExperimentSettings, folder: Path, steps: int) -> Finding:
    """How long the experiment will take here: from real steps of it, or, without its data or where it does not fit,
    from its FLOPs and the speed of matrix products. Validation, checkpoints and the start come on top."""
    if not settings.data.prepared or steps == 0:
        return Finding("duration", True, duration_by_flops(parallel, settings))
    from pretrain.trainer import Trainer

    trainer = Trainer(settle(settings, parallel), settings.data.read(), parallel)
    planned = whole_steps(trainer.plans, settings)
    seconds = trainer.rehearse(steps + 1, folder)[1:]  # the first one warms up
    typical = max(parallel.gather(statistics.median(seconds)))
    text = f"{planned:,} steps of {typical:.2f} s (median of {steps} real ones): about {duration(planned * typical)}"
    return Finding("duration", True, f"{text}, validation and checkpoints apart")


def whole_steps(plans: Sequence[Plan], settings: ExperimentSettings) -> int:
    """Steps of all plans: one run's, or those of the largest budget and the cool-downs of the others."""
    *smaller, largest = [plan.planned_steps for plan in plans if not plan.trunk]
    return largest + round(settings.schedule.decay_share * sum(smaller))


def duration_by_flops(parallel: Parallel, settings: ExperimentSettings) -> str:
    """A lower bound, from FLOPs and the measured rate of products, where no step can be taken."""
    config, length, size = make_model_config(settings.model), settings.batch.sequence_length, settings.batch.size
    if length is None:
        return f"{settings.data.folders[0][0]} is not prepared; give batch.sequence_length for an estimate from FLOPs"
    budgeted = training_flops(config, length, size, convention=settings.budget.convention)
    steps = whole_steps(make_plans(settings, budgeted, size * length), settings)
    cost = training_flops(config, length, size)
    precision = expected(settings.precision, parallel.device.type == "cuda")
    rate = sum(parallel.gather(product_rate(precision, parallel.device)))
    return (
        f"{steps:,} steps, at least {duration(steps * cost / rate)}: no real step was taken, {cost:.4g} FLOPs each "
        f"(exact) at the {rate / 1e9:,.1f} GFLOP/s of matrix products in {precision}"
    )


def examine(parallel: Parallel, folder: Path, settings: ExperimentSettings | None, steps: int = STEPS) -> list[Finding]:
    """All checks, in order; collective. steps: real ones of the experiment that its duration is told from."""
    checks: list[Callable[[], Finding]] = [
        lambda: check_device(parallel),
        lambda: check_precision(parallel, settings),
        lambda: check_ranks(parallel),
        lambda: check_bandwidth(parallel),
        lambda: check_disk(parallel, folder),
        lambda: check_clock(parallel),
        lambda: check_versions(parallel),
    ]
    if settings is not None:
        checks.append(lambda: check_memory(parallel, settings))
        checks.append(lambda: check_duration(parallel, settings, folder, steps))
    else:
        checks.append(lambda: check_free_memory(parallel))
    findings: list[Finding] = []
    for check in checks:
        if check is checks[-1] and settings is not None and not all(finding.passed for finding in findings):
            break  # what does not fit, or cannot compute, takes no step
        findings.append(check())
        if parallel.is_main:
            print(findings[-1], flush=True)
    return findings


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and examine; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="the experiment that is to run, for its memory and its duration")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="real steps to tell its duration from; 0: its FLOPs (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where checkpoints will be written")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the experiment")
    options: Any = parser.parse_intermixed_args(arguments)
    settings = read_settings(options.config, options.overrides) if options.config else None
    from pretrain.parallel.start import start_parallel

    parallel = start_parallel(settings.parallel if settings else ParallelSettings.model_validate({}))
    findings = examine(parallel, options.folder, settings, options.steps)
    parallel.finish()
    return int(not all(finding.passed for finding in findings))


if __name__ == "__main__":
    run_command(main)
