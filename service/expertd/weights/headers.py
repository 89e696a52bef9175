"""The headers of a checkpoint's files; imports no torch."""

from __future__ import annotations

from expertd.errors import FailedPrecondition
from expertd.weights.shards import Shard, TensorEntry, opened, pread
from expertd_wire.safetensors import LENGTH_BYTES, header_end, parse_header
from expertd_wire.tensors import WireError


def read_header(shard: Shard) -> dict[str, TensorEntry]:
    """Every tensor of a file; raises FailedPrecondition for a file that is broken or cut short."""
    try:
        with opened(shard) as fd:
            prefix = pread(fd, shard, 0, min(LENGTH_BYTES, shard.size))
            head = pread(fd, shard, 0, header_end(prefix, shard.size))
        header = parse_header(head, shard.size)
    except WireError as error:
        raise FailedPrecondition(f"{shard.path}: {error}") from error
    return {
        name: TensorEntry(shard, entry.dtype, entry.shape, entry.begin, entry.end)
        for name, entry in header.tensors.items()
    }
