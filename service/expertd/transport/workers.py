"""How many gRPC calls are answered at once, and what those beyond are told.

gRPC's own limit would refuse health checks too, and could not name the flag.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health

from expertd.errors import ExpertdError, Overloaded
from expertd_wire.methods import STATUS_KEY
from expertd_wire.status import pack_status

RETRY_SECONDS = 0.1


class Workers(ThreadPoolExecutor):
    """The threads of the handlers, which know whether all of them are taken."""

    def __init__(self, most: int) -> None:
        super().__init__(most, thread_name_prefix="grpc")
        self.most = most
        self._busy = 0
        self._counting = threading.Lock()

    @property
    def full(self) -> bool:
        return self._busy >= self.most

    def submit(self, work: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        with self._counting:
            self._busy += 1
        return super().submit(self._counted, work, *args, **named)

    def _counted(self, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            return work(*args, **named)
        finally:
            with self._counting:
                self._busy -= 1


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
        threads = ThreadPoolExecutor(1, thread_name_prefix="grpc-health")
        super().__init__(experimental_non_blocking=True, experimental_thread_pool=threads)
        self.Check = beside(super().Check, threads)


def beside(method: Callable[..., Any], threads: ThreadPoolExecutor) -> Callable[..., Any]:
    """A handler's method that gRPC runs on these threads instead of the server's."""

    def run(*args: Any) -> Any:
        return method(*args)

    run.experimental_thread_pool = threads  # type: ignore[attr-defined]
    return run
