"""The pure parts of `expertd bench`: when calls are due, who makes them, what the figures are."""

from __future__ import annotations

import itertools
import multiprocessing
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.bench.load import Cell, Layer, make_call
from expertd.bench.pace import Pace
from expertd.bench.plot import plot
from expertd.bench.summary import summarize
from expertd.bench.target import Target
from expertd.bench.workers import Outcome, Sample, Share, Workers, split
from expertd_client import ExpertdError

LAYER = Layer(Target("nowhere:1"), "demo", 0, 64, 8, 2, 0, 8)
MS = 1_000_000


def test_a_closed_loop_calls_as_soon_as_it_may_and_ends() -> None:
    pace = Pace(2.0, rate=0, seed=0)
    assert [pace.next(now) for now in (0.0, 1.5, 1.99, 2.0, 3.0)] == [0.0, 1.5, 1.99, None, None]


def test_an_open_loop_keeps_its_rate_whatever_the_time_is() -> None:
    pace = Pace(100.0, rate=50, seed=3)
    due = [at for at in iter(lambda: pace.next(1e9), None) if at is not None]
    assert due == sorted(due) and due[0] > 0 and due[-1] < 100
    assert 4500 < len(due) < 5500
    gaps = np.diff(due)
    assert 0.8 < gaps.std() / gaps.mean() < 1.2, "Poisson arrivals: as wide as their mean"


@given(callers=st.integers(1, 200), processes=st.integers(1, 32), rate=st.floats(0, 1e5))
def test_no_caller_is_lost_among_the_processes(callers: int, processes: int, rate: float) -> None:
    shares = split(Share(LAYER, Cell(4, callers, rate), 1.0, 7, "topk"), processes)
    assert len(shares) == min(callers, processes)
    assert sum(share.cell.concurrency for share in shares) == callers
    assert sum(share.cell.rate for share in shares) == pytest.approx(rate)
    assert len({share.seed for share in shares}) == len(shares)


def test_a_process_of_callers_that_is_killed_is_told() -> None:
    share = Share(LAYER, Cell(1, 1), 1.0, 0, "topk")
    with Workers(1) as workers:
        (child,) = multiprocessing.active_children()
        child.kill()
        child.join()
        with pytest.raises(ExpertdError, match="killed"):
            workers.run([share])


def test_the_bytes_of_a_call_are_those_that_travel() -> None:
    call = make_call(LAYER, 3, 0, "topk")
    assert call.options["topk_ids"].shape == (3, 2)
    assert call.nbytes == 2 * 3 * 64 * 2 + 3 * 2 * 4 + 3 * 2 * 4
    assert make_call(LAYER, 3, 0, "logits").nbytes == 2 * 3 * 64 * 2 + 3 * 8 * 4
    bare = Layer(Target("nowhere:1"), "echo", 0, 64, 0, 0, 0, 0)
    assert make_call(bare, 3, 0).nbytes == 2 * 3 * 64 * 2


def sample(latency: float, launch: int = 0, reason: str = "") -> Sample:
    if reason:
        return Sample(int(latency * MS), reason=reason)
    return Sample(int(latency * MS), 1 * MS, 2 * MS, 3 * MS + launch, reason)


def test_the_figures_of_a_cell() -> None:
    many = [sample(latency + 10, launch=latency // 4) for latency in range(100)]
    refused = [sample(0.5, reason="OVERLOADED"), sample(1.5, reason="OVERLOADED")]
    outcomes = [Outcome(1.5, many[:50] + refused), Outcome(2.0, many[50:])]
    told = summarize(Cell(16, 8), nbytes=10**6, outcomes=outcomes)
    assert (told.calls, told.calls_per_s, told.tokens_per_s) == (100, 50.0, 800.0)
    assert told.gb_per_s == pytest.approx(0.05)
    assert told.latency_ms == pytest.approx({"p50": 59.5, "p90": 99.1, "p99": 108.01, "max": 109})
    assert told.mean_batch == 4
    split_ms = {"queue": 1.0, "stages": 2.0, "kernel": 3.0, "rpc": 59.5 - 6}
    assert told.split_ms == pytest.approx(split_ms, rel=1e-4)
    assert told.refused == {"OVERLOADED": 2} and told.refused_p50_ms == 1.0


def test_a_cell_without_answers_has_figures_too() -> None:
    told = summarize(Cell(1, 1), 1, [Outcome(1.0, [sample(2, reason="UNAVAILABLE")])])
    assert (told.calls, told.calls_per_s, told.mean_batch) == (0, 0.0, 0.0)
    assert told.refused == {"UNAVAILABLE": 1} and told.refused_p50_ms == 2.0


def test_the_plot_shows_every_answered_cell_and_nothing_outside() -> None:
    cells = [Cell(*sizes) for sizes in itertools.product((1, 16), (1, 8))]
    told = [
        summarize(cell, 1, [Outcome(1.0, [sample(2.0**place)] * (place + 1))])
        for place, cell in enumerate(cells)
    ]
    silent = summarize(Cell(4096, 1), 1, [Outcome(1.0, [])])
    text = plot("a <title> & more", [*told, silent])
    root = ElementTree.fromstring(text)
    circles = root.findall("{*}circle")
    assert len(circles) == 2 * len(cells)
    assert all(64 <= float(circle.attrib["cx"]) <= 610 for circle in circles)
    assert all(64 <= float(circle.attrib["cy"]) <= 376 for circle in circles)
    told = [circle.findtext("{*}title") or "" for circle in circles]
    assert sum(" callers: " in text or " caller: " in text for text in told) == len(circles)
    shown = {label.text for label in root.findall("{*}text")}
    assert {"a <title> & more", "1 token a call", "16 tokens a call"} <= shown
    assert "4096 tokens a call" not in shown
    assert ElementTree.fromstring(plot("none", [])) is not None


def test_a_busy_server_has_not_failed() -> None:
    def failed(*reasons: str) -> dict[str, int]:
        samples = [Sample(MS, reason=reason) for reason in reasons]
        return summarize(Cell(1, 1), 1, [Outcome(1.0, samples)]).failed

    assert failed("", "OVERLOADED", "OVERLOADED") == {}
    assert failed("OVERLOADED", "INTERNAL", "", "INTERNAL") == {"INTERNAL": 2}
