"""What this machine's hardware can do, asked in one place by every path that is fast on some machines only.

`MOR_PLAIN_CPU=1` hides what a CPU has beyond the plain instructions: each fast path must work without, and tests and CI
run a second time so. It changes nothing on a CPU that has none of them, and nothing on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

SWITCH = "MOR_PLAIN_CPU"
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CPU:
    """Capabilities of a CPU. amx_bf16, avx512_bf16, arm_bf16: instructions that multiply bf16. avx_ne_convert: those
    that convert it. packs_bf16: oneDNN takes bf16 weights in an order of its own, though perhaps slowly."""

    amx_bf16: bool = False
    avx512_bf16: bool = False
    arm_bf16: bool = False
    avx_ne_convert: bool = False
    packs_bf16: bool = False

    @property
    def multiplies_bf16(self) -> bool:
        return self.amx_bf16 or self.avx512_bf16 or self.arm_bf16

    @property
    def flags(self) -> list[str]:
        """Names of the instructions for bf16 that it has."""
        return [name for name in ("amx_bf16", "avx512_bf16", "arm_bf16", "avx_ne_convert") if getattr(self, name)]


def cpu() -> CPU:
    """Capabilities that may be used: all that this machine has, or none where `MOR_PLAIN_CPU` hides them."""
    return CPU() if hidden() else physical_cpu()


def hidden() -> bool:
    """Whether `MOR_PLAIN_CPU` hides capabilities. Raises ValueError for a value that says neither."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"{SWITCH}: expected 1 (hide what the CPU can do beyond plain instructions) or 0, got {value!r}"
        )
    return value == "1"


@functools.cache
def physical_cpu() -> CPU:
    """What the CPU has, whether it may be used or not."""
    has = _capabilities()
    return CPU(
        amx_bf16=bool(has.get("amx_bf16")),
        avx512_bf16=bool(has.get("avx512_bf16")),
        arm_bf16=bool(has.get("bf16")),
        avx_ne_convert=bool(has.get("avx_ne_convert")),
        packs_bf16=torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    )


def _capabilities() -> Mapping[str, object]:
    """torch's list, or Linux's where torch has none yet; on Arm both say `bf16`."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    names = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return dict.fromkeys(next(names, []), True)


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies weights of this type in an order of its own, prepared once."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu().packs_bf16)


def loading_dtype(saved: torch.dtype, device: torch.device) -> torch.dtype:
    """In what to load weights unless told: as saved, but fp32 for 16 bits where the device does not multiply those."""
    if device.type == "cpu" and (saved == torch.float16 or (saved == torch.bfloat16 and not cpu().multiplies_bf16)):
        return torch.float32
    return torch.float32 if saved == torch.bfloat16 and not multiplies_bf16(device) else saved


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16, so that bf16 is worth its rounding."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu().multiplies_bf16


def auto_precision(device: torch.device) -> tuple[Precision, str]:
    """What `auto` stands for on a device, and why: bf16 where the hardware multiplies it, else fp32."""
    name = describe(device)
    if multiplies_bf16(device):
        return "bf16", f"{name} multiplies bf16 in hardware"
    return "fp32", f"{name} does not multiply bf16 in hardware"


def device_here() -> torch.device:
    """An accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """The device in words, with the flags that matter."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    if device.type != "cpu":
        return device.type
    flags = ", ".join(cpu().flags) or "no bf16 instructions"
    return f"{cpu_name()} ({flags}{f', hidden by {SWITCH}' if hidden() and physical_cpu().flags else ''})"


def cpu_name() -> str:
    return str(_capabilities().get("cpu_name") or "this CPU").strip()


def require_bf16(device: torch.device) -> None:
    """Try a product in bf16. Raises ValueError, in one line, where torch refuses it on this device."""
    try:
        one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        torch.nn.functional.linear(one, one).sum().item()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"precision: torch refuses bf16 on {describe(device)}: {reason}; use precision=fp32 or auto"
        ) from error


def chunk_rows(vocabulary: int, kind: str) -> int:
    """Tokens whose logits are at hand at once, on a kind of device (`torch.device.type`): on a CPU those that take
    about 16 MiB in fp32, elsewhere a power of two of them that take at most 256 MiB in bf16, so that chunks are few and
    of one size.

    glibc hands blocks beyond 32 MiB back to the system each time, and fresh pages cost more than the arithmetic.
    """
    if kind == "cpu":
        return max(64, 2**22 // vocabulary)
    return max(64, 2 ** ((2**27 // vocabulary).bit_length() - 1))
