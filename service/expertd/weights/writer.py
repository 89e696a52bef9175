"""Checkpoint directories, written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from expertd.errors import InvalidArgument

SHARD_BYTES = 4 << 30
DRAFT = ".expertd-draft"
"""What the hidden directories end in that a checkpoint is written to."""


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends without an error.

    Raises InvalidArgument when out exists already (an empty directory is taken over).
    """
    _refuse_taken(out)
    with draft(out) as directory:
        yield directory
        directory.chmod(0o755)
        try:
            os.replace(directory, out)
        except OSError:
            _refuse_taken(out)
            raise


@contextmanager
def draft(out: Path) -> Iterator[Path]:
    """A hidden directory beside out, gone when the block ends; a killed process's go first.

    Raises OSError for a disk that is full, too.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.parent):  # so that nobody takes a new draft for a stale one
        _remove_stale(out.parent)
        directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=DRAFT, dir=out.parent))
        held = _lock(directory, wait=False)
    try:
        yield directory
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{out}: {error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _release(held)


def _refuse_taken(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InvalidArgument(f"{out}: exists already; choose another directory or remove it")


def _remove_stale(parent: Path) -> None:
    """Removes drafts that nobody holds: the kernel lets go of them when their writer dies."""
    for stale in parent.glob(f".*{DRAFT}"):
        held = None if stale.is_symlink() else _lock(stale, wait=False)
        if held is not None:
            shutil.rmtree(stale, ignore_errors=True)
            _release(held)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    held = _lock(directory, wait=True)
    try:
        yield
    finally:
        _release(held)


def _lock(directory: Path, wait: bool) -> int | None:
    """Holds a directory until it is released; None if another does, or nobody can there."""
    with suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(fd)
            raise
        return fd
    return None


def _release(held: int | None) -> None:
    if held is not None:
        os.close(held)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


class ShardWriter:
    """Writes shards as they come; their number, which is in their names, is known at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """One shard."""
        save_file(dict(tensors), self._draft(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(tensors))
        self._total += sum(_nbytes(tensor) for tensor in tensors.values())

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """As many shards as the tensors take."""
        held: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if held and sum(map(_nbytes, held.values())) + _nbytes(tensor) > SHARD_BYTES:
                self.add(held)
                held = {}
            held[name] = tensor
        if held:
            self.add(held)

    def finish(self) -> None:
        """Give the shards their names and write the index."""
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            self._draft(number).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self._directory / "model.safetensors.index.json", index)

    def _draft(self, number: int) -> Path:
        return self._directory / f"{number}.draft"


def write_shards(directory: Path, shards: Sequence[Mapping[str, Tensor]]) -> None:
    """Tensors as numbered safetensors files with their index."""
    writer = ShardWriter(directory)
    for tensors in shards:
        writer.add(tensors)
    writer.finish()


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
