"""What a backend's preparation holds in memory beside the canonical weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from expertd.weights.canonical import ExpertWeights


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses, but canonical weights."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, ExpertWeights | str):
        return
    elif is_dataclass(value):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name))
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def bytes_beside(tensors: Iterable[Tensor], weights: ExpertWeights | None) -> int:
    """Bytes of the tensors' memory, each piece once, without what the canonical weights own."""
    canonical = {} if weights is None else _memory(weights.tensors.values())
    return sum(size for place, size in _memory(tensors).items() if place not in canonical)


def _memory(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Where each piece of memory begins → its bytes."""
    pieces = (tensor.untyped_storage() for tensor in tensors)
    return {piece.data_ptr(): piece.nbytes() for piece in pieces}
