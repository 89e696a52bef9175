"""The one thread that owns the device, and the one that waits for its results.

On the processor a batch is done when its launch returns, and one thread does both.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NoReturn

import torch

from expertd.engine.batcher import Batcher, unavailable
from expertd.engine.choice import choose_backend
from expertd.engine.faults import DeviceLost, meaning
from expertd.engine.flight import Flight
from expertd.engine.launch import launch
from expertd.engine.observer import Observer
from expertd.engine.staging import Staging
from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError, Internal

log = logging.getLogger(__name__)

BROKEN = "broken: its executor died, see its log"
LOST = "restarting: its device is lost"


class Executor:
    """Runs batches until the batcher is closed and drained; if it dies, nobody is left waiting.

    Each of the stagings takes one batch at a time; with more than one, a batch is launched while
    the one before it still computes. on_lost is called before anybody is told that the device is.
    """

    def __init__(
        self,
        batcher: Batcher,
        stagings: Sequence[Staging],
        observer: Observer,
        on_lost: Callable[[], None],
    ) -> None:
        self._batcher = batcher
        self._observer = observer
        self._on_lost = on_lost
        self._stagings = stagings
        self._overlaps = len(stagings) > 1
        self._free: SimpleQueue[Staging] = SimpleQueue()
        for staging in stagings:
            self._free.put(staging)
        self._landing: SimpleQueue[Flight | None] = SimpleQueue()
        self._running: list[Sequence[Ticket]] = []
        self._failed = threading.Event()
        self._over = threading.Event()
        self._dying = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._lander = threading.Thread(target=self._land_all, name="lander", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self._overlaps:
            self._lander.start()

    def join(self, timeout: float) -> bool:
        """Waits for the last answer; True if it was given."""
        return self._over.wait(timeout)

    @property
    def failed(self) -> bool:
        """Whether a thread died of anything but an orderly drain."""
        return self._failed.is_set()

    def _run(self) -> None:
        try:
            self._stagings[0].work_here()
            with torch.inference_mode():
                while self._run_batch(self._free.get()):
                    pass
        except BaseException as error:
            self._die(error)
        finally:
            self._landing.put(None)
            if not self._overlaps:
                self._over.set()

    def _run_batch(self, staging: Staging) -> bool:
        """Launches the next batch; False when there will be none."""
        tickets = self._batcher.next_batch()
        if not tickets:
            return False
        self._running.append(tickets)
        try:
            tokens = sum(ticket.tokens for ticket in tickets)
            backend = choose_backend(tickets[0].resident, tickets[0].form, tokens)
            flight = launch(staging, backend, tickets)
        except Exception as error:
            self._give_up(tickets, staging, error)
        else:
            if self._overlaps:
                self._landing.put(flight)
            else:
                self._land(flight)
        return True

    def _land_all(self) -> None:
        try:
            self._stagings[0].work_here()
            with torch.inference_mode():
                while self._land_next():
                    pass
            self._over.set()
        except BaseException as error:
            self._die(error)

    def _land_next(self) -> bool:
        """False when there will be none; while it waits, nothing of the last one is kept."""
        flight = self._landing.get()
        if flight is not None:
            self._land(flight)
        return flight is not None

    def _land(self, flight: Flight) -> None:
        """Answers a batch's calls when the device has done with it."""
        try:
            if self._overlaps:
                flight.staging.wait_computed()
                self._batcher.computed(flight.tickets)
            answers, report = flight.land()
        except Exception as error:
            self._give_up(flight.tickets, flight.staging, error)
            return
        self._observer.ran(report)
        # Answers last: whoever gets one wants Python's lock, which this thread is about to give up.
        self._make_way(flight.tickets, flight.staging)
        for ticket, answer in zip(flight.tickets, answers, strict=True):
            if isinstance(answer, ExpertdError):
                ticket.future.set_exception(answer)
            else:
                ticket.future.set_result(answer)
        self._running.remove(flight.tickets)

    def _give_up(self, tickets: Sequence[Ticket], staging: Staging, error: Exception) -> None:
        """Ends a batch that failed; raises DeviceLost if nothing may follow it."""
        self._refuse(tickets, error)
        _recover(staging)
        self._make_way(tickets, staging)
        self._running.remove(tickets)

    def _make_way(self, tickets: Sequence[Ticket], staging: Staging) -> None:
        """Lets the next batch begin."""
        if self._overlaps:
            self._batcher.computed(tickets)
        self._free.put(staging)

    def _refuse(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Tells the calls of a failed batch why; raises DeviceLost if nothing may follow it."""
        told = meaning(error)
        if not isinstance(error, ExpertdError):
            name = tickets[0].resident.name
            level = logging.ERROR if isinstance(told, Internal) else logging.WARNING
            log.log(level, "a batch of layer %s failed", name, exc_info=error)
        _fail(tickets, told)

    def _die(self, error: BaseException) -> None:
        lost = isinstance(error, DeviceLost)
        log.critical("the executor died; this process takes no more calls", exc_info=error)
        with self._dying:
            self._failed.set()
            if lost:
                self._on_lost()
            why = LOST if lost else BROKEN
            self._batcher.fail_all(why)
            for tickets in list(self._running):
                _fail(tickets, unavailable(why))
        self._free.put(self._stagings[0])  # an executor that waits for one sees that it is over
        self._over.set()
        if lost:
            _hold_on()


def _hold_on() -> NoReturn:
    """Never returns, so that the error's frames keep what the lost device was told to write.

    Freeing that aborts the process before it can end as it should.
    """
    while True:
        time.sleep(3600)


def _recover(staging: Staging) -> None:
    """Clears up after a failed launch; a device that cannot even do that is lost."""
    try:
        staging.recover()
    except Exception as error:
        raise DeviceLost("the device answers no more") from error


def _fail(tickets: Sequence[Ticket], error: ExpertdError) -> None:
    for ticket in tickets:
        if not ticket.future.done():
            ticket.future.set_exception(error)
