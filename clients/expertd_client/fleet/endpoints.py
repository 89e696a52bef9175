"""Where replicas are: a list, every address of a name, or a file or URL that is read again."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.request import urlopen

from expertd_client.errors import InvalidArgument, Unavailable

T = TypeVar("T")

Targets = str | Path | Sequence[str]

_DNS = "dns:///"
_FILE = "file:"
_TARGET = re.compile(r"(unix:\S+|(\[[0-9a-fA-F:.%\w]+\]|[^\s/:\[\]]+):([0-9]{1,5}))")
_MOST_PORT = (1 << 16) - 1
_MOST_BYTES = 1 << 20
_READ_SECONDS = 5.0


class Endpoints(NamedTuple):
    """A reader of "HOST:PORT" targets; changing says whether it is worth reading again."""

    read: Callable[[], Awaitable[tuple[str, ...]]]
    changing: bool
    name: str


def endpoints(targets: Targets) -> Endpoints:
    """The reader that fits targets; raises InvalidArgument for what names no server."""
    if isinstance(targets, Path):
        return _read_in_thread(lambda: _file(targets), str(targets))
    if not isinstance(targets, str):
        return _fixed(tuple(targets))
    if targets.startswith(_DNS):
        return _named(targets.removeprefix(_DNS))
    if targets.startswith(("http://", "https://")):
        return _read_in_thread(lambda: _url(targets), targets)
    if targets.startswith((_FILE, "/", "./", "../")):
        return endpoints(Path(targets.removeprefix("file://").removeprefix(_FILE)))
    return _fixed((targets,))


def _fixed(targets: tuple[str, ...]) -> Endpoints:
    checked = _checked(targets, "targets")
    if not checked:
        raise InvalidArgument("targets: none given; give at least one HOST:PORT")

    async def read() -> tuple[str, ...]:
        return checked

    return Endpoints(read, False, ", ".join(checked))


def _named(address: str) -> Endpoints:
    host, _, port = _checked((address,), "dns target")[0].rpartition(":")

    def resolved() -> Sequence[Any]:
        return socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)

    async def read() -> tuple[str, ...]:
        try:
            found = await _in_thread(resolved)
        except (OSError, UnicodeError) as error:  # the latter of a name that no DNS can hold
            raise Unavailable(f"{address} cannot be resolved: {error}") from error
        return tuple(sorted({_address(str(info[4][0]), int(info[4][1])) for info in found}))

    return Endpoints(read, True, f"{_DNS}{address}")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _read_in_thread(text_of: Callable[[], str], name: str) -> Endpoints:
    async def read() -> tuple[str, ...]:
        try:
            text = await _in_thread(text_of)
        except (OSError, ValueError, HTTPException) as error:
            raise Unavailable(f"{name} cannot be read: {error}") from error
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        found = _checked(tuple(line for line in lines if line), name)
        if not found:  # perhaps it is just being written
            raise Unavailable(f"{name} lists no replica")
        return found

    return Endpoints(read, True, name)


def _in_thread(step: Callable[[], T]) -> Awaitable[T]:
    """step() in a thread for which no close() waits, as asyncio's own would: it may hang."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=_do, args=(step, future), name="endpoints", daemon=True).start()
    return asyncio.wrap_future(future)


def _do(step: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(step())
    except Exception as error:
        future.set_exception(error)
        del future  # this frame is in the error's traceback: a cycle, which keeps sockets open


def _file(path: Path) -> str:
    with path.open("rb") as file:
        return _text(file.read(_MOST_BYTES + 1))


def _url(url: str) -> str:
    with urlopen(url, timeout=_READ_SECONDS) as reply:
        data = reply.read(_MOST_BYTES + 1)
        if reply.length and len(data) <= _MOST_BYTES:  # urllib says nothing of a lost connection
            raise ValueError(f"{reply.length} bytes of it are missing")
        return _text(data)


def _text(data: bytes) -> str:
    if len(data) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    return data.decode("utf-8-sig")


def _checked(targets: Sequence[str], source: str) -> tuple[str, ...]:
    """The targets, each once; raises InvalidArgument for one that is none."""
    for target in targets:
        if not isinstance(target, str) or not _is_target(target):
            raise InvalidArgument(f"{source}: {target!r:.100} given; HOST:PORT is accepted")
    return tuple(dict.fromkeys(targets))


def _is_target(text: str) -> bool:
    found = _TARGET.fullmatch(text)
    return found is not None and (found[3] is None or 1 <= int(found[3]) <= _MOST_PORT)
