"""The servers that are compared: how each is started, and how it is asked to copy some rows."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from tests.bench.grpc_servers import LIMITS
from tests.bench.grpc_servers import METHOD as ECHO
from tests.bench.peers import oip

from expertd_wire.codec import encode_forward_call
from expertd_wire.messages import ForwardCall
from expertd_wire.methods import FORWARD
from expertd_wire.tensors import WireTensor

HIDDEN = 7168
SERVE = "import sys; from expertd.cli import main; sys.exit(main())"
PATIENCE = 90
"""Seconds that a server may take to answer its first call."""

Payload = Callable[[int], bytes]


@dataclass(frozen=True)
class Peer:
    """A server that runs: its port, its method, and the call that carries so many rows."""

    port: int
    method: str
    payload: Payload


def rows_of(count: int) -> bytes:
    """Two bytes an element, none of them an exponent that makes NaN or infinity."""
    return bytes(byte & 0x3F for byte in os.urandom(2 * HIDDEN)) * count


def expertd_call(count: int) -> bytes:
    tensor = WireTensor("bfloat16", (count, HIDDEN), memoryview(rows_of(count)))
    return encode_forward_call(ForwardCall("echo", 0, tensor))


def oip_call(count: int) -> bytes:
    return oip.infer(count, HIDDEN, rows_of(count))


@contextmanager
def bare() -> Iterator[Peer]:
    """A raw-bytes gRPC echo in Python: what the carrier alone costs."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "tests.bench.peers.bare", str(port)]
    with running(command, Peer(port, ECHO, rows_of)) as peer:
        yield peer


@contextmanager
def expertd() -> Iterator[Peer]:
    """expertd's identity layer: a whole server, without experts."""
    grpc_port, http_port = free_ports(2)
    ports = ["--grpc-port", str(grpc_port), "--http-port", str(http_port)]
    layer = ["--identity", f"echo={HIDDEN}", "--device", "cpu"]
    command = [sys.executable, "-c", SERVE, "serve", *ports, *layer]
    with running(command, Peer(grpc_port, FORWARD, expertd_call)) as peer:
        yield peer


@contextmanager
def triton(run_triton: str) -> Iterator[Peer]:
    """NVIDIA's tritonserver with its Python backend; run_triton takes its three ports."""
    ports = free_ports(3)
    command = [run_triton, *map(str, ports)]
    with running(command, Peer(ports[0], oip.METHOD, oip_call)) as peer:
        yield peer


@contextmanager
def kserve(python: str) -> Iterator[Peer]:
    """KServe's Python model server; python is one that has it."""
    ports = free_ports(2)
    script = Path(__file__).with_name("kserve_echo.py")
    command = [python, str(script), *map(str, ports)]
    with running(command, Peer(ports[0], oip.METHOD, oip_call)) as peer:
        yield peer


@contextmanager
def running(command: list[str], peer: Peer) -> Iterator[Peer]:
    """The server in a process group of its own, once it answers; the group is ended after."""
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        await_answer(process, peer)
        yield peer
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_answer(process: subprocess.Popen[bytes], peer: Peer) -> None:
    """Waits until one row comes back; raises if the server ends or takes too long."""
    end = time.monotonic() + PATIENCE
    with grpc.insecure_channel(f"127.0.0.1:{peer.port}", options=LIMITS) as channel:
        call = channel.unary_unary(peer.method)
        while True:
            try:
                answer = call(peer.payload(1), timeout=5, wait_for_ready=True)
            except grpc.RpcError as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{process.args!r} does not answer: {error}") from error
                time.sleep(0.2)
            else:
                assert len(answer) >= 2 * HIDDEN, "a copy of the row comes back"
                return


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(found.getsockname()[1]) for found in sockets]
    for found in sockets:
        found.close()
    return ports
