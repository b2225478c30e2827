"""Requests to stop: which signals ask, what they end with, and what counts as one Ctrl-C or two."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pretrain import stop
from pretrain.stop import INTERRUPTED, REQUEUE, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_asks_and_the_handler_before_is_back_afterwards(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest(tmp_path) as request:
        assert not request.requested
        signal.raise_signal(number)
        assert request.requested and request.exit_code == REQUEUE
    assert signal.getsignal(number) == before


def test_under_nohup_a_hangup_asks_for_nothing(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path) as request:
            signal.raise_signal(signal.SIGHUP)
            assert not request.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_press_that_a_launcher_passes_on_counts_once_and_a_second_press_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends SIGINT to launcher and ranks alike, and torchrun sends its ranks another."""
    with StopRequest(tmp_path) as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert request.requested and request.exit_code == INTERRUPTED
        monkeypatch.setattr(stop, "ONE_PRESS_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_old_stop_file_is_removed_and_a_new_one_asks(tmp_path: Path) -> None:
    (tmp_path / stop.STOP_FILE).touch()
    with StopRequest(tmp_path) as request:
        assert not request.requested
        (tmp_path / stop.STOP_FILE).touch()
        assert request.requested and request.exit_code == REQUEUE
