"""Speeds, latencies, rations and pauses, on a clock of the tests' own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertd_client.fleet.pace import (
    FRESH_SECONDS,
    MOST_HINT_SECONDS,
    SETTLE_SECONDS,
    Allowance,
    Latencies,
    Pace,
    Pause,
)


def test_speed_is_what_was_done_while_busy() -> None:
    pace = Pace()
    assert pace.speed(0.0) is None
    pace.finished(1000, begin=10.0, now=11.0)
    assert pace.speed(11.0 + SETTLE_SECONDS) == 1000
    pace.finished(1000, begin=10.0, now=12.0)
    assert pace.speed(12.0) == 1000, "the second waited a second for the first"
    for second in range(12, 40):
        pace.finished(4000, begin=float(second), now=second + 1.0)
    assert 3800 < (pace.speed(40.0) or 0) < 4001


def test_first_answers_are_no_measure() -> None:
    """They tell the length of the way, which later ones have gone already."""
    pace = Pace()
    for number in range(20):
        now = 10.03 + number / 100
        pace.finished(100, begin=10.0 + number / 100, now=now)
        assert pace.speed(now) is None
    assert 9_000 < (pace.speed(10.03 + SETTLE_SECONDS) or 0) < 10_001


def test_old_speeds_are_forgotten() -> None:
    pace = Pace()
    pace.finished(10, begin=0.0, now=10.0)
    assert pace.speed(10.0 + SETTLE_SECONDS) == 1
    assert pace.speed(10.0 + FRESH_SECONDS) is None
    pace.finished(1000, begin=50.0, now=51.0)
    assert pace.speed(51.0) is None and pace.speed(51.0 + SETTLE_SECONDS) == 1000


def test_latencies_by_size() -> None:
    known = Latencies()
    for number in range(100):
        assert (known.p95(8) is None) == (number < 16)
        known.add(8, number / 100)
    assert known.p95(8) == known.p95(15) == 0.95
    assert known.p95(16) is None and known.p95(7) is None


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60))
def test_an_allowance_is_never_exceeded(steps: list[tuple[float, bool]]) -> None:
    allowance, now, taken, earned = Allowance(5.0, 2.0, 0.5), 0.0, 0, 0
    for wait, answered in steps:
        now += wait
        taken += allowance.take(now)
        if answered:
            allowance.earn()
            earned += 1
    assert taken <= 5 + 2 * now + 0.5 * earned + 1e-6


def test_an_allowance_comes_back() -> None:
    allowance = Allowance(1.0, 0.0, 0.5)
    assert allowance.take(0.0) and not allowance.take(1e9)
    allowance.earn()
    assert not allowance.take(1e9)
    allowance.earn()
    assert allowance.take(1e9)


def test_pauses_grow_and_end() -> None:
    pause, now, lengths = Pause(first=1.0, longest=8.0), 100.0, []
    for _ in range(8):
        pause.failed(now)
        lengths.append(pause.until - now)
        now = pause.until
        assert pause.over(now) and not pause.over(now - 0.01)
    for length, most in zip(lengths, (1, 2, 4, 8, 8, 8, 8, 8), strict=True):
        assert most / 2 <= length <= most
    pause.succeeded()
    assert pause.over(0.0)
    pause.failed(now, hint=0.25)
    assert pause.until == now + 0.25


def test_nobodys_wish_to_be_left_alone_is_obeyed_for_ever() -> None:
    pause = Pause()
    pause.failed(0.0, hint=1e9)
    assert not pause.over(MOST_HINT_SECONDS / 2) and pause.over(MOST_HINT_SECONDS)
