"""Real servers: `expertd serve` as a process of its own, or an App in this one."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

import torch

from expertd.app import App
from expertd.config import add_flags, resolve
from expertd.preflight import check_settings

EXPERTD = [sys.executable, "-c", "import sys; from expertd.cli import main; sys.exit(main())"]
PORTS = ["--http-port", "0", "--grpc-port", "0"]
MINUTE = 60
NOT_READY = "expertd: not every layer is ready"
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Server:
    """A server that is ready, and where it can be reached."""

    http: str
    grpc: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.http}"


def environment(home: Path) -> dict[str, str]:
    """This process's, without its settings and with a home that is its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXPERTD_")}
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


def expertd(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """One command that ends by itself."""
    return subprocess.run(
        [*EXPERTD, *args], env=environment(home), capture_output=True, text=True, timeout=MINUTE
    )


@contextmanager
def serving(home: Path, *args: str, program: Sequence[str] = ()) -> Iterator[Server]:
    """`expertd serve` with these flags on free ports, ready; killed if it outlives its test.

    program: what to run instead of expertd.
    """
    log = home / f"serve-{len(list(home.glob('serve-*')))}.log"
    command = [*(program or EXPERTD), "serve", *PORTS, "--announce", "json", *args]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, env=environment(home), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            line = announced(process, log)
            assert line, f"the server ended with {process.wait(MINUTE)}: {log.read_text()}"
            yield Server(**json.loads(line), process=process, log=log)
        finally:
            process.kill()


def announced(process: subprocess.Popen[str], log: Path) -> str:
    """The line that a ready server prints, or nothing if it ended; fails if a layer did."""
    assert process.stdout is not None
    while not select([process.stdout], [], [], LOOK_SECONDS)[0]:
        assert NOT_READY not in (told := log.read_text()), told
    return process.stdout.readline()


@contextmanager
def in_process(*args: str, stop_after: bool = True) -> Iterator[tuple[App, Any]]:
    """An App in this process, started with these flags on free ports; its addresses beside it."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = parser.parse_args([*PORTS, "--device", "cpu", "--drain-seconds", "10", *args])
    settings = resolve(flags, {}).settings
    check_settings(settings)
    threads = torch.get_num_threads()
    app = App(settings, threading.Event())
    try:
        yield app, app.start()
    finally:
        torch.set_num_threads(threads)
        if stop_after:
            app.stop()
