"""Every test that asks for it gets a recording library in FlashInfer's place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.service.trtllm.recording import Recording

from expertd.backends.flashinfer_trtllm import kernels


@pytest.fixture
def recording() -> Iterator[Recording]:
    # Imported here only: the card that runs test_card.py may have no FlashInfer.
    from tests.service.trtllm import flashinfer_cpu

    assert flashinfer_cpu
    library = Recording(kernels.library())
    kernels.stand_in(library)
    yield library
    kernels.stand_in(None)
