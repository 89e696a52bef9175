"""FlashInfer as the rows see it: the installed one by inspection, others from their records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources, util
from pathlib import Path
from typing import Any

from expertd.capability.device import installed_flashinfer
from expertd.capability.sources import Reader, Signature, read_source
from expertd.capability.versions import parse
from expertd.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Library:
    """One version: entry points by name, enums by name, and what its kernels are known to do."""

    version: str
    functions: Mapping[str, Signature] = field(hash=False)
    enums: Mapping[str, Mapping[str, int]] = field(hash=False)
    facts: frozenset[str]
    installed: bool = False

    def members(self, enum: str) -> Mapping[str, int]:
        return self.enums.get(enum, {})


@cache
def library(version: str | None) -> Library | None:
    """The FlashInfer of that version, None for none; the installed one is always inspected.

    Raises InvalidArgument for a version that is neither installed nor recorded.
    """
    if version is None:
        return None
    parse(version)
    if version == installed_flashinfer():
        return _installed(version)
    if version not in recorded_versions():
        known = ", ".join(recorded_versions())
        raise InvalidArgument(
            f"flashinfer {version} is neither installed nor recorded; recorded: {known}"
        )
    return recorded(version)


@cache
def recorded(version: str) -> Library:
    """The record of one of recorded_versions()."""
    text = (resources.files(__package__) / "recorded" / f"{version}.json").read_text()
    return _library(version, json.loads(text), installed=False)


@cache
def recorded_versions() -> tuple[str, ...]:
    """The versions that tools/record_flashinfer has read, oldest first."""
    names = (entry.name for entry in (resources.files(__package__) / "recorded").iterdir())
    versions = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return tuple(sorted(versions, key=parse))


def inspect(root: Path, version: str) -> Library:
    """The FlashInfer whose package folder is root."""
    return _library(version, read_source(reader_of(root)), installed=True)


def reader_of(root: Path) -> Reader:
    def read(path: str) -> str | None:
        file = root / path
        return file.read_text() if file.is_file() else None

    return read


def _installed(version: str) -> Library:
    spec = util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        return Library(version, {}, {}, frozenset(), installed=True)
    return inspect(Path(spec.submodule_search_locations[0]), version)


def _library(version: str, record: Mapping[str, Any], *, installed: bool) -> Library:
    functions = {
        name: Signature(tuple(sig["required"]), tuple(sig["optional"]))
        for name, sig in record["functions"].items()
    }
    return Library(version, functions, record["enums"], frozenset(record["facts"]), installed)
