"""How long a launch takes, on the processor or on a card."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Run = Callable[[], None]

FLUSHED_BYTES = 256 << 20
"""More than the second-level cache of any card."""


class Watch:
    """Times runs on the processor."""

    def now(self) -> float:
        """Seconds of a clock that only goes on."""
        return time.perf_counter()

    def microseconds(self, run: Run) -> float:
        """How long one run takes."""
        begin = self.now()
        run()
        return (self.now() - begin) * 1e6


class CardWatch(Watch):
    """Times runs on a card from an idle start and a cold cache, as a layer of many finds it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def microseconds(self, run: Run) -> float:
        with torch.cuda.device(self._device):
            begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self._device).zero_()
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end) * 1e3)


def watch_for(device: torch.device) -> Watch:
    """The watch of a device."""
    return CardWatch(device) if device.type == "cuda" else Watch()
