"""Joules that training takes: of a machine's CPU packages by RAPL, of a GPU's board by NVML, where they can be read.

RAPL: Linux' powercap, `intel-rapl:N` on Intel and AMD alike; microjoules in a counter that begins anew at
`max_energy_range_uj`, since Linux 5.10 for root alone unless permitted otherwise. It counts a package whole: whatever
else runs on the machine is in it; memory, fans and disks are not. NVML: millijoules of a board since the driver was
loaded, Volta or newer, through `pynvml` where that is installed (nvidia-ml-py), which nothing else here needs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")
MEANING = {
    "packages": "CPU packages by RAPL, whole, with whatever else ran on the machines",
    "boards": "GPU boards by NVML, whole",
}
Counter = tuple[Callable[[], int], float]  # microjoules since some moment, and where they begin anew at 0


class EnergyMeter:
    """Joules that one rank answers for, from each `resume` to the `pause` after it.

    counters: what is read, by kind of MEANING. Without any nothing is read, and nothing known.
    """

    def __init__(self, counters: dict[str, list[Counter]]) -> None:
        self.counters = counters
        self._joules = 0.0
        self._last: list[float] | None = None  # microjoules of each counter; None: what is used does not count

    @classmethod
    def of_rank(cls, device: torch.device, first_on_machine: bool, folder: Path = RAPL) -> EnergyMeter:
        """What this rank can read: the first one on a machine its packages, each one its own GPU's board.

        folder: of powercap.
        """
        found = {"packages": packages(folder)} if first_on_machine else {}
        if device.type == "cuda":
            found["boards"] = board(str(torch.cuda.get_device_properties(device).uuid))
        return cls({kind: counters for kind, counters in found.items() if counters})

    def agree(self, of_ranks: Iterable[tuple[bool, set[str]]], on_gpus: bool) -> str | None:
        """Keep the kinds that can be read everywhere; returns what is counted, in words, or None where nothing is.

        of_ranks: of every rank, whether it is the first on its machine, and the kinds that it reads. On GPUs packages
        alone are nothing that is worth telling.
        """
        ranks = list(of_ranks)
        asked = {"packages": [kinds for first, kinds in ranks if first], "boards": [kinds for _, kinds in ranks]}
        kept = [kind for kind in MEANING if all(kind in kinds for kinds in asked[kind])]
        if on_gpus and "boards" not in kept:
            kept = []
        self.counters = {kind: counters for kind, counters in self.counters.items() if kind in kept}
        return "; ".join(MEANING[kind] for kind in kept) or None

    def resume(self) -> None:
        """What is used from now on counts."""
        self._last = self._read()

    def pause(self) -> None:
        """What is used from now on does not count."""
        self._add()
        self._last = None

    def take(self) -> float:
        """Joules counted since the last call; not a number where a counter could not be read any more."""
        self._add()
        joules, self._joules = self._joules, 0.0
        return joules

    def _add(self) -> None:
        if self._last is None:
            return
        before, self._last = self._last, self._read()
        ranges = [ends for counters in self.counters.values() for _, ends in counters]
        self._joules += sum((now - then) % ends for now, then, ends in zip(self._last, before, ranges)) / 1e6

    def _read(self) -> list[float]:
        return [_or_nan(read) for counters in self.counters.values() for read, _ in counters]


def packages(folder: Path) -> list[Counter]:
    """The counters of all CPU packages; none where there are none, or one of them cannot be read."""
    found: list[Counter] = []
    try:
        for zone in sorted(folder.glob("intel-rapl:*")):  # cores and memory of a package have zones of their own
            if (zone / "name").read_text().startswith("package"):
                ends = int((zone / "max_energy_range_uj").read_text())
                found.append((_reader(zone / "energy_uj"), ends))
                found[-1][0]()
    except (OSError, ValueError):
        return []
    return found


def board(uuid: str, nvml: Any = None) -> list[Counter]:
    """The counter of a GPU's board; none where NVML or the GPU has none. nvml: a module like pynvml, or that itself."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return []
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return []
    return [(lambda: 1000 * nvml.nvmlDeviceGetTotalEnergyConsumption(handle), math.inf)]


def _reader(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text())


def _or_nan(read: Callable[[], int]) -> float:
    """What a counter says; not a number where it fails, which must not end a run."""
    try:
        return read()
    except Exception:
        return math.nan
