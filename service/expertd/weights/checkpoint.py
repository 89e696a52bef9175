"""A checkpoint directory, opened by reading its JSON and safetensors headers; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from expertd.errors import FailedPrecondition, InvalidArgument
from expertd.weights.headers import read_header
from expertd.weights.shards import (
    TensorEntry,
    inspect_shard,
    opened,
    pread_into,
    read_json,
    weight_files,
)

if TYPE_CHECKING:
    from torch import Tensor

TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "uint8",
    "U8": "uint8",
    "I8": "int8",
    "BOOL": "bool",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
"""How safetensors' dtypes are held in torch: e8m0 stays the exponent's bits."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The config and the tensors of a directory; nothing of the weights is in memory.

    broken: the tensors that the index promises and its files do not hold soundly, and why.
    """

    root: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    broken: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path, *, skip_broken: bool = False) -> Checkpoint:
        """Read config.json, the index and every header; raises InvalidArgument when path is no
        directory, FailedPrecondition when a file is missing, broken or outside of it.

        skip_broken: a shard like that takes only its own tensors away; they are in `broken` then.
        """
        root = Path(path).resolve()
        if not root.is_dir():
            raise InvalidArgument(f"{path}: is not a directory; give the folder of config.json")
        config = read_json(root, "config.json")
        entries, broken = _entries(root)
        if broken and not skip_broken:
            raise FailedPrecondition(next(iter(broken.values())))
        return cls(root, config, MappingProxyType(entries), MappingProxyType(broken))

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies; raises FailedPrecondition naming what is missing."""
        entry = self.tensors.get(name)
        if entry is None:
            raise FailedPrecondition(self.absence(name))
        return entry

    def absence(self, name: str) -> str:
        """Why a tensor is not there."""
        return self.broken.get(name) or f"{self.root}: tensor {name!r} is missing"

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows [begin, end) of a tensor's first dimension, freshly read; a scalar has no rows."""
        import torch

        entry = self.entry(name)
        shape, offset, length = _span(name, entry, begin, end)
        tensor = torch.empty(shape, dtype=torch_dtype(name, entry))
        with opened(entry.file) as fd:
            flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            pread_into(fd, entry.file, entry.begin + offset, memoryview(flat)[:length])
        return tensor


def torch_dtype(name: str, entry: TensorEntry) -> Any:
    """The torch dtype that holds a tensor; raises FailedPrecondition for one that none holds."""
    import torch

    known = TORCH_DTYPES.get(entry.dtype)
    if known is None:
        raise FailedPrecondition(
            f"{entry.file.path}: tensor {name!r} is {entry.dtype}; "
            f"readable dtypes are {', '.join(TORCH_DTYPES)}"
        )
    return getattr(torch, known)


def _span(
    name: str, entry: TensorEntry, begin: int, end: int | None
) -> tuple[tuple[int, ...], int, int]:
    """The shape, byte offset and byte length of rows [begin, end)."""
    total = entry.end - entry.begin
    if not entry.shape:
        return (), 0, total
    rows = entry.shape[0]
    stop = rows if end is None else end
    if not 0 <= begin <= stop <= rows:
        raise InvalidArgument(f"{name}: rows {begin}-{stop} asked, 0-{rows} exist")
    row = total // rows if rows else 0
    return (stop - begin, *entry.shape[1:]), begin * row, (stop - begin) * row


def _entries(root: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Every sound tensor, and the promised ones that are not; raises without an index to tell."""
    entries: dict[str, TensorEntry] = {}
    broken: dict[str, str] = {}
    for file, promised in weight_files(root).items():
        try:
            shard = inspect_shard(root, file)
            held = read_header(shard)
        except FailedPrecondition as error:
            if promised is None:
                raise
            broken |= dict.fromkeys(promised, str(error))
            continue
        for name in held if promised is None else promised:
            if name in held:
                entries[name] = held[name]
            else:
                broken[name] = f"{shard.path}: tensor {name!r} is missing; the index has it there"
    return entries, broken
