"""Scratch memory: each stream its own, and none smaller than what warm-up found to be enough."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from expertd.backends.flashinfer_cutlass import workspace as room

CPU = torch.device("cpu")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of the current stream, in a list that a test may write to."""
    current = [0]
    monkeypatch.setattr(room, "_buffers", {})
    monkeypatch.setattr(room, "_stream", lambda device: current[0])
    yield current


def test_a_buffer_is_used_again_and_only_grows(stream: list[int]) -> None:
    first = room.workspace(100, CPU)
    assert first.numel() == 100
    assert room.workspace(60, CPU).data_ptr() == first.data_ptr()
    assert room.workspace(200, CPU).numel() == 200
    assert room.workspace(1, CPU).numel() == 200


def test_another_stream_gets_memory_of_its_own_that_is_as_large(stream: list[int]) -> None:
    loading = room.workspace(1000, CPU)
    stream[0] = 7
    serving = room.workspace(10, CPU)
    assert serving.numel() == 1000 and serving.data_ptr() != loading.data_ptr()
    assert room.workspace(1, torch.device("meta")).numel() == 1, "another device has its own"
