"""ForwardStream: many calls on one stream, answered in any order, each with its own errors."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grpc

from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError
from expertd.transport.calls import Record

POLL_SECONDS = 0.5
"""How often a stream on which nothing happens looks whether its caller, or the server, has left."""


class Entry(NamedTuple):
    """One message of a stream: its record, and its ticket or the error that kept it from one."""

    record: Record
    nbytes: int
    ticket: Ticket | None
    error: ExpertdError | None = None


Submit = Callable[[bytes], Entry]
Render = Callable[[Entry], bytes]


class Stream:
    """One caller's stream: a thread reads and submits, the handler's own thread writes replies."""

    def __init__(
        self,
        submit: Submit,
        cancel: Callable[[Ticket], None],
        render: Render,
        max_inflight: int,
        draining: Callable[[], bool],
    ) -> None:
        self._submit = submit
        self._cancel = cancel
        self._render = render
        self._answers: queue.SimpleQueue[Entry | int] = queue.SimpleQueue()
        self._slots = threading.Semaphore(max_inflight)
        self._draining = draining
        self._taken = 0
        self._open: set[Ticket] = set()
        self._gone = threading.Event()

    def run(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Replies until the caller has got every answer, and has sent everything or we drain."""
        context.add_callback(self._leave)
        args = (requests,)
        threading.Thread(target=self._read, args=args, name="stream", daemon=True).start()
        answered = self._answered()
        try:
            for entry in answered:
                reply = self._render(entry)
                del entry  # nothing of a call stays while there is no other
                yield reply
                del reply
                self._slots.release()
        finally:
            self._leave()
            for entry in answered:  # nobody reads these any more, but they are counted
                self._render(entry)

    def _answered(self) -> Iterator[Entry]:
        """Every message's entry once it has its answer, in the order of the answers."""
        sent, expected = 0, None
        while expected is None or sent < expected:
            try:
                answer = self._answers.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if sent == self._taken and self._draining():
                    return
                continue
            if isinstance(answer, int):
                expected = answer
            else:
                sent += 1
                yield answer
                del answer

    def _read(self, requests: Iterator[bytes]) -> None:
        """Submits what arrives; at the end tells the writer how many answers there will be."""
        try:
            for request in requests:
                if not self._take_slot():
                    return
                self._taken += 1
                self._start(request)
                del request
        except grpc.RpcError:
            self._leave()  # the caller broke off: grpc raises this in the iterator
        finally:
            self._answers.put(self._taken)

    def _take_slot(self) -> bool:
        while not self._slots.acquire(timeout=POLL_SECONDS):
            if self._gone.is_set():
                return False
        return True

    def _start(self, request: bytes) -> None:
        entry = self._submit(request)
        if entry.ticket is None:
            self._answers.put(entry)
            return
        self._open.add(entry.ticket)
        waiting = [entry]  # a future keeps its callbacks, which must not lead back to it
        entry.ticket.future.add_done_callback(lambda _: self._done(waiting.pop()))
        if self._gone.is_set():  # it left while its message was being read
            self._cancel(entry.ticket)

    def _done(self, entry: Entry) -> None:
        """Runs on the executor's thread: rendering is left to the writer's."""
        assert entry.ticket is not None
        self._open.discard(entry.ticket)
        self._answers.put(entry)

    def _leave(self) -> None:
        """Takes back whatever still waits for a caller who has left."""
        self._gone.set()
        for ticket in list(self._open):
            self._cancel(ticket)
