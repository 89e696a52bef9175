"""Which files a checkpoint directory consists of, and what each of them holds; imports no torch."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.errors import FailedPrecondition

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """A file as it was when its header was read."""

    name: str
    path: Path
    size: int
    identity: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: bytes [begin, end) of a file; dtype is safetensors' name for it."""

    file: Shard
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint; raises FailedPrecondition naming the file."""
    shard = inspect_shard(root, name)
    if shard.size > MAX_JSON_BYTES:
        raise FailedPrecondition(f"{shard.path}: {shard.size} bytes are too many for a JSON file")
    with opened(shard) as fd:
        data = pread(fd, shard, 0, shard.size)
    try:
        value = json.loads(data, object_hook=_number)
    except (ValueError, RecursionError) as error:
        raise FailedPrecondition(f"{shard.path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FailedPrecondition(f"{shard.path}: holds no JSON object")
    return value


def _number(value: dict[str, Any]) -> Any:
    """transformers writes infinity, which JSON has not, as an object of its own."""
    return float(str(value["__float__"])) if value.keys() == {"__float__"} else value


def weight_files(root: Path) -> dict[str, list[str] | None]:
    """The tensors that the checkpoint says each file holds; None stands for all of them."""
    if (root / SINGLE).exists():
        return {SINGLE: None}
    index = _index_name(root)
    weight_map = read_json(root, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FailedPrecondition(f"{root / index}: has no weight_map of tensor names to files")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise FailedPrecondition(f"{root / index}: tensor {tensor!r} has no file name")
        files.setdefault(file, []).append(tensor)
    return dict(files)


def _index_name(root: Path) -> str:
    """The name of the one index; model.safetensors.index.json wins among several."""
    names = sorted(p.name for p in root.iterdir() if p.name.endswith(INDEX_SUFFIX))
    preferred = "model" + INDEX_SUFFIX
    if preferred in names:
        return preferred
    if len(names) == 1:
        return names[0]
    found = ", ".join(sorted(p.name for p in root.iterdir())[:12]) or "nothing"
    raise FailedPrecondition(
        f"{root}: found {found}; a checkpoint needs {SINGLE} or {preferred} with its shards "
        "(only safetensors and JSON are read; convert pickled weights first)"
    )


def inspect_shard(root: Path, name: str) -> Shard:
    """Resolve name within root; raises FailedPrecondition if it leads out or is no regular file."""
    path = (root / name).resolve()
    if not any(path.is_relative_to(allowed) for allowed in _allowed_roots(root)):
        raise FailedPrecondition(
            f"{root / name}: leads to {path}, outside the checkpoint directory; "
            "copy the file into the directory"
        )
    try:
        info = path.stat()
    except OSError as error:
        raise FailedPrecondition(f"{root / name}: {error.strerror or error}") from error
    if not stat.S_ISREG(info.st_mode):
        raise FailedPrecondition(f"{root / name}: not a regular file")
    return Shard(name, path, info.st_size, (info.st_dev, info.st_ino, info.st_mtime_ns))


def _allowed_roots(root: Path) -> Iterator[Path]:
    """The directory itself; for a snapshot of the Hugging Face cache also that model's blobs."""
    yield root
    if root.parent.name == "snapshots":
        yield root.parent.parent / "blobs"


@contextmanager
def opened(shard: Shard) -> Iterator[int]:
    """A descriptor of the very file that was inspected."""
    try:
        fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise FailedPrecondition(f"{shard.path}: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino, info.st_mtime_ns) != shard.identity:
            raise FailedPrecondition(f"{shard.path}: changed since its header was read; load again")
        yield fd
    finally:
        os.close(fd)


def pread(fd: int, shard: Shard, begin: int, length: int) -> bytes:
    """Exactly length bytes; raises FailedPrecondition if the file ends before."""
    data = bytearray(length)
    pread_into(fd, shard, begin, memoryview(data))
    return bytes(data)


def pread_into(fd: int, shard: Shard, begin: int, target: memoryview) -> None:
    """Fill target from offset begin; raises FailedPrecondition if the file ends before."""
    done = 0
    while done < len(target):
        got = os.preadv(fd, [target[done:]], begin + done)
        if got == 0:
            raise FailedPrecondition(
                f"{shard.path}: ends at byte {begin + done}, "
                f"{len(target) - done} bytes before what its header promises"
            )
        done += got
