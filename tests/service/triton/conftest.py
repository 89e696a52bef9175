"""These tests run Triton's interpreter, which has to be chosen before triton is imported: in a
process of their own (tests/service/test_triton.py starts it), and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # numpy stands in for the card, which overflows without a word.
    silent = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(silent)


@pytest.fixture
def seed() -> int:
    """EXPERTD_TEST_SEED repeats a run."""
    number = int(os.environ.get("EXPERTD_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print("seed", number)
    return number
