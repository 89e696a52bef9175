"""The tests of tests/service/triton, each file in a process in which Triton is interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))
SECONDS = 900


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
