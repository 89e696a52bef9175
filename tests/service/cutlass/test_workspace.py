"""The kernel's scratch memory is never smaller than what warm-up found to be enough."""

from __future__ import annotations

import pytest
import torch

from expertd.backends import scratch
from expertd.backends.flashinfer_cutlass import workspace as room
from expertd.backends.scratch import Scratch

CPU = torch.device("cpu")


def test_another_stream_gets_memory_that_is_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MEMORY", Scratch())
    loading = room.workspace(1000, CPU)
    monkeypatch.setattr(scratch, "_stream", lambda device: 7)
    serving = room.workspace(10, CPU)
    assert serving.numel() == 1000 and serving.data_ptr() != loading.data_ptr()
    assert room.workspace(1, torch.device("meta")).numel() == 1, "another device has its own"
