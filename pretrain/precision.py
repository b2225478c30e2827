"""The precision of a run: what `auto` stands for, decided once by rank 0 and recorded, and what is said about it.

The rule is the same wherever a precision is chosen: bf16 where the hardware multiplies it (CUDA, AMX, AVX512-BF16, Arm
BF16), else fp32. It asks the hardware, not a clock. What exists goes on in the precision that it was started with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from data_prep.settings import UserError, read_yaml
from model import hardware
from model.hardware import DTYPES, Precision
from pretrain.config import ExperimentSettings

if TYPE_CHECKING:
    from pretrain.parallel.strategy import Parallel

CPU = torch.device("cpu")
PRODUCT = (64, 512, 512)  # rows, inputs, outputs of the products that are timed: a tenth of a second at worst


def settle(settings: ExperimentSettings, parallel: Parallel, restart: bool = False) -> ExperimentSettings:
    """Settings with `precision` decided, the same on every rank, and `parallel` computing in it. Collective.

    restart: what the run directory holds will be set aside, and decides nothing.
    Raises UserError where the run was started in another precision, or where torch refuses bf16 on this hardware.
    """

    def decide() -> Precision:
        before = None if restart else recorded(settings.run_dir)
        precision, sentence = decided(settings.precision, before, parallel.device, str(settings.run_dir))
        print(f"precision: {sentence}", flush=True)
        return precision

    precision = parallel.gather(parallel.on_main("deciding the precision", decide))[0]
    parallel.compute_in(precision)
    return settings.model_copy(update={"precision": precision})


def decided(asked: str, before: Precision | None, device: torch.device, run: str) -> tuple[Precision, str]:
    """The precision and a line that says why. before: in which the run was started. Raises UserError, see `settle`."""
    if before is not None:
        if asked not in ("auto", before):
            raise UserError(
                f"precision: {run} was started in {before}, and a run goes on in the precision that it was started "
                f"with; leave out precision={asked}, or give another run_dir"
            )
        precision, why = before, "as this run was started"
    elif asked == "auto":
        precision, reason = hardware.auto_precision(device)
        why = f"auto: {reason}"
    else:
        precision, why = known(asked), "as configured"
    return precision, f"{precision} ({why}){refused_or_slow(precision, device)}"


def known(asked: str) -> Precision:
    """Raises UserError for a precision that there is not."""
    if asked not in hardware.PRECISIONS:
        raise UserError(f"precision: expected auto, {' or '.join(get_args(Precision))}, got {asked!r}")
    return asked  # type: ignore[return-value]


def refused_or_slow(precision: Precision, device: torch.device) -> str:
    """A warning where bf16 is slow, measured now. Raises UserError where torch refuses it."""
    if precision == "fp32":
        return ""
    try:
        hardware.require_bf16(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if hardware.multiplies_bf16(device):
        return ""
    ratio = product_rate("fp32", device) / product_rate("bf16", device)
    return (
        f"; warning: {hardware.describe(device)} does not multiply bf16 in hardware, a matrix product takes "
        f"{ratio:.1f} times as long as in fp32 (measured now)"
    )


def product_rate(precision: Precision, device: torch.device, rounds: int = 3) -> float:
    """FLOP/s of matrix products of `PRODUCT` size on this device: the median of a few."""
    rows, inputs, outputs = PRODUCT if device.type == "cpu" else tuple(16 * size for size in PRODUCT)
    x, weight = (torch.ones(n, inputs, dtype=DTYPES[precision], device=device) for n in (rows, outputs))
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)[-1, -1].item()  # reading it waits for the accelerator
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inputs * outputs / statistics.median(seconds[1:])


def recorded(run_dir: Path) -> Precision | None:
    """The precision in which a run was started, by its config.yaml; None where there is none."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return None
    value = read_yaml(path).get("precision")
    return value if value in hardware.PRECISIONS else None


def of_comparison(folders: Iterable[Path], gpus: bool) -> Precision:
    """What `auto` stands for in a comparison: as its runs were started, else by the hardware that they will run on.

    gpus: of Slurm's nodes, which may have GPUs where this machine has none. Raises UserError where runs differ.
    """
    found = {folder: before for folder in folders if (before := recorded(folder)) is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{folder}: {precision}" for folder, precision in found.items())
        raise UserError(f"precision: runs of this comparison were started in several precisions ({listed}); name one")
    if found:
        return next(iter(found.values()))
    return expected("auto", gpus)


def expected(asked: str, gpus: bool) -> Precision:
    """What a run will be computed in: where it will have GPUs, `auto` is bf16; else this machine's CPUs stand for its.

    Where this machine has a GPU, that is asked.
    """
    if asked != "auto":
        return known(asked)
    if not gpus:
        return hardware.auto_precision(CPU)[0]
    return hardware.auto_precision(torch.device("cuda"))[0] if torch.cuda.is_available() else "bf16"


def for_evaluation(asked: str | None, trained: str | None, device: torch.device) -> tuple[Precision, str]:
    """In what to evaluate, and a line that says why: as asked, else as trained where that is fast, else fp32."""
    if asked not in (None, "auto"):
        precision = known(str(asked))
        return precision, f"{precision} (as asked){refused_or_slow(precision, device)}"
    if trained == "bf16" and not hardware.multiplies_bf16(device):
        return "fp32", (
            f"fp32 ({hardware.describe(device)} does not multiply bf16 in hardware; trained in bf16, which --precision "
            "bf16 asks for)"
        )
    if trained in hardware.PRECISIONS:
        return known(str(trained)), f"{trained} (as trained)"
    precision, reason = hardware.auto_precision(device)
    return precision, f"{precision} (auto: {reason})"
