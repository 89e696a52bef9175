"""The log's own thread: whoever says something never waits for whoever should read it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.waiting import until

from expertd import logs
from expertd.logs import MOST_WAITING, Aside

LONG = "x" * 100
MISSING = re.compile(r"(\d+) lines are missing")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def say(handler: Aside, *texts: str) -> None:
    for text in texts:
        handler.handle(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))


def lines_until(fd: int, last: str) -> list[str]:
    read = b""
    while not read.endswith(f"{last}\n".encode()):
        read += os.read(fd, 1 << 16)
    return read.decode().splitlines()


def test_a_log_that_nobody_reads_holds_nobody(pipe: tuple[int, int]) -> None:
    count = MOST_WAITING + 2000
    handler = Aside(pipe[1])
    speaker = threading.Thread(
        target=say, args=(handler, *(f"{n} {LONG}" for n in range(count))), daemon=True
    )
    speaker.start()
    speaker.join(20)
    assert not speaker.is_alive()
    reader = threading.Thread(target=lambda: read.extend(lines_until(pipe[0], "the end")))
    read: list[str] = []
    reader.start()
    until(lambda: not handler._lines.unfinished_tasks)
    say(handler, "the end")
    reader.join(20)
    told = [int(found[1]) for line in read if (found := MISSING.match(line))]
    said = [int(line.partition(" ")[0]) for line in read if line.endswith(LONG)]
    assert said == sorted(set(said)) and len(said) >= MOST_WAITING
    assert sum(told) == count - len(said) > 0


def test_the_end_waits_for_what_was_said_but_not_for_ever(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = Aside(pipe[1])
    texts = [f"{n} ∞ \ud800" for n in range(200)]
    say(handler, *texts)
    handler.flush()
    assert lines_until(pipe[0], r"199 ∞ \ud800") == [f"{n} ∞ \\ud800" for n in range(200)]
    monkeypatch.setattr(logs, "PATIENCE_SECONDS", 0.01)
    say(handler, LONG * 10_000)
    handler.flush()
    assert handler._lines.unfinished_tasks == 1
    # To its end: the number of a pipe that is closed meanwhile would soon be another's.
    assert lines_until(pipe[0], LONG) == [LONG * 10_000]
    until(lambda: not handler._lines.unfinished_tasks)


def test_a_reader_who_has_gone_ends_nothing(pipe: tuple[int, int]) -> None:
    ends = os.pipe()
    os.close(ends[0])
    handler = Aside(ends[1])
    say(handler, "to nobody", "nor this")
    until(lambda: not handler._lines.unfinished_tasks)
    os.dup2(pipe[1], ends[1])
    say(handler, "to somebody again")
    assert lines_until(pipe[0], "to somebody again") == ["to somebody again"]
    os.close(ends[1])


def test_without_a_stderr_nothing_else_is_written_to(tmp_path: Path) -> None:
    other = tmp_path / "other"
    code = (
        "import logging, os, sys\n"
        "from expertd.logs import set_up\n"
        "assert os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) == 2\n"
        "set_up('text')\n"
        "logging.getLogger().warning('to nobody')\n"
        "logging.shutdown()\n"
    )
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code, str(other)]
    assert subprocess.run(command).returncode == 0
    assert other.read_text() == ""


def test_a_line_that_cannot_be_made_fails_nobody(
    pipe: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    handler = Aside(pipe[1])
    handler.handle(logging.LogRecord("x", logging.INFO, __file__, 1, "%d rows", ("many",), None))
    assert "%d rows" in capsys.readouterr().err
