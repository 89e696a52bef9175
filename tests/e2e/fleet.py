"""Replicas that die and come back: `expertd serve` processes, each at an address of its own."""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.servers import EXPERTD, MINUTE, environment
from tests.e2e.test_metrics import scrape

RANGES = ("0-15", "0-15", "16-31", "16-31")
"""What the four replicas of a demo's 32 experts hold."""

PORTS = range(20_000, 32_000)
"""Below those that the system gives away, so that a dead replica's port stays free."""


@dataclass
class Replica:
    """A server that can be started again after its end, at the same address."""

    home: Path
    experts: str
    flags: tuple[str, ...]
    http: str
    grpc: str
    process: subprocess.Popen[str] | None = None
    starts: int = 0

    def start(self) -> None:
        """Returns when it is ready."""
        self.starts += 1
        ports = (flag for name in ("http", "grpc") for flag in self._port(name))
        command = [*EXPERTD, "serve", *ports, "--experts", self.experts, "--announce", "json"]
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, *self.flags],
                env=environment(self.home) | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line and json.loads(line)["grpc"] == self.grpc, self.log.read_text()

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal that ends the process; its exit code."""
        self.send(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for the process to end; its exit code."""
        process = self.process
        assert process is not None and process.stdout is not None
        code = process.wait(MINUTE)
        process.stdout.close()
        self.process = None
        return code

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def answered(self, model: str) -> int:
        """How many calls of this process ended well."""
        return self._sum("expertd_requests_total", model=model, code="OK")

    def weights_bytes(self, model: str) -> int:
        """What the experts held take."""
        return self._sum("expertd_weights_bytes", model=model)

    def _sum(self, metric: str, **wanted: str) -> int:
        samples = scrape(self.http).items()
        return int(
            sum(v for (name, labels), v in samples if name == metric and wanted.items() <= labels)
        )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> Path:
        return self.home / f"replica-{self.grpc.rpartition(':')[2]}-{self.starts}.log"

    def _port(self, name: str) -> tuple[str, str]:
        return f"--{name}-port", str(getattr(self, name).rpartition(":")[2])


@contextmanager
def replicas(
    home: Path, *flags: str, ranges: Sequence[str] = RANGES, devices: Sequence[str] = ("cpu",)
) -> Iterator[list[Replica]]:
    """One ready replica for each range, devices taken in turn; all are killed at the end."""
    fleet = [
        Replica(
            home,
            experts,
            ("--device", device, "--threads", "1", *flags),
            http=f"127.0.0.1:{free_port()}",
            grpc=f"127.0.0.1:{free_port()}",
        )
        for experts, device in zip(ranges, itertools.cycle(devices), strict=False)
    ]
    try:
        with ThreadPoolExecutor(len(fleet)) as threads:
            list(threads.map(Replica.start, fleet))
        yield fleet
    finally:
        for replica in fleet:
            if replica.process is not None:
                replica.end()


def free_port() -> int:
    """A port that nothing listens on."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
