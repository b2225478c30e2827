"""How long a comparison takes, told from made-up runs on a made-up clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.estimate import Pace, time_left


def going(work: float, started: float, now: float, whole: float, start: float = 0.0) -> Pace:
    """A run that takes `start` seconds to begin and then `whole` at an even pace, looked at every second."""
    pace, second = Pace(work, started), started
    while second <= now:
        share = min(1.0, max(0.0, second - started - start) / whole)
        pace.saw(second, share, share * whole)
        second += 1.0
    return pace


def test_nothing_is_told_before_the_first_step():
    pace = Pace(1.0, 0.0)
    pace.saw(5.0, 0.0, 0.0)
    assert pace.left(5.0) is None and pace.whole() is None and time_left(5.0, [pace], [pace], [1.0], 2) is None


def test_one_line_tells_by_the_runs_own_clock():
    pace = Pace(1.0, 0.0)
    pace.saw(12.0, 0.1, 3.0)  # 9 s to start, 3 s for a tenth
    assert pace.left(12.0) == pytest.approx(27.0) and pace.whole() == pytest.approx(42.0)
    pace.saw(17.0, 0.1, 3.0)  # the same line again: time goes by
    assert pace.left(17.0) == pytest.approx(22.0)


@given(
    work=st.floats(1.0, 1e15),
    whole=st.floats(50.0, 1e4),
    start=st.floats(0.0, 10.0),
    waiting=st.integers(0, 6),
    slots=st.integers(1, 3),
)
def test_even_runs_are_foretold(work, whole, start, waiting, slots):
    """Runs that all go alike: those that run end together, the others follow in turns."""
    now = start + 0.4 * whole
    paces = [going(work, 0.0, now, whole, start) for _ in range(slots)]
    left = time_left(now, paces, paces, [work] * waiting, slots)
    turns = -(-waiting // slots)
    assert left == pytest.approx(0.6 * whole + turns * (whole + start), rel=0.1, abs=4 * (turns + 1))


def test_finished_runs_tell_of_those_that_wait():
    done = Pace(2.0, 0.0, ended=100.0)
    assert time_left(100.0, [done], [], [2.0, 4.0], 1) == pytest.approx(300.0)
    begun = Pace(2.0, 100.0)  # nothing seen of it yet: as long as the finished one, less what has gone by
    assert time_left(130.0, [done, begun], [begun], [], 1) == pytest.approx(70.0)


def test_a_resumed_run_stands_for_what_it_still_had_to_do():
    half = Pace(1.0, 0.0, first=(0.0, 0.5), latest=(50.0, 1.0), ended=50.0)
    assert half.whole() == pytest.approx(100.0)
