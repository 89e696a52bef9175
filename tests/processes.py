"""Code that must run in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from tests.imports import ROOT


def assert_runs(code: str, *arguments: str) -> str:
    """Python runs the code to its end, from the root of the checkout; what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
