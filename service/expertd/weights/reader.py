"""Experts' bytes from disk into staging memory, several experts ahead of whoever uses them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertd.weights.checkpoint import torch_dtype
from expertd.weights.shards import TensorEntry, opened, pread_into
from expertd.weights.source import Expert, Source

STAGING_BYTES = 384 << 20
CHUNK_BYTES = 16 << 20
READERS = min(8, max(2, (os.cpu_count() or 2) // 2))
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """What an expert needs of one tensor: bytes [begin, end) of its file, at `at` in staging."""

    entry: TensorEntry
    begin: int
    end: int
    at: int
    dtype: Any
    shape: tuple[int, ...]


Staged = dict[str, Tensor]
"""The tensors of one expert by their names in the checkpoint."""


class Slot:
    """Staging memory for one expert; on a GPU it is pinned and busy until its copies are done."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=gpu)
        self._copied = torch.Event(device) if gpu else None

    def fill(self, pieces: Sequence[Piece], pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Start to read; chunk by chunk, so that a large expert has several readers."""
        if self._copied is not None:
            self._copied.synchronize()
        data: Any = self._memory.numpy()
        view = memoryview(data)
        return [
            pool.submit(_read, piece.entry, begin, view[at : at + min(CHUNK_BYTES, left)])
            for piece in pieces
            for begin, at, left in _chunks(piece)
        ]

    def staged(self, pieces: dict[str, Piece]) -> Staged:
        """Views of what was read."""
        return {
            name: self._memory[p.at : p.at + p.end - p.begin].view(p.dtype).view(p.shape)
            for name, p in pieces.items()
        }

    def release(self) -> None:
        """Everything queued on the device so far has to end before the memory is used again."""
        if self._copied is not None:
            self._copied.record()


def stream(source: Source, device: torch.device) -> Iterator[tuple[Expert, Staged]]:
    """Each expert with its tensors, which are valid until the next one is asked for.

    Staging takes STAGING_BYTES, or one expert if that is larger. Raises FailedPrecondition for a
    file that ends early or has changed.
    """
    plans = [_pieces(source, expert) for expert in source.experts]
    size = max(
        (piece.at + piece.end - piece.begin for p in plans for piece in p.values()), default=0
    )
    count = max(1, min(len(plans), STAGING_BYTES // max(size, 1), 2 * READERS))
    free = deque(Slot(size, device) for _ in range(count))
    reading: deque[tuple[int, Slot, list[Future[None]]]] = deque()
    waiting = iter(range(len(plans)))
    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        try:
            for _ in plans:
                while free and (number := next(waiting, None)) is not None:
                    slot = free.popleft()
                    futures = slot.fill(list(plans[number].values()), pool)
                    reading.append((number, slot, futures))
                number, slot, futures = reading.popleft()
                for future in futures:
                    future.result()
                yield source.experts[number], slot.staged(plans[number])
                slot.release()
                free.append(slot)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pieces(source: Source, expert: Expert) -> dict[str, Piece]:
    """The byte ranges of an expert and where they go."""
    pieces: dict[str, Piece] = {}
    at = 0
    for name in expert.names():
        entry = source.checkpoint.entry(name)
        shape, begin, end = entry.shape, entry.begin, entry.end
        if source.layout.stacked:
            row = (end - begin) // shape[0]
            begin += expert.number * row
            shape, end = shape[1:], begin + row
        pieces[name] = Piece(entry, begin, end, at, torch_dtype(name, entry), shape)
        at += -(-(end - begin) // ALIGNMENT) * ALIGNMENT
    return pieces


def _chunks(piece: Piece) -> Iterator[tuple[int, int, int]]:
    """(file offset, staging offset, bytes left) of each chunk."""
    for done in range(0, piece.end - piece.begin, CHUNK_BYTES):
        yield piece.begin + done, piece.at + done, piece.end - piece.begin - done


def _read(entry: TensorEntry, begin: int, target: memoryview) -> None:
    with opened(entry.file) as fd:
        pread_into(fd, entry.file, begin, target)
