"""What is used of the inside of grpcio's server, and the check that it is as it is known here.

That server has a thread for each unary call, which waits until the message is there and then for
the answer: four threads are woken for a call, and all of them want Python's lock. Here the thread
that polls gRPC begins a call when its message has come, and whoever has the answer sends it.
grpcio has no public way to do so. What this needs of it is the same in 1.71 and 1.85; where it is
not, `fits()` says so, and calls go grpcio's own way through the same two halves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import grpc
from grpc import _server
from grpc._cython import cygrpc

from expertd.errors import InvalidArgument
from expertd.transport.halves import Halves
from expertd.transport.interceptors import guarded

RESPOND = "_unary_response_in_pool"
SIGNATURES = {
    RESPOND: "rpc_event state behavior argument_thunk request_deserializer response_serializer",
    "_receive_message": "state call request_deserializer",
    "_Context": "rpc_event state request_deserializer",
    "_RPCState": "",
}
STATE = ("condition", "context", "due", "request")

Attend = Callable[[Callable[[], None], bool], None]


def fits() -> bool:
    """Whether grpcio's inside is as it is known here."""
    return (
        all(_parameters(name) == names.split() for name, names in SIGNATURES.items())
        and all(hasattr(_server._RPCState(), name) for name in STATE)
        and hasattr(_server, "_RECEIVE_MESSAGE_TOKEN")
        and hasattr(cygrpc, "ReceiveMessageOperation")
    )


def _parameters(name: str) -> list[str] | None:
    found = getattr(_server, name, None)
    return None if found is None else list(inspect.signature(found).parameters)


def halves_of(work: tuple[Any, ...]) -> Halves | None:
    """The method that grpcio gives its pool to run, if that is one in two halves."""
    if work and work[0] is getattr(_server, RESPOND):
        behavior = work[3]
        return behavior if isinstance(behavior, Halves) else None
    return None


class Unattended:
    """One call of a method in two halves, which occupies no thread while it waits.

    attend() is called once with what is left to do: quick, for the thread that calls it, or else
    for another one.
    """

    def __init__(self, halves: Halves, work: tuple[Any, ...], attend: Attend) -> None:
        self._halves = halves
        self._work = work
        self._rpc_event, self._state = work[1:3]
        self._attend = attend

    def start(self) -> None:
        """Asks gRPC for the message; its polling thread calls back when that is there."""
        state, call = self._state, self._rpc_event.call
        receive = _server._receive_message(state, call, None)
        with state.condition:
            operations = (cygrpc.ReceiveMessageOperation(0),)
            call.start_server_batch(operations, partial(self._arrived, receive))
            state.due.add(_server._RECEIVE_MESSAGE_TOKEN)

    def _arrived(self, receive: Callable[[Any], Any], event: Any) -> Any:
        """Begins the call; returns what grpcio's own callback does."""
        result = receive(event)
        request, self._state.request = self._state.request, None
        if request is None:  # the caller left, or sent none, or more than is accepted
            self._fail(InvalidArgument("exactly one message is accepted"))
        else:
            self._begin(request)
        return result

    def _begin(self, request: bytes) -> None:
        context = _server._Context(self._rpc_event, self._state, None)
        try:
            self._state.context.run(self._halves.begin, request, context, self._ready)
        except Exception as error:
            self._fail(error)

    def _ready(self, answer: Any, at_once: bool) -> None:
        self._answer(self._halves.finish, answer, at_once)

    def _fail(self, error: Exception) -> None:
        self._answer(guarded(_failing(error)), b"", True)

    def _answer(self, method: Callable[..., bytes], answer: Any, at_once: bool) -> None:
        """grpcio calls the method with the answer, and sends what that returns or aborts with."""
        respond = self._work[0]
        work = partial(respond, self._rpc_event, self._state, method, lambda: answer, None, None)
        self._attend(work, at_once)


def _failing(error: Exception) -> Callable[[bytes, grpc.ServicerContext], NoReturn]:
    def fail(request: bytes, context: grpc.ServicerContext) -> NoReturn:
        raise error

    return fail
