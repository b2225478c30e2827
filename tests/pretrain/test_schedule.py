"""Schedules: exact values at the corners, and laws that hold everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.schedule import Schedule

TRAPEZOID = Schedule("trapezoid", warmup_steps=5, warmup_progress=0.05, decay_share=0.2)


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [schedule.factor(step, step / steps) for step in range(steps)]


def test_trapezoid_rises_holds_and_falls_to_its_last_share() -> None:
    values = rates(TRAPEZOID, 100)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[5:80] == [1.0] * 75
    assert values[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def test_cosine_starts_at_the_peak_passes_half_and_ends_at_the_final_share() -> None:
    schedule = Schedule("cosine", 10, 0.1, 0.2, final_share=0.1)
    assert schedule.factor(10, 0.1) == pytest.approx(1.0)
    assert schedule.factor(55, 0.55) == pytest.approx(0.55)
    assert schedule.factor(100, 1.0) == pytest.approx(0.1)


def test_no_decay_holds_the_plateau_to_the_end() -> None:
    assert Schedule("trapezoid", 0, 0.0, 0.0).factor(99, 0.99) == 1.0


def test_the_cool_down_begins_where_the_budget_is_needed() -> None:
    assert not TRAPEZOID.cooling(0.7999)
    assert TRAPEZOID.cooling(0.8)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["trapezoid", "cosine"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.integers(0, 20),
)
def test_after_the_warm_up_the_rate_never_rises_nor_leaves_its_bounds(
    kind: str, one: float, other: float, warmup: float, final: float, steps: int
) -> None:
    schedule = Schedule(kind, steps, warmup, 0.2, final)  # type: ignore[arg-type]
    early, late = sorted((one, other))
    first, second = schedule.factor(steps, early), schedule.factor(steps + 1, late)
    assert 1 + 1e-12 >= first >= second >= final - 1e-12


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.79), st.integers(2, 10))
def test_plateau_does_not_know_its_budget(progress: float, scale: int) -> None:
    assert TRAPEZOID.factor(50, progress) == TRAPEZOID.factor(50, progress / scale)
