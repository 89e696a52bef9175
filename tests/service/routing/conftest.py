"""Fresh inputs for every run, repeatable from the seed that a failure prints."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def seed() -> int:
    """EXPERTD_TEST_SEED repeats a run."""
    number = int(os.environ.get("EXPERTD_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print("seed", number)
    return number
