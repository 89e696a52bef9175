"""Which checkpoint a layer is of, whatever range of its experts is loaded; imports no torch."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import Model
from expertd.weights.shards import Shard, TensorEntry, opened, pread

SAMPLE_BYTES = 64


def checkpoint_digest(checkpoint: Checkpoint, layer: int) -> str:
    """sha256, in hex, of each tensor's name, dtype, shape and some bytes from its middle.

    All tensors of the layer count, the router's too, so replicas of different ranges can be told to
    be of one checkpoint: training changes nearly every byte. Empty if some files are not sound.
    Raises FailedPrecondition for a file that has changed.
    """
    prefix = Model.of(checkpoint).prefix(layer)
    if any(name.startswith(prefix) for name in checkpoint.broken):
        return ""
    by_file: dict[Shard, list[tuple[str, TensorEntry]]] = defaultdict(list)
    for name, entry in checkpoint.tensors.items():
        if name.startswith(prefix):
            by_file[entry.file].append((name, entry))
    samples = [
        (name, entry, sample)
        for file, entries in by_file.items()
        for name, entry, sample in _samples(file, entries)
    ]
    digest = hashlib.sha256()
    for name, entry, sample in sorted(samples, key=lambda found: found[0]):
        digest.update(f"\n{name} {entry.dtype} {list(entry.shape)} ".encode() + sample)
    return digest.hexdigest()


def _samples(
    file: Shard, entries: list[tuple[str, TensorEntry]]
) -> list[tuple[str, TensorEntry, bytes]]:
    with opened(file) as fd:
        return [(name, entry, pread(fd, file, *_middle(entry))) for name, entry in entries]


def _middle(entry: TensorEntry) -> tuple[int, int]:
    """Offset and length of a sample."""
    size = entry.end - entry.begin
    length = min(size, SAMPLE_BYTES)
    return entry.begin + (size - length) // 2, length
