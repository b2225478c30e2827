"""Where a run's figures go: metrics.jsonl (the truth), and from there W&B and the terminal. Rank 0 alone does so.

    python -m pretrain.metrics sync RUN [--online] [--id ID]

rebuilds the W&B run from metrics.jsonl: each kill of an offline run leaves another folder of the same W&B id, which
repeats steps, and uploading one may replace what came from another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from data_prep.settings import UserError, run_command
from pretrain.config import ExperimentSettings, read_settings

if TYPE_CHECKING:
    from pretrain.parallel.strategy import Parallel

# Dense bf16 peak of one device in FLOP/s, by a part of its name; from the makers' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "MI300X": 1307e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
}
SECONDS_BETWEEN_LINES = 10.0
METRICS = "metrics.jsonl"


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of one device, or None where it is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a device, whose share the name does not tell
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def memory_bytes(device: torch.device) -> int:
    """Largest memory that this process has used so far: on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# The loss told beside the causal one, and how it came about.
_SECOND_LOSSES = (("validation_loss_full", "at full depth"), ("validation_loss_topk", "top-k"))


class Sums:
    """Named sums over micro-batches and ranks, brought together by one collective.

    float64 holds every count below 2^53 exactly, so that the FLOPs computed from them are exact.
    """

    def __init__(self) -> None:
        self._values: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Add a scalar or a vector to the sum `name`; every rank must add the same names in the same order."""
        value = torch.as_tensor(value).detach().double()
        self._values[name] = self._values[name] + value if name in self._values else value

    def reduce(self, parallel: Parallel) -> dict[str, Any]:
        """The sums over all ranks: a float for a scalar, a list for a vector."""
        return self.read(self.over_ranks(parallel))

    def over_ranks(self, parallel: Parallel) -> torch.Tensor:
        """The sums over all ranks, on the device, in one vector; nothing waits for them. Collective."""
        device = parallel.device
        flat = [
            # Made there: what this host knows need not be copied, which would wait.
            torch.full((1,), value.item(), dtype=value.dtype, device=device)
            if value.numel() == 1 and value.device != device
            else value.to(device).reshape(-1)
            for value in self._values.values()
        ]
        return parallel.all_reduce(torch.cat(flat))

    def read(self, flat: torch.Tensor, **scalars: torch.Tensor) -> dict[str, Any]:
        """Figures of `over_ranks`, and of scalars of the device beside them, in one copy to the host."""
        last = [value.detach().to(flat).reshape(1) for value in scalars.values()]
        *parts, extra = torch.cat([flat, *last]).cpu().split([v.numel() for v in self._values.values()] + [len(last)])
        figures = {
            name: part.tolist() if value.dim() else part.item()
            for (name, value), part in zip(self._values.items(), parts, strict=True)
        }
        return figures | dict(zip(scalars, extra.tolist(), strict=True))


@dataclass
class LossSpikes:
    """Marks a loss that stands out: not finite, or DEVIATIONS standard deviations above the mean of the last steps.

    Both are weighted exponentially over about HORIZON steps, of which the first are never marked. The deviation is that
    of differences between successive losses, over sqrt(2), so that the fall of the loss does not enter it.
    """

    HORIZON: ClassVar[int] = 50
    DEVIATIONS: ClassVar[float] = 5.0

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    last: float = 0.0

    def __call__(self, loss: float) -> bool:
        """Whether `loss`, of the next step, is a spike; takes it into the mean if it is finite."""
        if not math.isfinite(loss):
            return True
        spike = self.count >= self.HORIZON and loss > self.mean + self.DEVIATIONS * math.sqrt(self.variance)
        share = 1 / min(self.count + 1, self.HORIZON)
        self.mean += share * (loss - self.mean)
        if self.count:
            self.variance += share * ((loss - self.last) ** 2 / 2 - self.variance)
        self.last = loss
        self.count += 1
        return spike


def rank_spread(parallel: Parallel, seconds: float) -> dict[str, float]:
    """Fastest and slowest rank by `seconds`, each rank's own; nothing on one rank. Collective.

    Ranks wait for each other in every step, so that whole steps take equally long; the trainer gives data and forward,
    which come before the first wait (FSDP2 and ZeRO-3 already wait in the forward pass for each other's gathers).
    """
    if parallel.world_size == 1:
        return {}
    own = torch.zeros(parallel.world_size, dtype=torch.float64, device=parallel.device)
    own[parallel.rank] = seconds
    every = parallel.all_reduce(own).tolist()
    return {
        "fastest_rank_seconds": min(every),
        "slowest_rank_seconds": max(every),
        "slowest_rank": every.index(max(every)),
    }


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended and flushed at once."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open for appending; lines of steps beyond `last_step`, and anything after an unreadable line, are cut.

        last_step: step of the checkpoint that the run goes on from; -1 starts an empty file.
        """
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = []
        for line in lines:
            if not _belongs(line, last_step):
                break
            kept.append(line)
        if len(kept) < len(lines):
            partial = path.with_suffix(".partial")
            partial.write_bytes(b"".join(kept))
            os.replace(partial, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run's whole life)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Non-finite numbers, which JSON lacks, become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring every line to the disk; done before a checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def _belongs(line: bytes, last_step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False


def good_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(text, content) of every line before the first that is torn by a kill, or being written; none without a file."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        if not _belongs(text.encode(), sys.maxsize):
            break
        found.append((text, json.loads(text)))
    return found


def last_line(path: Path) -> dict[str, Any] | None:
    """The last line of a metrics.jsonl, or None where there is none or it is cut short."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return None


def last_step(path: Path) -> int:
    """The highest step of a metrics.jsonl, 0 where it holds none; lines that cannot be read do not count."""
    steps = [0]
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            steps.append(int(json.loads(line)["step"]))
    return max(steps)


class Tracker:
    """Weights & Biases. Whatever it raises, training goes on after one warning."""

    def __init__(self, experiment: ExperimentSettings, folder: Path, run_id: str) -> None:
        """Start or continue the W&B run `run_id`; its files go to `folder`."""
        self._run: Any = None
        settings = experiment.tracker
        if settings.mode == "disabled":
            return
        try:
            import wandb

            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=settings.tags,
                name=experiment.name,
                id=run_id,
                resume="allow",
                mode=settings.mode,
                dir=str(folder),
                config=experiment.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
            )
            self._run.define_metric("flops")
            self._run.define_metric("*", step_metric="flops")
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever a tracker's network, key or disk raises ends no training run
            self._give_up(error)

    @property
    def reached(self) -> bool:
        """Whether W&B takes what is logged."""
        return self._run is not None

    def log(self, line: dict[str, Any]) -> None:
        """Send one line of metrics as W&B's step of its own `step`; a list becomes one value an entry.

        A step that W&B has already, of before a kill, is left alone: its figures are the same. The last word on a run
        (`event`) is added to the newest step.
        """
        if self._run is None:
            return
        flat: dict[str, Any] = {}
        for key, value in line.items():
            flat |= {f"{key}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
        try:
            step = max(line["step"], self._run.step) if "event" in line else line["step"]
            if step >= self._run.step:
                self._run.log(flat, step=step)
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        """Close the W&B run."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        print(f"warning: W&B is out of reach, training goes on without it: {error}", file=sys.stderr)


def tracker_id(folder: Path, known: str | None) -> str:
    """The W&B id of a run: the one in its tracker folder, or `known` from its checkpoint, or a new one."""
    path = folder / "run_id"
    if path.exists():
        return path.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    run_id = known or uuid.uuid4().hex[:12]
    path.write_text(run_id, encoding="utf-8")
    return run_id


def sync(run_dir: Path, mode: str, run_id: str | None = None) -> Path:
    """Rebuild a run's W&B run from its metrics.jsonl, every step once; returns W&B's folder of it.

    mode: offline or online. run_id: of the W&B run; None: the run's own. An earlier rebuilding is replaced. Raises
    UserError where there is no run, or W&B is out of reach.
    """
    lines = run_dir / METRICS
    if not (run_dir / "config.yaml").is_file() or not lines.is_file():
        raise UserError(f"{run_dir}: no run with {METRICS}; give the directory of a run (`run_dir`)")
    settings = read_settings(run_dir / "config.yaml")
    told = {"tracker": settings.tracker.model_copy(update={"mode": mode})}
    folder = run_dir / "tracker" / "rebuilt"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tracker = Tracker(settings.model_copy(update=told), folder, run_id or tracker_id(run_dir / "tracker", None))
    for _, line in good_lines(lines):
        if tracker.reached:
            tracker.log(line)
    if not tracker.reached:
        raise UserError(f"{run_dir}: W&B did not take the run; see the warning above")
    tracker.finish()
    return next(iter(sorted(folder.glob("wandb/*run-*"))), folder)


class TerminalLine:
    """A progress bar with the latest figures; without a terminal, a plain line now and then."""

    def __init__(self, name: str, progress: float) -> None:
        self._console = Console()
        self._name = name
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"))
            self._bar = Progress(
                *columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=self._console
            )
            self._task = self._bar.add_task(name, total=1.0, text="")
            self._bar.update(self._task, completed=progress)
            self._bar.start()

    def update(self, progress: float, line: dict[str, Any]) -> None:
        """Show one line of metrics. progress: share of the budget spent, 0..1."""
        if "validation_loss_topk" in line:
            causal = line["validation_loss"]
            shown = f"{causal:.4f} causal, " if causal is not None else ""
            key, how = next((k, h) for k, h in _SECOND_LOSSES if k in line)
            self.say(f"step {line['step']}  validation loss {shown}{line[key]:.4f} {how}")
            if sources := line.get("validation_loss_sources"):
                self.say("  of each source: " + ", ".join(f"{name} {loss:.4f}" for name, loss in sources.items()))
        if "loss" not in line:
            return
        text = (
            f"step {line['step']}  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
            f"{line['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=min(progress, 1.0), text=text)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"{progress:6.1%}  {text}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(f"{self._name}: {text}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Output:
    """Everything that a run tells: one call per line of metrics, to its file, to W&B and to the terminal."""

    def __init__(self, folder: Path, name: str, last_step: int, progress: float, tracker: Tracker) -> None:
        """last_step: of the checkpoint that the run goes on from, -1 without one. progress: share of budget spent."""
        self._file = MetricsFile(folder / METRICS, last_step)
        self._tracker = tracker
        self._terminal = TerminalLine(name, progress)

    def write(self, line: dict[str, Any], progress: float) -> None:
        """One line of metrics. progress: share of the budget spent."""
        self._file.write(line)
        self._tracker.log(line)
        self._terminal.update(progress, line)

    def say(self, text: str) -> None:
        """One line for the reader at the terminal alone."""
        self._terminal.say(text)

    def sync(self) -> None:
        """Bring the metrics to the disk; done before a checkpoint that relies on them."""
        self._file.sync()

    def close(self) -> None:
        self._terminal.close()
        self._file.close()
        self._tracker.finish()


def main(arguments: list[str] | None = None) -> int:
    """`python -m pretrain.metrics sync RUN`."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.metrics", description="What serves a run's figures.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sync", help="rebuild a run's W&B run from its metrics.jsonl, every step once")
    command.add_argument("run", type=Path, help="run directory")
    command.add_argument("--online", action="store_true", help="send it at once; else a folder for `wandb sync`")
    command.add_argument("--id", help="of the W&B run (default: the run's own)")
    given = parser.parse_args(arguments)
    folder = sync(given.run, "online" if given.online else "offline", given.id)
    print(f"{folder}: whole" if given.online else f"wrote {folder}; to send it: wandb sync {folder}")
    return 0


if __name__ == "__main__":
    run_command(main)
