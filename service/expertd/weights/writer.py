"""Checkpoint directories, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from expertd.errors import InvalidArgument

SHARD_BYTES = 4 << 30


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends without an error.

    Raises InvalidArgument when out exists already (an empty directory is taken over).
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InvalidArgument(f"{out}: exists already; choose another directory or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield draft
        draft.chmod(0o755)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
