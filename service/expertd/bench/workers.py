"""Callers in processes of their own, so that none waits for another's interpreter."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

from expertd.bench.carriers import Carrier
from expertd.bench.load import Call, Cell, Layer, make_call
from expertd.bench.pace import Pace
from expertd_client import ExpertdError
from expertd_client.closing import Closing

WARM_UP_CALLS = 2


class Sample(NamedTuple):
    """One answered or refused call; times in nanoseconds, latency from when it was due."""

    latency: int
    queued: int = 0
    staged: int = 0
    computed: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """What one process does of a cell."""

    layer: Layer
    cell: Cell
    seconds: float
    seed: int
    routing: str


@dataclass(slots=True)
class Outcome:
    """What became of a share: how long it took, and every call."""

    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)


class Workers(Closing):
    """Processes that wait for their shares."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._lines: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._lines.append(ours)
            self._processes.append(process)

    def run(self, shares: Sequence[Share]) -> list[Outcome]:
        """Runs one share in each process, all at once; raises what a worker did."""
        lines = self._lines[: len(shares)]
        try:
            for line, share in zip(lines, shares, strict=True):
                line.send(share)
            outcomes = [line.recv() for line in lines]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ExpertdError(
                "a process of callers was killed; is there memory for all?"
            ) from None
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def close(self) -> None:
        for line, process in zip(self._lines, self._processes, strict=True):
            line.close()
            process.terminate()
            process.join()


def split(share: Share, processes: int) -> list[Share]:
    """A cell's callers and rate, divided among at most so many processes."""
    count = min(processes, share.cell.concurrency)
    callers = [len(range(number, share.cell.concurrency, count)) for number in range(count)]
    return [
        Share(
            share.layer,
            Cell(share.cell.tokens, mine, share.cell.rate * mine / share.cell.concurrency),
            share.seconds,
            share.seed + number,
            share.routing,
        )
        for number, mine in enumerate(callers)
    ]


def _work(line: Connection) -> None:
    """A process's life: shares in, outcomes out, until the line is closed."""
    while True:
        try:
            share = line.recv()
        except (EOFError, KeyboardInterrupt):
            return
        outcome: Outcome | Exception
        try:
            outcome = run_share(share)
        except Exception as error:
            outcome = error
        try:
            line.send(outcome)
        except BrokenPipeError:  # the bench was ended meanwhile
            return


def run_share(share: Share) -> Outcome:
    """All callers of one process, as threads that share what the carrier shares."""
    call = make_call(share.layer, share.cell.tokens, share.seed, share.routing)
    with share.layer.open() as carrier:
        for _ in range(WARM_UP_CALLS):
            _answer(carrier, share.layer, call)
        outcome, lock = Outcome(), threading.Lock()
        pace = Pace(share.seconds, share.cell.rate, share.seed)
        begin = time.perf_counter()

        def caller() -> None:
            mine = _calls(carrier, share.layer, call, pace, begin)
            with lock:
                outcome.samples += mine

        with ThreadPoolExecutor(share.cell.concurrency) as pool:
            for future in [pool.submit(caller) for _ in range(share.cell.concurrency)]:
                future.result()
        outcome.seconds = time.perf_counter() - begin
    return outcome


def _calls(carrier: Carrier, layer: Layer, call: Call, pace: Pace, begin: float) -> list[Sample]:
    samples = []
    while (due := pace.next(time.perf_counter() - begin)) is not None:
        if (early := begin + due - time.perf_counter()) > 0:
            time.sleep(early)
        times = _answer(carrier, layer, call)
        latency = time.perf_counter() - begin - due
        samples.append(times._replace(latency=int(latency * 1e9)))
    return samples


def _answer(carrier: Carrier, layer: Layer, call: Call) -> Sample:
    try:
        return Sample(0, *carrier.ask(layer.model, layer.number, call.rows, call.options))
    except ExpertdError as error:
        return Sample(0, reason=error.reason)
