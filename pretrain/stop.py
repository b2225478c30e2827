"""A clean stop: signals and the stop file ask for it, the training loop obeys between two steps.

SIGTERM and SIGUSR1 (what a scheduler sends before it takes the machine away), SIGHUP (the terminal is gone; ignored
under nohup) and a file named `stop` in the run directory end the run after the current step with a checkpoint and exit
code 75 (EX_TEMPFAIL of sysexits.h): run it again. Ctrl-C does the same and exits with 130; a second Ctrl-C ends the
process at once. The file `requeue` in the run directory stands for exit code 75 where a launcher replaces exit codes by
its own. A run that cannot write its checkpoint ends with 74 (EX_IOERR) and without that file: to start it again before
there is room would change nothing.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

CANNOT_WRITE = 74
REQUEUE = 75
INTERRUPTED = 130
STOP_FILE = "stop"
REQUEUE_FILE = "requeue"
ONE_PRESS_SECONDS = 1.0  # a terminal tells every process of a Ctrl-C, and launchers pass it on: the same one twice

# What a file system refuses: full, over quota, broken, read-only, too large, gone.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}


def disk_error(error: BaseException | None) -> str | None:
    """What a file system refused, in one line, whichever library tells of it; None where `error` is something else."""
    if error is None:
        return None
    if isinstance(error, OSError):
        if error.errno not in DISK_ERRORS:
            return None
        return f"{error.filename}: {error.strerror}" if error.filename else os.strerror(error.errno)
    text = str(error)
    if type(error).__module__.startswith("safetensors"):
        found = re.search(r"os error (\d+)|code: (\d+)", text)
        number = int(found[1] or found[2]) if found else 0
        return os.strerror(number) if number in DISK_ERRORS else None
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return disk_error(error.__context__) or f"a file could not be written in full ({text})"  # torch.save names none
    return disk_error(error.__cause__) if error.__cause__ is not None else None


class StopRequest:
    """Whether this process was asked to stop. A context manager: inside it, signals ask instead of killing."""

    def __init__(self, folder: Path) -> None:
        """folder: the run directory, whose stop file counts too; an old one is removed on entry."""
        self._file = folder / STOP_FILE
        self._received: int | None = None
        self._pressed = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._file.unlink(missing_ok=True)
        asking = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        for number in asking:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            if time.monotonic() - self._pressed > ONE_PRESS_SECONDS:
                raise KeyboardInterrupt
            return
        self._pressed = time.monotonic()
        self._received = number

    @property
    def requested(self) -> bool:
        """Whether a signal has come or the stop file exists. Ranks differ for a moment: agree before acting."""
        return self._received is not None or self._file.exists()

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self._received == signal.SIGINT else REQUEUE
