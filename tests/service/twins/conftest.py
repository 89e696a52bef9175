"""A fresh seed per test, printed when it fails; torch's own generator starts from it too."""

from __future__ import annotations

import secrets

import pytest
import torch


@pytest.fixture
def seed() -> int:
    value = secrets.randbelow(1 << 31)
    print(f"seed = {value}")
    torch.manual_seed(value)
    return value
