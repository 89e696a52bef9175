"""CUDA graphs of small batches: the many launches of a plan become one.

A backend's forward is captured once for each small bucket, on buffers that all layers share. A
batch is copied into them, padded to its bucket with rows that want no expert, and its results are
copied out. Only the thread that runs calls replays, so that the graphs can share their memory; what
a layer's load wants to replay has graphs apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.core import PlanMode
from expertd.core.buckets import bucket_index
from expertd.engine.capture import Capture, CudaCapture
from expertd.proof.batches import random_batch

log = logging.getLogger(__name__)

LARGEST = 64
"""Tokens of the largest bucket: beyond it the kernels take longer than their launches."""

EMPTY: dict[str, float] = {"rows": 0, "ids": -1, "weights": 0, "logits": 0}
"""What a row holds that only fills a bucket up."""


FIELDS = {
    PlanMode.ROUTED: ("rows", "row_scales", "ids", "weights", "out"),
    PlanMode.MONOLITHIC: ("rows", "row_scales", "logits", "out"),
}
"""What plans read and write of a batch; there may be more in it."""


class Signature(NamedTuple):
    """What batches must have in common to run on the same graph: all but their number of rows."""

    fields: tuple[tuple[str, torch.dtype, int], ...]

    @classmethod
    def of(cls, batch: Batch, mode: PlanMode) -> Signature:
        present = ((name, getattr(batch, name)) for name in FIELDS[mode])
        return cls(tuple((name, t.dtype, t.shape[1]) for name, t in present if t is not None))


class Slot:
    """The buffers of one bucket; rows from filled on are empty."""

    def __init__(self, like: Batch, tokens: int) -> None:
        self.batch = Batch(**_buffers(like, tokens))
        self.filled = 0
        self._names = [name for name in EMPTY if getattr(self.batch, name) is not None]
        self._first: dict[int, tuple[list[Tensor], Tensor]] = {}

    def fill(self, batch: Batch) -> None:
        """Copies a batch in; rows that an earlier one left behind become empty."""
        count = len(batch.rows)
        torch._foreach_copy_(self._rows(count)[0], [getattr(batch, name) for name in self._names])
        if count < self.filled:
            for name in self._names:
                getattr(self.batch, name)[count : self.filled].fill_(EMPTY[name])
        self.filled = count

    def bring_out(self, batch: Batch) -> None:
        """Copies the results of what was filled in to where they belong."""
        batch.out.copy_(self._rows(self.filled)[1])

    def _rows(self, count: int) -> tuple[list[Tensor], Tensor]:
        """The first rows of what is copied in and of what is copied out."""
        found = self._first.get(count)
        if found is None:
            whole = [getattr(self.batch, name) for name in (*self._names, "out")]
            *inputs, out = (buffer[:count] for buffer in whole)
            found = self._first[count] = inputs, out
        return found


class Graphs:
    """Captures backends at buckets; without buckets it does nothing."""

    def __init__(self, buckets: tuple[int, ...], capture: Callable[[], Capture]) -> None:
        self.buckets = buckets
        self._new_capture = capture
        self._capture = capture() if buckets else None
        self._slots: dict[tuple[int, Signature], Slot] = {}

    def attach(self, backends: Iterable[Backend]) -> None:
        """Captures these backends for the commonest calls; they replay from now on."""
        if self._capture is not None:
            for backend in backends:
                if backend.spec.num_experts:
                    backend.replay = self._replay(backend, self._capture)

    @contextmanager
    def apart(self, backends: Iterable[Backend]) -> Iterator[None]:
        """The backends replay graphs that share nothing with others', for as long as this lasts."""
        listed = list(backends)
        # Kept until they are replayed no more: it has their memory.
        own = Graphs(self.buckets, self._new_capture)
        own.attach(listed)
        try:
            yield
        finally:
            for backend in listed:
                backend.replay = None

    def _replay(self, backend: Backend, capture: Capture) -> Callable[[Batch], bool] | None:
        """What runs a batch of the captured form and of at most so many rows, if it can."""
        captured: list[tuple[Slot, Callable[[], None]]] = []
        batch, mode = _example(backend, 1), backend.row.mode
        wanted = Signature.of(batch, mode)
        try:
            for tokens in self.buckets:
                slot = self._slot(batch, wanted, tokens)
                captured.append((slot, capture(*_runs(backend, slot, tokens))))
        except Exception as error:  # whatever keeps a kernel from being captured, it still runs
            log.warning("%s runs without CUDA graphs: %s", backend.row.entry, error)
            return None
        return _replayer(wanted, mode, captured)

    def _slot(self, like: Batch, signature: Signature, tokens: int) -> Slot:
        key = tokens, signature
        if key not in self._slots:
            self._slots[key] = Slot(like, tokens)
        return self._slots[key]


def _replayer(
    wanted: Signature, mode: PlanMode, captured: list[tuple[Slot, Callable[[], None]]]
) -> Callable[[Batch], bool]:
    def replay(batch: Batch) -> bool:
        index = bucket_index(len(batch.rows))
        if index >= len(captured) or Signature.of(batch, mode) != wanted:
            return False
        slot, run = captured[index]
        slot.fill(batch)
        run()
        slot.bring_out(batch)
        return True

    return replay


def _runs(
    backend: Backend, slot: Slot, tokens: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The kernels on memory of their own, and on the slot's, which a live graph may be using.

    Nothing but the kernels: what else forward() does belongs to calls.
    """
    run = backend._forward
    return partial(run, _example(backend, tokens)), partial(run, slot.batch)


def _example(backend: Backend, tokens: int) -> Batch:
    """A batch of the commonest form of call, with the routing that the backend takes."""
    full = random_batch(backend.spec, tokens, backend.device)
    if backend.row.mode is PlanMode.MONOLITHIC:
        return Batch(full.rows, full.out, logits=full.logits)
    return Batch(full.rows, full.out, ids=full.ids, weights=full.weights)


def _buffers(like: Batch, tokens: int) -> dict[str, Tensor]:
    found = {name: getattr(like, name) for name in (*EMPTY, "out")}
    return {
        name: t.new_full((tokens, t.shape[1]), EMPTY.get(name, 0))
        for name, t in found.items()
        if t is not None
    }


def graphs_for(device: torch.device, buckets: tuple[int, ...], enabled: bool) -> Graphs:
    """The graphs of a device: for the small ones of its buckets, none on the processor."""
    usable = enabled and device.type == "cuda"
    small = tuple(tokens for tokens in buckets if tokens <= LARGEST) if usable else ()
    return Graphs(small, lambda: CudaCapture(device))
