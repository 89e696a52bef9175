"""Where a layer's experts lie in a checkpoint, checked against its config; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from expertd.core import LayerSpec
from expertd.errors import FailedPrecondition
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.family import Layout
from expertd.weights.formats import FLOATS, Format, Part
from expertd.weights.layers import Model
from expertd.weights.shards import TensorEntry


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored matrix [N, K]: the name of each part's tensor."""

    n: int
    k: int
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert's stored matrices: first is up and gate, both in one if fused, or up alone."""

    number: int
    first: tuple[Stored, ...]
    second: Stored

    def names(self) -> list[str]:
        """Every tensor that has a part of this expert."""
        return [name for stored in (*self.first, self.second) for name in stored.tensors.values()]


@dataclass(frozen=True, slots=True)
class Source:
    """A layer's experts on disk; every name, dtype and shape has been checked."""

    checkpoint: Checkpoint
    layout: Layout
    format: Format
    experts: tuple[Expert, ...]

    @property
    def static_inputs(self) -> bool:
        """Whether the checkpoint has activation scales."""
        return "input" in self.experts[0].second.tensors


def locate(model: Model, layer: int, spec: LayerSpec) -> Source:
    """Find and check every tensor of the experts held.

    Raises FailedPrecondition naming file, tensor and expectation where one is missing or has
    another dtype or shape than config and format say.
    """
    prefix, problems = model.prefix(layer), []
    for layout, format_ in product(model.family.layouts, model.formats(layer)):
        finder = _Finder(model.checkpoint, prefix, layout, format_, spec)
        try:
            experts = tuple(finder.expert(e) for e in range(spec.expert_begin, spec.expert_end))
        except _Mismatch as problem:
            problems.append(problem)
        else:
            return Source(model.checkpoint, layout, format_, experts)
    raise FailedPrecondition(str(max(problems, key=lambda problem: problem.found)))


class _Mismatch(Exception):
    """A form that the checkpoint does not have; found counts the tensors that fitted."""

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


@dataclass(slots=True)
class _Finder:
    """Looks a layer's tensors up under one layout and format."""

    checkpoint: Checkpoint
    prefix: str
    layout: Layout
    format: Format
    spec: LayerSpec
    found: int = 0
    optional: frozenset[str] | None = None

    def expert(self, number: int) -> Expert:
        hidden, width = self.spec.hidden, self.spec.intermediate
        layout = self.layout
        if layout.fused != "no":
            rows, names = 2 * width, [layout.up]
        else:
            rows, names = width, [layout.up, layout.gate][: 1 + self.spec.activation.gated]
        first = tuple(self._matrix(name, number, rows, hidden) for name in names)
        return Expert(number, first, self._matrix(layout.down, number, hidden, width))

    def _matrix(self, name: str, expert: int, n: int, k: int) -> Stored:
        tensors = {}
        for part_name, part in self._parts():
            tensor = self.prefix + self.layout.part(name, expert, part.suffix)
            if part.optional and tensor not in self.checkpoint.tensors:
                continue
            self._check(tensor, part, n, k)
            tensors[part_name] = tensor
        self._check_alike(name, expert, frozenset(tensors))
        return Stored(n, k, tensors)

    def _parts(self) -> Iterator[tuple[str, Part]]:
        yield from self.format.parts.items()
        if self.spec.expert_bias:
            yield "bias", BIAS

    def _check(self, name: str, part: Part, n: int, k: int) -> None:
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise _Mismatch(self.checkpoint.absence(name), self.found)
        self.found += 1
        if entry.dtype not in part.dtypes:
            expected = " or ".join(part.dtypes)
            raise self._wrong(name, entry, f"{self.format.name} has {expected} here")
        lead = (self.spec.num_experts,) if self.layout.stacked else ()
        shape = part.shape(n, k)
        stored = shape[::-1] if self.layout.transposed else shape
        if _essential(entry.shape, lead) != _essential(lead + stored, lead):
            raise self._wrong(name, entry, f"config.json makes it {list(lead + stored)}")
        if self.layout.fused != "no" and not _has_seam(part, n, k):
            raise self._wrong(name, entry, "rows of gate and up share a scale; store them apart")

    def _check_alike(self, name: str, expert: int, parts: frozenset[str]) -> None:
        """Static activation scales are there for every matrix or for none."""
        self.optional = self.optional or parts
        if parts != self.optional:
            name = self.prefix + name.replace("{e}", str(expert))
            some = ", ".join(sorted(parts ^ self.optional))
            raise _Mismatch(
                f"{self.checkpoint.root}: {name!r}: only some experts have {some}", self.found
            )

    def _wrong(self, name: str, entry: TensorEntry, expected: str) -> _Mismatch:
        text = f"{entry.file.path}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; "
        return _Mismatch(text + expected, self.found)


BIAS = Part("bias", FLOATS, lambda n, k: (n,))


def _has_seam(part: Part, n: int, k: int) -> bool:
    """Whether a part of a fused matrix is one for both halves or falls into two."""
    whole, half = part.shape(n, k), part.shape(n // 2, k)
    return whole == half or whole[0] == 2 * half[0]


def _essential(shape: tuple[int, ...], lead: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones that checkpoints add or leave out behind the leading sizes."""
    rest = shape[len(lead) :]
    return shape[: len(lead)] + tuple(size for size in rest if size != 1)
