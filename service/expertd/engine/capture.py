"""From a function that launches kernels to one that replays them as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Protocol

import torch

Run = Callable[[], None]

capturing = threading.Lock()
"""Held while a graph is captured. Whoever waits for the whole device takes it too: to do that
meanwhile is an error for both, on whatever thread, and torch's allocator gives nothing back then.
"""
_spoilt: list[tuple[torch.cuda.MemPool, torch.cuda.CUDAGraph]] = []
"""What captures that could not be ended had; nothing else may come where it was."""


class Capture(Protocol):
    """Captures what run launches; warm does the same work on other memory, and really runs."""

    def __call__(self, warm: Run, run: Run) -> Run: ...


class CudaCapture:
    """Captures on a stream of its own; all graphs take their memory from one pool.

    Other threads go on using the card meanwhile. What run allocates lives as long as the graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)
        # Kept by itself: a pool goes with the last graph that uses it, and does not come back.
        with torch.cuda.device(device):
            self._pool = torch.cuda.MemPool()

    def __call__(self, warm: Run, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.inference_mode():
            warm()
            torch.cuda.synchronize()
            with capturing, torch.cuda.stream(self._stream):
                try:
                    graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # it says that the capture failed, not why
                        self._end(graph)
                    raise
                self._end(graph)
        replay: Run = graph.replay
        return replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends the capture for torch's allocator too, which goes on with it where it failed: from
        then on it could give no memory back. That of pinned memory cannot be told; it would refuse
        another capture with this pool, and asks this graph for good."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # it has ended
                torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool.id)
            _spoilt.append((self._pool, graph))
            self._pool = torch.cuda.MemPool()
            raise


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: torch has 32, handed out in turn, and what others do on a stream that
    captures would become part of the graph."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
