"""From a function that launches kernels to one that replays them as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

Run = Callable[[], None]


class Capture(Protocol):
    """Captures what run launches; warm does the same work on other memory, and really runs."""

    def __call__(self, warm: Run, run: Run) -> Run: ...


class CudaCapture:
    """Captures on a stream of its own; all graphs take their memory from one pool.

    Other threads go on using the card meanwhile. What run allocates lives as long as the graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Kept by itself: a pool goes with the last graph that uses it, and does not come back.
        self._pool = torch.cuda.MemPool()

    def __call__(self, warm: Run, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.inference_mode():
            warm()
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # it says that the capture failed, not why
                        graph.capture_end()
                    raise
                graph.capture_end()
        replay: Run = graph.replay
        return replay
