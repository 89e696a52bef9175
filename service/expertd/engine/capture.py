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
_spoilt: list[torch.cuda.CUDAGraph] = []
"""Those whose captures could not be ended; nothing else may come where they were."""


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
        self._begin_pool()

    def _begin_pool(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor: torch.cuda.CUDAGraph | None = None

    def __call__(self, warm: Run, run: Run) -> Run:
        with torch.cuda.device(self._device), torch.inference_mode():
            warm()
            torch.cuda.synchronize()
            with capturing, torch.cuda.stream(self._stream):
                if self._anchor is None:
                    # A pool goes with the last graph that uses it, and does not come back.
                    self._anchor = self._capture(torch.zeros(1, device=self._device).zero_)
                replay: Run = self._capture(run).replay
        return replay

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            run()
        except BaseException:
            with suppress(RuntimeError):  # it says that the capture failed, not why
                self._end(graph)
            raise
        self._end(graph)
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends the capture for torch's allocator too, which goes on with it where it failed: from
        then on it could give no memory back. That of pinned memory cannot be told; it would refuse
        another capture with this pool, and asks this graph for good."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # it has ended
                torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
            _spoilt.append(graph)
            self._begin_pool()
            raise


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: torch has 32, handed out in turn, and what others do on a stream that
    captures would become part of the graph."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
