"""The time of calls on the device: one CUDA graph of all of them, replayed many times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

LEAST_SAMPLES, MOST_SAMPLES = 10, 200

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median and the quartiles of the samples."""

    median: float
    low: float
    high: float
    samples: int
    graph: bool
    why_eager: str = ""


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def time_calls(calls: Sequence[Call], seconds: float, *, graph: bool = True) -> Timing:
    """Times the calls as one graph, or one after the other where they cannot be captured."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _in_turn(calls)
        torch.cuda.synchronize()
        run, why = _captured(calls, stream) if graph else (lambda: _in_turn(calls), "not asked")
        took = _sample(run, 3)
        count = int(seconds / max(statistics.median(took) * 1e-6, 1e-6))
        took = _sample(run, min(max(count, LEAST_SAMPLES), MOST_SAMPLES))
    each = [sample / len(calls) for sample in took]
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Timing(median, low, high, len(each), not why, why)


def _captured(calls: Sequence[Call], stream: torch.cuda.Stream) -> tuple[Call, str]:
    """What runs all calls, and why it is no graph if it is none."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            _in_turn(calls)
    except Exception as error:  # whatever keeps a kernel from being captured is told in the table
        torch.cuda.synchronize()
        return lambda: _in_turn(calls), f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return graph.replay, ""


def _in_turn(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _sample(run: Call, count: int) -> list[float]:
    """Microseconds of each of count runs, all queued before the first is waited for."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    run()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]
