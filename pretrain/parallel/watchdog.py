"""Watchdog: notices that the ranks make no progress, names the one that holds the others up, and stops all.

Every rank counts the points at which ranks meet (forward, backward, update, reductions) as it arrives, and a thread
publishes the count through a store of its own. Ranks that wait have arrived; the rank with the lowest count has not. A
rank whose thread no longer publishes is stopped, or its machine is gone.

Work that takes its time away from the meeting points (converting a checkpoint, a slow disk, an export) is announced by
`busy`: while a rank is busy and its thread lives, nobody is stopped, and rank 0 says now and then what they wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

STALLED = 70  # exit code of a run that the watchdog ended


@dataclass(frozen=True)
class Beat:
    """What a rank publishes: how many meeting points it has reached, the last one, and that its thread is alive.

    busy: what it does away from the meeting points, empty where it does nothing of the kind.
    """

    count: int
    place: str
    serial: int
    host: str
    pid: int
    busy: str = ""


class Watchdog:
    """One for each rank. limit_seconds: longest time in which a rank may reach no meeting point."""

    def __init__(self, rank: int, world_size: int, limit_seconds: float, store: dist.TCPStore) -> None:
        self.rank, self.world_size, self.limit_seconds, self.store = rank, world_size, limit_seconds, store
        self.interval = min(limit_seconds / 5, 10.0)
        self.count, self.place, self.serial = 0, "start", 0
        self.failure: Exception | None = None  # what ended the watch, for the main thread to raise
        self._busy: list[str] = []
        self._busy_told = 0.0  # when it was last said that the ranks wait for a busy one; 0 while none is busy
        self.seen: dict[int, Beat] = {}
        self.moved = dict.fromkeys(range(world_size), time.monotonic())  # when a rank's count last changed
        self.heard = dict.fromkeys(range(world_size), time.monotonic())  # when its thread was last heard of
        self._over = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @staticmethod
    def open_store(rank: int, world_size: int, limit_seconds: float, port: int) -> dist.TCPStore:
        """The store, kept by rank 0; `port` 0 takes a free one there."""
        address = os.environ["MASTER_ADDR"]
        timeout = timedelta(seconds=limit_seconds)
        return dist.TCPStore(address, port, world_size, rank == 0, timeout, wait_for_workers=False)

    def reached(self, place: str) -> None:
        """This rank arrives at a point where ranks meet."""
        self.count += 1
        self.place = place

    @contextlib.contextmanager
    def busy(self, what: str) -> Generator[None]:
        """This rank does `what`, however long it takes, and the others may wait for it."""
        self._busy.append(what)
        try:
            yield
        finally:
            self._busy.remove(what)

    def stop(self) -> None:
        """End the watch; the ranks need not meet again."""
        self._over.set()
        self._thread.join()

    def _publish(self) -> None:
        self.serial += 1
        busy = (self._busy[-1:] or [""])[0]
        fields = (self.count, self.place, self.serial, socket.gethostname(), os.getpid(), busy)
        self.store.set(f"beat/{self.rank}", "\t".join(str(field) for field in fields))

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            try:
                self._publish()
                beats = self.store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])
                self._judge([text.decode() for text in beats], time.monotonic())
            except Exception as error:
                if self._over.is_set():
                    return
                if isinstance(error, RuntimeError) and self.rank != 0:  # of the store, which rank 0 keeps
                    self._end("rank 0 does not respond: it was stopped, or its machine is gone", [0], True)
                self._fail(error)
                return

    def _fail(self, error: Exception) -> None:
        """The watch itself is broken: say so, and leave it to the main thread to stop."""
        traceback.print_exception(error, file=sys.stderr)
        self.failure = error

    def _judge(self, beats: list[str], now: float) -> None:
        """Take the ranks' beats in; stop all where the limit has passed."""
        for rank, text in enumerate(beats):
            count, place, serial, host, pid, what = text.split("\t")
            beat, before = Beat(int(count), place, int(serial), host, int(pid), what), self.seen.get(rank)
            if before is None or beat.count != before.count:
                self.moved[rank] = now
            if before is None or beat.serial != before.serial:
                self.heard[rank] = now
            self.seen[rank] = beat
        silent = any(now - heard > 3 * self.interval for heard in self.heard.values())
        busy = {rank: beat.busy for rank, beat in self.seen.items() if beat.busy}
        if busy and not silent:  # the limit counts for nobody
            self.moved = dict.fromkeys(self.moved, now)
            self._tell_busy(busy, now)
        elif not busy:
            self._busy_told = 0.0
        if now - min(self.moved.values()) > self.limit_seconds:
            self._end(*self.diagnose(now))

    def _tell_busy(self, busy: dict[int, str], now: float) -> None:
        """Once in `limit_seconds`, rank 0 says what the ranks wait for."""
        self._busy_told = self._busy_told or now
        if now - self._busy_told > self.limit_seconds:
            self._busy_told = now
            if self.rank == 0:
                told = "; ".join(f"rank {rank}: {what}" for rank, what in busy.items())
                print(f"watchdog: the ranks wait for work under way ({told})", file=sys.stderr, flush=True)

    def diagnose(self, now: float) -> tuple[str, list[int], bool]:
        """Which ranks hold the others up, in words and by number, and whether they are silent."""
        silent = [rank for rank, heard in self.heard.items() if now - heard > 3 * self.interval]
        if silent:
            return f"{_ranks(silent)} not responding: stopped, or the machine is gone", silent, True
        lowest = min(beat.count for beat in self.seen.values())
        late = [rank for rank, beat in self.seen.items() if beat.count == lowest]
        places = ", ".join(sorted({self.seen[rank].place for rank in late}))
        if len(late) == self.world_size:
            return f"all ranks stand in {places}: a collective hangs", late, False
        return f"{_ranks(late)} holding the others up, last seen in {places}", late, False

    def _end(self, reason: str, culprits: list[int], silent: bool) -> None:
        who = ", ".join(f"rank {r} is pid {b.pid} on {b.host}" for r, b in self.seen.items() if r in culprits)
        print(f"watchdog: no progress for {self.limit_seconds:g} s; {reason} ({who}). Stopping.", file=sys.stderr)
        if self.rank in culprits:
            faulthandler.dump_traceback(sys.stderr)
            if len(culprits) < self.world_size:
                time.sleep(2 * self.interval)  # its end breaks the others' connections; let them report first
        for beat in (self.seen[rank] for rank in culprits if silent and rank in self.seen):
            if beat.host == socket.gethostname():  # a process that was stopped does not end by itself
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
        sys.stderr.flush()
        os._exit(STALLED)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
