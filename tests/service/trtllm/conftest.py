"""Every test that asks for it gets a recording library in FlashInfer's place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.service.trtllm.recording import Recording

from expertd.backends.flashinfer_trtllm import kernels


@pytest.fixture
def recording() -> Iterator[Recording]:
    library = Recording()
    kernels.stand_in(library)
    yield library
    kernels.stand_in(None)
