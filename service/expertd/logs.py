"""Log lines for a person or, one JSON object each, for a machine; never a tensor, never a token."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from queue import Full, Queue

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
EXTRAS = ("request_id", "carrier", "model", "layer", "code", "reason", "tokens", "milliseconds")
"""What a record may carry beside its message (logging's extra=)."""

MOST_WAITING = 4096
"""Lines that may wait to be written; what is said meanwhile is lost, and counted."""
PATIENCE_SECONDS = 1.0
"""How long the end of the process waits for them."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        body = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        body |= {name: getattr(record, name) for name in EXTRAS if hasattr(record, name)}
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body)


class Aside(logging.Handler):
    """Writes on a thread of its own: a stderr that nobody reads must not hold the threads of calls.

    Not through sys.stderr, whose lock would be held at the end of the process.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lost = 0
        self._lines: Queue[str] = Queue(MOST_WAITING)
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except Full:
            self._lost += 1
        except Exception:
            self.handleError(record)  # a line that cannot be made is not its caller's failure

    def flush(self) -> None:
        """Waits until everything is written, but not for long."""
        with (done := self._lines.all_tasks_done):
            done.wait_for(lambda: not self._lines.unfinished_tasks, PATIENCE_SECONDS)

    def _write_all(self) -> None:
        while True:
            self._write(self._lines.get())
            lost, self._lost = self._lost, 0
            if lost:
                self._write(self.format(_missing(lost)))
            self._lines.task_done()

    def _write(self, line: str) -> None:
        data = (line + "\n").encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # whoever read it has gone, and there is nowhere to say so
            pass


def _missing(lines: int) -> logging.LogRecord:
    text = f"{lines} lines are missing: nobody read the log"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)


def set_up(style: str) -> None:
    """Logs to stderr in the style asked for."""
    # Where stderr was closed, its number is that of something else by now.
    handler = logging.NullHandler() if sys.stderr is None else Aside(sys.stderr.fileno())
    handler.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
