"""uvicorn on a thread and a loop of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from expertd.errors import InvalidArgument, TooLarge
from expertd.transport.interceptors import http_error
from expertd.transport.tls import Reload, TlsFiles, ssl_context

RELOAD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one connection may take."""

    max_header_bytes: int
    header_seconds: float


class HttpServer:
    """The HTTP server of a process: bind() → start() → stop()."""

    def __init__(self, application: Any, limits: HttpLimits, tls: TlsFiles | None) -> None:
        self._tls = tls
        self._config = uvicorn.Config(
            application,
            http=type("LimitedProtocol", (Protocol,), {"limits": limits}),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(self._config)
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def bind(self, host: str, port: int) -> int:
        """The port that was bound (port 0 chooses); raises OSError if it is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Named TCP, connections answer at once: asyncio sets TCP_NODELAY on no others.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        # At once: a port that another socket listens on may be bound, and is refused only here.
        self._socket.listen(self._config.backlog)
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Takes no more connections and waits for the answers that are being written."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        assert self._socket is not None, "bind() comes before start()"
        self._config.load()
        watcher = None
        if self._tls is not None:
            self._config.ssl = ssl_context(self._tls)
            watcher = asyncio.create_task(self._follow(self._tls))
        await self._server.serve(sockets=[self._socket])
        if watcher is not None:
            watcher.cancel()

    async def _follow(self, tls: TlsFiles) -> None:
        """New connections get the certificates that lie there now."""
        reload = Reload(tls)
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            if reload.due() and self._config.ssl is not None:
                self._config.ssl.load_cert_chain(tls.certificate, tls.key)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with an end to slow and to endless heads of requests."""

    limits: HttpLimits
    _timer: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0  # parsed: path, names and values
    _raw_bytes = 0  # arrived since the head began: the parser keeps what it has not finished

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._raw_bytes += len(data)
        super().data_received(data)
        endless = self._in_head and self._raw_bytes > self.limits.max_header_bytes
        if endless and not self.transport.is_closing():
            self.send_400_response(self._refusal)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._raw_bytes = True, 0, 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As every other error, where uvicorn would answer plain text."""
        many = msg == self._refusal or self._head_bytes > self.limits.max_header_bytes
        answer = http_error(TooLarge(self._refusal) if many else InvalidArgument(msg))
        fields = (*answer.raw_headers, (b"connection", b"close"))
        head = b"".join(b"%b: %b\r\n" % field for field in fields)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%b\r\n%b" % (head, bytes(answer.body)))
        self.transport.close()

    def _await_head(self) -> None:
        """Every request's head has its time, not only the connection's first."""
        if self._timer is None:
            seconds = self.limits.header_seconds
            self._timer = self.loop.call_later(seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.limits.max_header_bytes:
            raise ValueError(self._refusal)

    @property
    def _refusal(self) -> str:
        most = self.limits.max_header_bytes
        return f"headers: at most {most} bytes accepted (--max-header-bytes)"
