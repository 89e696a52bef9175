"""Where a pool finds its replicas."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from expertd_client.errors import InvalidArgument, Unavailable
from expertd_client.fleet.endpoints import endpoints

LISTED = (
    "# replicas\n10.0.0.1:8001\n\n  [fe80::1]:8001  # the second\nhost-2.local:9\n10.0.0.1:8001\n"
)
FOUND = ("10.0.0.1:8001", "[fe80::1]:8001", "host-2.local:9")


async def test_a_list_and_one_address() -> None:
    source = endpoints(["a:1", "b:2", "a:1"])
    assert (await source.read(), source.changing) == (("a:1", "b:2"), False)
    assert await endpoints("unix:/run/expertd").read() == ("unix:/run/expertd",)


@pytest.mark.parametrize("spelling", ["{}", "file:{}", "file://{}"])
async def test_a_file(tmp_path: Path, spelling: str) -> None:
    path = tmp_path / "replicas"
    path.write_text(LISTED)
    source = endpoints(spelling.format(path))
    assert source.changing and await source.read() == FOUND
    path.write_text("c:3\n")
    assert await source.read() == await endpoints(path).read() == ("c:3",)


BROKEN = {
    "/noise": b"SSH-2.0-server\r\n\r\n",
    "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\na:1\nb:2",
    "/chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\na:1",
}
"""What a server says that is none, or one that dies in the middle."""


@pytest.fixture
def url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in BROKEN:
                self.wfile.write(BROKEN[self.path])
                return
            good = self.path == "/replicas"
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write(LISTED.encode())

        def log_message(self, *_: Any) -> None:
            """Nothing: tests are quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def test_a_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    source = endpoints(f"{url}/replicas")
    assert source.changing and await source.read() == FOUND
    with pytest.raises(Unavailable, match="404"):
        await endpoints(f"{url}/nothing").read()


@pytest.mark.parametrize("path", [*BROKEN, "/a b"])
async def test_a_url_that_breaks_off(url: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a list is none, and whatever HTTP's library raises, the pool goes on to ask."""
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(Unavailable, match="cannot be read"):
        await endpoints(f"{url}{path}").read()


async def test_every_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(host: str, port: int, *_: Any, **__: Any) -> Any:
        if host != "experts.example":
            raise socket.gaierror("unknown")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.2", port)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port)),
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", port, 0, 0)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    source = endpoints("dns:///experts.example:8001")
    assert source.changing
    assert await source.read() == ("10.0.0.1:8001", "10.0.0.2:8001", "[fe80::1]:8001")
    with pytest.raises(Unavailable, match="cannot be resolved"):
        await endpoints("dns:///other.example:8001").read()


@pytest.mark.parametrize("name", ["a..b", "a" * 70])
async def test_a_name_that_no_dns_can_hold(name: str) -> None:
    with pytest.raises(Unavailable, match="cannot be resolved"):
        await endpoints(f"dns:///{name}:8001").read()


@pytest.mark.parametrize(
    "targets",
    [
        [],
        ["host"],
        ["host:port"],
        ["ho st:1"],
        ["h:1", 7],
        ["h:0"],
        ["h:65536"],
        "dns:///name",
        "ftp://h/x",
        "",
    ],
)
def test_what_names_no_server(targets: Any) -> None:
    with pytest.raises(InvalidArgument, match="targets|HOST:PORT"):
        endpoints(targets)


async def test_files_are_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "replicas"
    with pytest.raises(Unavailable, match="cannot be read"):
        await endpoints(path).read()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Unavailable, match="cannot be read"):
        await endpoints(path).read()
    path.write_text("# nobody\n\n")
    with pytest.raises(Unavailable, match="lists no replica"):
        await endpoints(path).read()
    path.write_bytes(b"\xef\xbb\xbfa:1\r\n")  # as an editor on Windows writes it
    assert await endpoints(path).read() == ("a:1",)
    path.write_text("a:1\n" * 400_000)
    with pytest.raises(Unavailable, match="more than"):
        await endpoints(path).read()
    path.write_text("a:1\nrm -rf /\n")
    with pytest.raises(InvalidArgument, match="rm -rf"):
        await endpoints(path).read()
