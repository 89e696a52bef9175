"""What the tests of abuse share: raw connections, a server's state, its answers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.e2e.asking import PROTOCOLS
from tests.e2e.servers import Server
from tests.waiting import until
from torch import Tensor

Fields = dict[str, Any]
MIB = 1 << 20


def demo_call(seed: int = 7, tokens: int = 5) -> Fields:
    """A good call of the demo, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, 256, generator=random)
    logits = torch.randn(tokens, 32, generator=random)
    return {"model": "demo", "hidden_states": rows, "router_logits": logits}


def answers(server: Server) -> list[Tensor]:
    """What a well-behaved caller gets, over both protocols."""
    found = [ask(getattr(server, name), demo_call()) for name, ask in PROTOCOLS.items()]
    assert [answer.code for answer in found] == ["OK", "OK"]
    return [answer.output for answer in found if answer.output is not None]


class State(NamedTuple):
    """What a process holds."""

    resident_mib: float
    threads: int
    descriptors: int


def state(server: Server) -> State:
    proc = Path("/proc") / str(server.process.pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) / 1024
    return State(resident, int(status["Threads"]), len(os.listdir(proc / "fd")))


@contextmanager
def unharmed(server: Server, more_mib: int) -> Iterator[None]:
    """Answers, memory, threads and descriptors are the same after the block as before it."""
    for _ in range(30):  # threads and pools exist before anything is counted
        answers(server)
    before, expected = state(server), answers(server)
    yield
    got = answers(server)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    until(lambda: state(server).descriptors <= before.descriptors + 8)
    after = state(server)
    assert after.threads <= before.threads + 64, (before, after)  # grpc's pool, at most
    assert after.resident_mib < before.resident_mib + more_mib, (before, after)
    assert "Traceback" not in server.log.read_text()


def connect(address: str, timeout: float = 20) -> socket.socket:
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout)


def read_to_end(connection: socket.socket) -> bytes:
    """Everything until the server closes; a reset is an end too."""
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)
