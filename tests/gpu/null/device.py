"""Run a script of this folder on the null device, and read its counters there.

    python -m tests.gpu.null.device OUT MODULE [ARGUMENTS]      OUT: where tests.gpu.null.build built it

torch's own host code runs: dispatch, choice of kernels, allocator, streams, inductor, Triton, ptxas. Kernels do
nothing, so a tensor holds what its memory held, and a time is no time. cuDNN and NCCL are not there.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

COUNTERS = ("launches", "products", "waits", "to_host", "to_device", "to_device_unpinned", "graphs")
FOLDER = "NULL_DEVICE"


def environment(out: Path) -> dict[str, str]:
    """Variables under which this Python finds the null device."""
    return os.environ | {
        FOLDER: str(out),
        "LD_PRELOAD": str(out / "libnull.so"),
        "LD_LIBRARY_PATH": f"{out}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(out),  # which Triton links its launchers against
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def counters() -> dict[str, int]:
    """What the device was asked for since the process began."""
    library = ctypes.CDLL(f"{os.environ[FOLDER]}/libnull.so")
    return dict(zip(COUNTERS, (ctypes.c_ulong * len(COUNTERS)).in_dll(library, "null_counters"), strict=True))


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    os.execve(sys.executable, [sys.executable, "-m", *sys.argv[2:]], environment(folder))
