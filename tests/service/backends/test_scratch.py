"""Scratch memory: each stream its own, only growing; a graph that is captured keeps its own."""

from __future__ import annotations

import pytest
import torch

from expertd.backends import scratch as room
from expertd.backends.scratch import Scratch

CPU = torch.device("cpu")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of the current stream, in a list that a test may write to."""
    current = [0]
    monkeypatch.setattr(room, "_stream", lambda device: current[0])
    return current


def test_a_buffer_is_used_again_and_only_grows(stream: list[int]) -> None:
    memory = Scratch()
    first = memory.take(100, CPU)
    assert first.numel() == 100
    assert memory.take(60, CPU).data_ptr() == first.data_ptr()
    assert memory.take(200, CPU).numel() == 200
    assert memory.take(1, CPU).numel() == 200


def test_streams_and_devices_have_memory_of_their_own(stream: list[int]) -> None:
    memory = Scratch()
    first = memory.take(100, CPU)
    stream[0] = 7
    second = memory.take(300, CPU)
    assert second.data_ptr() != first.data_ptr()
    assert memory.take(1, torch.device("meta")).numel() == 1
    stream[0] = 0
    assert memory.take(1, CPU).data_ptr() == first.data_ptr()


def test_the_widest_is_that_of_a_devices_streams(stream: list[int]) -> None:
    memory = Scratch()
    assert memory.widest(CPU) == 0
    for stream[0], size in ((1, 30), (2, 500), (3, 40)):
        memory.take(size, CPU)
    memory.take(9000, torch.device("meta"))
    assert memory.widest(CPU) == 500


def test_a_graph_gets_memory_that_nobody_else_has(
    stream: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Scratch()
    shared = memory.take(100, CPU)
    monkeypatch.setattr(room, "_capturing", lambda device: True)
    graphs = memory.take(100, CPU), memory.take(200, CPU)
    assert shared.data_ptr() not in {graph.data_ptr() for graph in graphs}
    assert graphs[0].data_ptr() != graphs[1].data_ptr()
    monkeypatch.setattr(room, "_capturing", lambda device: False)
    assert memory.take(100, CPU).data_ptr() == shared.data_ptr()
