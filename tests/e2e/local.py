"""An App in this process whose echo layer does what a test says."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from tests.e2e.asking import PROTOCOLS, Answer
from tests.service.engine.parts import CPU, Forward, Scripted, warm

from expertd.app import Addresses, App
from expertd.capability.rows import identity
from expertd.engine.resident import Resident

FLAGS = (
    *("--identity", "echo=8", "--max-message-bytes", "65536"),
    *("--max-queued-tokens", "4", "--max-call-tokens", "100"),
)


@dataclass
class Local:
    """The App and its addresses."""

    app: App
    addresses: Addresses

    def ask(self, protocol: str, timeout: float = 30, **fields: Any) -> Answer:
        """One call to echo with two rows, or with what fields say."""
        fields = {"model": "echo", "hidden_states": torch.ones(2, 8)} | fields
        return PROTOCOLS[protocol](getattr(self.addresses, protocol), fields, timeout)

    @property
    def echo(self) -> Resident:
        return self.app.residents.get("echo", 0)

    def script(self, script: Forward) -> None:
        """Replaces what the layer computes."""
        kind = type("Fake", (Scripted,), {"script": script})
        row = identity.ROWS[0]
        cell = row.cell(self.echo.spec.quant)
        self.echo.backends[cell] = warm(kind(row, self.echo.spec, CPU))

    def in_background(self, count: int, protocol: str = "grpc") -> list[threading.Thread]:
        """Calls that other threads wait for."""
        threads = [threading.Thread(target=self.ask, args=(protocol,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads
