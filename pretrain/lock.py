"""One process at a time in a run directory: a lock file that needs no flock, and that outlives no owner for long.

`RUN_DIR/lock` says who trains there: host, process, Slurm job, and by its time of change that the owner lives. It is
written aside and linked into its place, which only one process can do (where a file system has no links: created with
O_EXCL). A thread touches it every `BEAT_SECONDS`. Whoever finds it taken judges the owner:

    on this host             dead if its process is gone, or another has its number since
    an earlier start of      dead: Slurm starts a job anew only after its processes have ended
    the same Slurm job
    elsewhere                dead once it has not been touched for `STALE_SECONDS`, by the file system's own clock

A dead owner's lock is moved away and the directory taken over. An owner whose lock was taken finds that out at its next
beat (`failure`) and has to stop. A branch is covered by its trunk's lock (`owner_of`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.settings import UserError

LOCK = "lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
SAME_JOB_SECONDS = 30.0  # how long a job that starts anew waits for processes of its own that are still ending


@dataclass(frozen=True)
class Owner:
    """Who holds a run directory. started: of the process, in the kernel's ticks; namespace: of process numbers."""

    token: str
    host: str
    namespace: str
    pid: int
    started: str
    job: str
    restarts: int

    @staticmethod
    def this(environment: Mapping[str, str]) -> Owner:
        """This process."""
        job = environment.get("SLURM_JOB_ID", "")
        if task := environment.get("SLURM_ARRAY_TASK_ID"):
            job = f"{environment.get('SLURM_ARRAY_JOB_ID', job)}_{task}"
        restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        pid = os.getpid()
        return Owner(uuid.uuid4().hex, socket.gethostname(), _namespace(), pid, _started(pid), job, restarts)

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_dead(self, seen_by: Owner, age: float) -> bool:
        """Whether the process is gone, as far as `seen_by` can tell. age: seconds since it last touched its lock."""
        if self.job and self.job == seen_by.job and self.restarts < seen_by.restarts:
            return not self._runs_beside(seen_by)
        if (self.host, self.namespace) == (seen_by.host, seen_by.namespace):
            return not self._runs_beside(seen_by)
        return age > STALE_SECONDS

    def _runs_beside(self, other: Owner) -> bool:
        """Whether it is a process of the other's host that still runs."""
        beside = (self.host, self.namespace) == (other.host, other.namespace)
        return beside and _started(self.pid) == self.started != ""


def owner_of(folder: Path) -> Path:
    """The run directory whose lock covers `folder`: itself, or the trunk (or longer run) whose branch it is."""
    above = folder.parent.parent
    return above if folder.parent.name == "branches" and (above / "config.yaml").is_file() else folder


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """When process `pid` of this host began, "" if there is none or it has ended; without /proc, whether it runs."""
    if os.path.isdir("/proc/self"):
        try:
            state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (OSError, ValueError):
            return ""
        return "" if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "runs"


class RunLock:
    """The lock of one run directory, as a context manager: held inside it."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.folder, self.path = folder, folder / LOCK
        self.owner = Owner.this(environment)
        self.failure: Exception | None = None  # the lock is lost, or can no longer be looked at
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._made: list[Path] = []  # folders, innermost first

    def __enter__(self) -> RunLock:
        """Take the lock. Raises UserError that names the owner where another process holds it."""
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._take()
        except BaseException:
            self._leave_no_folder()
            raise
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if self._holder() == self.owner:
                self.path.unlink()
        self._leave_no_folder()

    def _leave_no_folder(self) -> None:
        """Remove the folders that were made for the lock if they hold nothing else."""
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _take(self) -> None:
        own = self.folder / f"{LOCK}.{self.owner.token}"
        own.write_text(json.dumps(asdict(self.owner)), encoding="utf-8")
        patience = time.monotonic() + SAME_JOB_SECONDS
        try:
            while not self._link(own):
                os.utime(own)
                holder, age = self._holder(), self._age(own)
                if holder is None and age is None:
                    continue  # released just now
                if holder is None and (age or 0) <= STALE_SECONDS:
                    self._refuse("a process that has not said who it is", age)
                elif holder is None or holder.is_dead(self.owner, age or 0.0):
                    self._remove_dead(holder)
                elif holder.job and holder.job == self.owner.job and time.monotonic() < patience:
                    time.sleep(0.5)
                else:
                    self._refuse(str(holder), age)
        finally:
            own.unlink(missing_ok=True)

    def _refuse(self, holder: str, age: float | None) -> None:
        raise UserError(
            f"{self.folder}: {holder} is at work there (it was heard of {age or 0:.0f} s ago). Stop it, or give "
            f"another folder; if it is gone, this works {STALE_SECONDS:.0f} s after it was last heard of"
        )

    def _link(self, own: Path) -> bool:
        """Put the lock into its place if it is free; whether that was done."""
        try:
            os.link(own, self.path)
        except FileExistsError:
            return False
        except OSError:  # no links here
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(own.read_text(encoding="utf-8"))
        return True

    def _holder(self) -> Owner | None:
        """Whom the lock names; None where there is none, or it cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Owner(**json.loads(self.path.read_text(encoding="utf-8")))
        return None

    def _age(self, own: Path) -> float | None:
        """Seconds since the lock was touched, by the clock that also dates `own`; None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return own.stat().st_mtime - self.path.stat().st_mtime
        return None

    def _remove_dead(self, holder: Owner | None) -> None:
        """Move a dead owner's lock away; should another have taken it over meanwhile, put that one's back."""
        aside = self.folder / f"{LOCK}.{self.owner.token}.dead"
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            with contextlib.suppress(ValueError, TypeError):
                found: Any = Owner(**json.loads(aside.read_text(encoding="utf-8")))
                if found != holder:
                    with contextlib.suppress(OSError):
                        os.link(aside, self.path)
            aside.unlink()

    def _beat(self) -> None:
        """The thread: touch the lock, and see that it is still this process's."""
        last = time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._touch()
                last = time.monotonic()
            except OSError as error:  # a file system may be away for a moment
                if time.monotonic() - last > STALE_SECONDS:
                    self.failure = UserError(f"{self.path}: the lock of this run is gone ({error}); stopped")
                    return
            except Exception as error:
                self.failure = error
                return

    def _touch(self) -> None:
        """Touch the lock; make it anew where somebody has deleted it. Raises UserError where it is another's."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError), self.path.open("x", encoding="utf-8") as file:
                json.dump(asdict(self.owner), file)
        holder = self._holder()
        if holder is not None and holder != self.owner:
            raise UserError(f"{self.folder}: {holder} has taken this run over; stopped here")
