"""What carries a bench's calls: our client over gRPC, or safetensors over plain HTTP."""

from __future__ import annotations

import json
import ssl
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import numpy as np
from numpy.typing import NDArray

from expertd.bench.target import Target
from expertd_client import Client, DeadlineExceeded, ExpertdError, InvalidArgument, Unavailable
from expertd_client.calls import CallOptions
from expertd_client.closing import Closing
from expertd_client.errors import error_for
from expertd_wire.safetensors import decode_body, encode_body
from expertd_wire.tensors import WireError, from_numpy

CALL_SECONDS = 30.0
IDLE_SECONDS = 2.0
"""A connection that has been idle for longer is made anew: servers close such ones."""


class Sizes(NamedTuple):
    """Of a layer: the width of its rows, its experts, how many of them a row goes to, which of
    them that server holds."""

    hidden: int
    num_experts: int
    top_k: int
    expert_begin: int
    expert_end: int


class Times(NamedTuple):
    """What a server tells of an answered call, in nanoseconds."""

    queued: int
    staged: int
    computed: int


class Carrier(Closing):
    """Connections of one process, for any of its threads; methods raise the client's errors."""

    @abstractmethod
    def sizes(self, model: str, layer: int, timeout: float) -> Sizes:
        """A layer's."""

    @abstractmethod
    def ask(self, model: str, layer: int, rows: NDArray[Any], options: CallOptions) -> Times:
        """One call, there and back."""


class Grpc(Carrier):
    """TARGET is the server's gRPC address."""

    def __init__(self, target: Target) -> None:
        self._client: Client = target.client()

    def sizes(self, model: str, layer: int, timeout: float) -> Sizes:
        info = self._client.layer(model, layer, timeout=timeout)
        return Sizes(*(getattr(info, name) for name in Sizes._fields))

    def ask(self, model: str, layer: int, rows: NDArray[Any], options: CallOptions) -> Times:
        reply = self._client.call(model, layer, rows, timeout=CALL_SECONDS, **options)
        return Times(reply.queued_ns, reply.staged_ns, reply.computed_ns)

    def close(self) -> None:
        self._client.close()


class Http(Carrier):
    """TARGET is the server's HTTP address; each thread has a connection that is kept."""

    def __init__(self, target: Target) -> None:
        if target.certificate:
            raise InvalidArgument("--carrier http shows no certificate; leave --tls-cert out")
        self._target = target
        self._address = target.address.removeprefix("http://").rstrip("/")
        self._mine = threading.local()
        self._all: list[HTTPConnection] = []

    def sizes(self, model: str, layer: int, timeout: float) -> Sizes:
        told = json.loads(self._exchange("GET", f"/v1/layers/{quote(model, '')}/{layer}", timeout))
        return Sizes(*(int(told.get(name, 0)) for name in Sizes._fields))

    def ask(self, model: str, layer: int, rows: NDArray[Any], options: CallOptions) -> Times:
        tensors = {k: from_numpy(v) for k, v in options.items() if isinstance(v, np.ndarray)}
        body = encode_body({"hidden_states": from_numpy(rows), **tensors}, {})
        query = {"model": model, "layer": layer, "backend": options.get("backend") or ""}
        if options.get("partial"):
            query["partial"] = "true"
        data = self._exchange("POST", f"/v1/forward?{urlencode(query)}", CALL_SECONDS, body)
        try:
            _, told = decode_body(data)
            return Times(*(int(told[f"{name}_ns"]) for name in Times._fields))
        except (WireError, KeyError, ValueError) as error:
            raise ExpertdError(f"the server's reply cannot be read: {error}") from error

    def close(self) -> None:
        for connection in self._all:
            connection.close()

    def _exchange(self, method: str, path: str, timeout: float, body: bytes = b"") -> bytes:
        connection = self._connection(timeout)
        token = {"Authorization": f"Bearer {self._target.token}"} if self._target.token else {}
        try:
            connection.request(method, path, body, token)
            reply = connection.getresponse()
            data = reply.read()
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceeded(f"no answer within {timeout:g} s") from error
        except (OSError, HTTPException) as error:
            connection.close()
            what = error if isinstance(error, OSError) else "what answers there speaks no HTTP"
            raise Unavailable(f"{self._address}: {what}") from error
        if reply.status != 200:
            raise _error(reply.status, data)
        return data

    def _connection(self, timeout: float) -> HTTPConnection:
        """This thread's."""
        mine, now = self._mine, time.monotonic()
        if not hasattr(mine, "connection"):
            mine.connection, mine.used = self._dialled(timeout), now
            self._all.append(mine.connection)
        if now - mine.used > IDLE_SECONDS:
            mine.connection.close()
        mine.used = now
        connection: HTTPConnection = mine.connection
        return connection

    def _dialled(self, timeout: float) -> HTTPConnection:
        try:
            if self._target.authorities is None:
                return HTTPConnection(self._address, timeout=timeout)
            trusted = ssl.create_default_context(cadata=self._target.authorities.decode())
            return HTTPSConnection(self._address, timeout=timeout, context=trusted)
        except (HTTPException, ValueError, ssl.SSLError) as error:
            raise InvalidArgument(f"{self._address}, or its --tls-ca: {error}") from error


def _error(status: int, data: bytes) -> ExpertdError:
    """What the body tells; of a status without one only that."""
    try:
        told = json.loads(data)["error"]
        return error_for(str(told["code"]), str(told["reason"]), str(told["message"]))
    except (ValueError, KeyError, TypeError):
        return ExpertdError(f"HTTP {status}: {data[:200]!r}")


CARRIERS: dict[str, Callable[[Target], Carrier]] = {"grpc": Grpc, "http": Http}
