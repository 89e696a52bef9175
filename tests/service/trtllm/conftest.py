"""Every test that asks for it gets a recording library in FlashInfer's place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.service.trtllm.recording import Recording

from expertd.backends.flashinfer.library import library, stand_in


@pytest.fixture
def recording() -> Iterator[Recording]:
    # Imported here only: the card that runs test_card.py may have no FlashInfer.
    from tests.service.trtllm import flashinfer_cpu

    assert flashinfer_cpu
    recorded = Recording(library())
    stand_in(recorded)
    yield recorded
    stand_in(None)


@pytest.fixture
def twin() -> Iterator[None]:
    """The independent emulation of the kernels in FlashInfer's place."""
    from tests.twins import trtllm

    stand_in(trtllm.library())
    yield
    stand_in(None)
