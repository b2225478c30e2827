"""`torchrun` that lets ranks stop in order, and ends with the exit status of the first rank that failed.

torchrun itself ends its ranks 30 s after a SIGTERM, whatever their step and their checkpoint take, and exits with 1
whatever they exited with, so that a scheduler cannot tell a run that asks to be started again (75, after a checkpoint)
from one that failed. Here SIGTERM, SIGUSR1, SIGINT and SIGHUP (not under nohup) go to the ranks, which are then waited
for. The arguments are torchrun's own; `--shutdown-timeout SECONDS` (or TORCH_ELASTIC_SHUTDOWN_TIMEOUT; 900) is when
ranks that have not ended by then are killed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

if __name__ == "__main__":
    gc.disable()  # until all is imported (exit_status)

import psutil
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

PATIENCE_SECONDS = 900.0
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
OPTION, VARIABLE = "--shutdown-timeout", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's own names, since torch 2.12
HANDLER = "_terminate_process_handler"  # of torchelastic, in torch 2.11 to 2.13
# A user's mistake, no checkpoint could be saved, the request to be started again, Ctrl-C: the ranks have said it all.
EXPLAINED = (2, 74, 75, 130)


class PassedOn:
    """Passes signals on to the processes that this one has started. A context manager.

    Before there are any a signal does what it does without this; once they are gone it does nothing, nor after the
    context, where this process itself ends. Ranks that are still there `patience` seconds after the first signal are
    killed.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._started = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> PassedOn:
        for number in PASSED_ON:
            if number != signal.SIGHUP or not self.nohup:
                signal.signal(number, self.receive)
        # torchelastic sets a handler of its own where it starts its ranks, for SIGHUP also under nohup. It looks this
        # name up there; what stands behind it would raise SignalException, whose way out is the kill after 30 s.
        self._before = getattr(api, HANDLER)
        setattr(api, HANDLER, self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(api, HANDLER, self._before)
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)  # Python takes its handlers back as it ends, and the default kills
        if self._timer is not None:
            self._timer.cancel()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        if number == signal.SIGHUP and self.nohup:
            return
        children = psutil.Process().children()
        self._started = self._started or bool(children)
        if not self._started:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for child in children:
            _send(child, number)
        if self._timer is None:
            self._timer = threading.Timer(self.patience, self._lose_patience, [signal.Signals(number).name])
            self._timer.daemon = True
            self._timer.start()

    def _lose_patience(self, name: str) -> None:
        late = psutil.Process().children(recursive=True)
        if late:
            print(f"{len(late)} processes still there {self.patience:g} s after {name} ({OPTION}): killed", flush=True)
        for process in late:
            _send(process, signal.SIGKILL)


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
        process.send_signal(number)


def exit_status(launch: Callable[[], object], patience: float) -> int:
    """Call `launch`, which starts ranks and waits for them; 0, the first failed rank's status, or 128 + its signal."""
    gc.freeze()  # what is imported stays, and need not be looked through again
    gc.enable()
    try:
        with PassedOn(patience):
            launch()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode not in EXPLAINED:
            print(error, file=sys.stderr)
        status = failure.exitcode
    except subprocess.CalledProcessError as error:  # of accelerate's launcher of a single process
        if error.returncode not in EXPLAINED:
            print(error, file=sys.stderr)
        status = error.returncode
    except api.SignalException as error:  # SIGQUIT
        status = -error.sigval
    else:
        return 0
    return status if status > 0 else 128 - status


def take_patience(arguments: Sequence[str]) -> tuple[float, list[str]]:
    """(seconds, the other arguments). Only what stands before the script's name is the launcher's."""
    seconds, rest = float(os.environ.get(VARIABLE, PATIENCE_SECONDS)), list(arguments)
    for position, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if argument.endswith(".py"):
            break
        if name.replace("_", "-") == OPTION:
            length = 1 if equals else 2
            seconds = float(value if equals else rest[position + 1])
            del rest[position : position + length]
            break
    return seconds, rest


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments`; its ranks' exit status, as `exit_status`."""
    patience, rest = take_patience(arguments)
    return exit_status(lambda: torchrun(rest), patience)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
