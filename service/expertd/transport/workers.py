"""How many gRPC calls are answered at once, and what those beyond are told.

gRPC's own limit would refuse health checks too, and could not name the flag.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

import grpc
from grpc_health.v1 import health

from expertd.errors import ExpertdError, Overloaded
from expertd.transport.grpc_inside import Unattended, fits, halves_of
from expertd_wire.methods import STATUS_KEY
from expertd_wire.status import pack_status

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1


class Work:
    """One call's work, and what follows it: as much of a Future as gRPC's server asks for."""

    __slots__ = ("_after", "_lock", "_over", "todo")

    def __init__(self, todo: Callable[[], Any]) -> None:
        self.todo = todo
        self._after: Callable[[Work], None] | None = None
        self._over = False
        self._lock = threading.Lock()

    def add_done_callback(self, after: Callable[[Work], None]) -> None:
        """Calls after(self) when the work is over; gRPC adds one, at once."""
        with self._lock:
            self._after = after
            over = self._over
        if over:
            after(self)

    def run(self) -> None:
        todo, self.todo = self.todo, _nothing  # what it knows of the call may lead back to this
        try:
            todo()
        except Exception:
            log.exception("gRPC's own work on a call failed")
        with self._lock:
            self._over = True
            after = self._after
        if after is not None:
            after(self)


def _nothing() -> None:
    """What is left to do of work that is done."""


class Workers:
    """The threads of the handlers, which know whether as many calls as may be are being answered.

    A call of a method in two halves takes a thread only for what is not quick. Threads are started
    as they are needed, and stay until close(); a ThreadPoolExecutor would make a Future with its
    condition for each call, which one of a few rows would feel.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._calls = 0
        self._handed = 0
        self._started = 0
        self._counting = threading.Lock()
        self._waiting: SimpleQueue[Work | None] = SimpleQueue()
        self._fits = fits()
        if not self._fits:
            log.warning("grpcio %s is unknown inside: each call takes a thread", grpc.__version__)

    @property
    def full(self) -> bool:
        return self._calls >= self.most

    def submit(self, work: Callable[..., Any], /, *args: Any, **named: Any) -> Work:
        made = Work(partial(work, *args, **named))
        with self._counting:
            self._calls += 1
        halves = halves_of(args) if self._fits else None
        if halves is None:
            self._hand_on(made)
        else:
            Unattended(halves, args, partial(self._attend, made)).start()
        return made

    def _attend(self, made: Work, todo: Callable[[], Any], at_once: bool) -> None:
        made.todo = todo
        if at_once:
            self._do(made)
        else:
            self._hand_on(made)

    def _hand_on(self, work: Work) -> None:
        """Has a thread do it."""
        with self._counting:
            self._handed += 1
            more = self._started < min(self._handed, self.most)
            self._started += more
        self._waiting.put(work)
        if more:
            self._start_one()

    def _start_one(self) -> None:
        try:
            threading.Thread(target=self._serve, name="grpc", daemon=True).start()
        except RuntimeError as error:  # the thread that polls gRPC must survive it
            log.warning("%s; calls wait for those that there are", error)
            with self._counting:
                self._started -= 1

    def close(self) -> None:
        """Ends the threads, after a last call that each may be busy with."""
        for _ in range(self._started):
            self._waiting.put(None)

    def _serve(self) -> None:
        while (work := self._waiting.get()) is not None:
            self._do(work)
            del work  # its call's bytes
            with self._counting:
                self._handed -= 1

    def _do(self, work: Work) -> None:
        work.run()
        with self._counting:
            self._calls -= 1


class AtOnce(ThreadPoolExecutor):
    """Runs what never waits on the thread that submits it: no other has to be woken."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args, **named))
        return done


class Refuser:
    """Answers calls with an error, unread, on gRPC's own thread."""

    def __init__(self) -> None:
        self._threads = AtOnce(1)

    def handler(self, error: ExpertdError) -> grpc.RpcMethodHandler:
        """A handler that answers every call with this error."""
        details = pack_status(error.reason, str(error), retry_seconds=error.retry_seconds)

        def refuse(request: Any, context: grpc.ServicerContext) -> None:
            context.set_trailing_metadata(((STATUS_KEY, details),))
            context.abort(getattr(grpc.StatusCode, error.wire.grpc), str(error))

        return grpc.stream_stream_rpc_method_handler(beside(refuse, self._threads))


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The methods of one service, as long as there is a thread for one more call."""

    def __init__(
        self,
        name: str,
        methods: Mapping[str, grpc.RpcMethodHandler],
        workers: Workers,
        refuser: Refuser,
        refused: Callable[[], None],
    ) -> None:
        self._methods = {f"/{name}/{method}": handler for method, handler in methods.items()}
        self._workers = workers
        self._refused = refused
        self._refusal = refuser.handler(
            Overloaded(
                f"{workers.most} calls are being answered (--max-concurrent-calls); retry in "
                f"{RETRY_SECONDS:g} s or elsewhere",
                retry_seconds=RETRY_SECONDS,
            )
        )

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        found = self._methods.get(details.method)
        if found is None or not self._workers.full:
            return found
        self._refused()
        return self._refusal


class Health(health.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 on a thread of its own: it answers however many calls there are."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grpc-health")
        super().__init__()
        self.Check = beside(super().Check, self._threads)
        # Its own way to name threads marks the class: another server's end would take them away.
        self.Watch = beside(self._watched, self._threads)
        self.Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def end_watches(self) -> None:
        """Ends what never ends by itself: a server that stops would wait for every pool's."""
        with self._lock:
            watches = [tell for some in self._send_response_callbacks.values() for tell in some]
        for tell in watches:
            tell(None)

    def close(self) -> None:
        """Ends its thread; nobody asks any more."""
        self._threads.shutdown(wait=False)

    def _watched(self, request: Any, context: Any, tell: Callable[[Any], None]) -> None:
        super().Watch(request, context, _ended_once(tell))


def _ended_once(tell: Callable[[Any], None]) -> Callable[[Any], None]:
    """tell, whose None ends a call of gRPC, which minds being told so twice."""
    first = threading.Lock()

    def once(response: Any) -> None:
        if response is not None or first.acquire(blocking=False):
            tell(response)

    return once


def beside(method: Callable[..., Any], threads: ThreadPoolExecutor) -> Callable[..., Any]:
    """A handler's method that gRPC runs on these threads instead of the server's."""

    def run(*args: Any) -> Any:
        return method(*args)

    run.experimental_thread_pool = threads  # type: ignore[attr-defined]
    return run
