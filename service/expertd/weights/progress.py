"""How far a load is: a bar on a terminal, else one JSON line a second."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

PERIOD_SECONDS = 1.0


class Meter:
    """Counts the bytes that load_layer reports: `with Meter(name, total) as meter: ...`."""

    def __init__(
        self,
        name: str,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._clock = name, total, clock
        self._stream = stream or sys.stderr
        self._done = 0
        self._begin = self._told = clock()
        self._bar = _bar(self._stream) if self._stream.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task(self._name, total=self._total)
        return self

    def __call__(self, nbytes: int) -> None:
        """So many bytes more."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], nbytes)
        elif self._clock() - self._told >= PERIOD_SECONDS:
            self._tell()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        seconds = self._told - self._begin
        line = {
            "loading": self._name,
            "bytes": self._done,
            "total": self._total,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(line), file=self._stream, flush=True)


def _bar(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(file=stream),
        transient=True,
    )
