"""Files of the cache: replaced whole, nothing left of a writer that was killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.imports import ROOT

from expertd.proof import files
from expertd.proof.files import read_entries, replace_entries

ENTRIES = [{"a": 1}, {"b": 2}]

KILLED = """
import os, signal, sys
from pathlib import Path
from expertd.proof.files import replace_entries
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replace_entries(Path(sys.argv[1]), "things", [])
"""


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "things.json"
    for entries in (ENTRIES, ENTRIES[:1]):
        replace_entries(path, "things", entries)
        assert read_entries(path, "things") == entries
    assert [file.name for file in path.parent.iterdir()] == ["things.json"]


def test_a_killed_writer_leaves_the_file_as_it_was_and_no_draft_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "things.json"
    replace_entries(path, "things", ENTRIES)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and read_entries(path, "things") == ENTRIES
    (draft,) = set(tmp_path.iterdir()) - {path}
    replace_entries(path, "things", ENTRIES)
    assert draft.exists(), "its writer may be alive"
    long_ago = time.time() - files.STALE_SECONDS - 1
    os.utime(draft, (long_ago, long_ago))
    replace_entries(path, "things", ENTRIES)
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_told_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "things.json"
    with caplog.at_level(logging.WARNING):
        replace_entries(path, "things", ENTRIES)
    assert str(path) in caplog.text and "XDG_CACHE_HOME" in caplog.text
    assert read_entries(path, "things") == []
