"""The one thread that owns the device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from expertd.engine.batcher import Batcher, unavailable
from expertd.engine.choice import choose_backend
from expertd.engine.launch import launch
from expertd.engine.observer import Observer
from expertd.engine.staging import Staging
from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError, Internal

log = logging.getLogger(__name__)

BROKEN = "broken: its executor died, see its log"


class Executor:
    """Runs batches until the batcher is closed and drained; if it dies, nobody is left waiting."""

    def __init__(self, batcher: Batcher, device: torch.device, observer: Observer) -> None:
        self._batcher = batcher
        self._observer = observer
        self._staging = Staging(device)
        self._running: Sequence[Ticket] = ()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the thread; True if it ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the thread died of anything but an orderly drain."""
        return self._failed.is_set()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while tickets := self._batcher.next_batch():
                    self._run_batch(tickets)
        except BaseException:
            log.critical("the executor died; this process takes no more calls", exc_info=True)
            self._failed.set()
            self._batcher.fail_all(BROKEN)
            _fail(self._running, unavailable(BROKEN))

    def _run_batch(self, tickets: list[Ticket]) -> None:
        self._running = tickets
        try:
            tokens = sum(ticket.tokens for ticket in tickets)
            backend = choose_backend(tickets[0].resident, tickets[0].form, tokens)
            answers, report = launch(self._staging, backend, tickets)
        except ExpertdError as error:
            _fail(tickets, error)
        except Exception:
            log.exception("a batch of layer %s failed", tickets[0].resident.name)
            _fail(tickets, Internal("the kernel failed; the server's log says why"))
        else:
            self._observer.ran(report)
            for ticket, answer in zip(tickets, answers, strict=True):
                if isinstance(answer, ExpertdError):
                    ticket.future.set_exception(answer)
                else:
                    ticket.future.set_result(answer)
        self._running = ()


def _fail(tickets: Sequence[Ticket], error: ExpertdError) -> None:
    for ticket in tickets:
        if not ticket.future.done():
            ticket.future.set_exception(error)
