"""How FlashInfer differs from what was recorded; looked at when the process starts, on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from expertd.capability.library import Library, library, recorded, recorded_versions
from expertd.capability.row import Row
from expertd.capability.rows import ROWS
from expertd.capability.versions import parse


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference. Nothing moves an answer: names are used, and what lacks them is refused."""

    kind: str
    name: str
    text: str


def drift(version: str | None, rows: tuple[Row, ...] = ROWS) -> tuple[Drift, ...]:
    """Every difference of this version's enums and entry points from the record nearest to it."""
    found = library(version)
    if found is None:
        return ()
    return tuple(differences(found, baseline(found.version), rows))


def baseline(version: str) -> Library:
    """The record of this very version, or else the newest one before it, or the oldest."""
    known = [name for name in recorded_versions() if parse(name) <= parse(version)]
    return recorded(known[-1] if known else recorded_versions()[0])


def differences(found: Library, known: Library, rows: tuple[Row, ...]) -> Iterator[Drift]:
    yield from _enums(found, known)
    functions = dict.fromkeys(row.call.function for row in rows if row.call is not None)
    for function in functions:
        yield from _arguments(function, found, known)


def _enums(found: Library, known: Library) -> Iterator[Drift]:
    for enum, members in known.enums.items():
        here = found.members(enum)
        for member, value in members.items():
            name = f"{enum}.{member}"
            if member not in here:
                text = f"{name} of {known.version} is gone in {found.version}"
                yield Drift("enum_missing", name, text)
            elif here[member] != value:
                text = f"{name} is {here[member]} in {found.version}, {value} in {known.version}"
                yield Drift("integer_moved", name, text)


def _arguments(function: str, found: Library, known: Library) -> Iterator[Drift]:
    before, now = known.functions.get(function), found.functions.get(function)
    if before is None:
        return
    if now is None:
        text = f"{function} of {known.version} is gone in {found.version}"
        yield Drift("entry_missing", function, text)
        return
    for name in sorted(before.names - now.names):
        text = f"{function} of {found.version} has no argument {name}, {known.version} has"
        yield Drift("argument_missing", f"{function}.{name}", text)
    for name in sorted(set(now.required) - before.names):
        text = f"{function} of {found.version} wants a new argument {name}"
        yield Drift("argument_required", f"{function}.{name}", text)
