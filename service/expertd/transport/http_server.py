"""uvicorn on a thread and a loop of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
            http=_protocol(limits),
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
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
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


def _protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with an end to slow and to endless headers."""

    class Protocol(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _header_bytes = 0
        _refusal = ""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(limits.header_seconds, transport.close)

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            self._header_bytes += len(name) + len(value)
            if self._header_bytes > limits.max_header_bytes:
                most = limits.max_header_bytes
                self._refusal = f"headers: at most {most} bytes accepted (--max-header-bytes)"
                raise ValueError(self._refusal)

        def send_400_response(self, msg: str) -> None:
            super().send_400_response(self._refusal or msg)

        def on_headers_complete(self) -> None:
            self._header_bytes = 0
            if self._timer is not None:
                self._timer.cancel()
            super().on_headers_complete()

    return Protocol
