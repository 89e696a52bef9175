"""`make serve` at a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.servers import PORTS, environment
from tests.imports import ROOT

AT_A_TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
INTERRUPT = b"\x03"


@pytest.mark.slow
def test_ctrl_c_drains_and_exits_with_0(tmp_path: Path) -> None:
    make = ["make", "-o", ".venv/.installed", "serve", f"BIN={Path(sys.executable).parent}"]
    command = [sys.executable, "-c", AT_A_TERMINAL, *make, f"ARGS=--demo {' '.join(PORTS)}"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line.decode())
            if line.startswith(b"Try it"):
                process.stdin.write(INTERRUPT)
                process.stdin.flush()
    assert (process.returncode, "Shutting down" in "".join(shown)) == (0, True), shown
