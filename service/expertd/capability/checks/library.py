"""The kernel library and our own backend: whether what the row names is there, by name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import util
from pathlib import Path

from expertd.capability.checks.fault import Ask, Check, Fault
from expertd.capability.library import Library
from expertd.capability.row import KernelCall, Row
from expertd.capability.sources import Signature
from expertd.capability.versions import at_least

Faults = Iterator[Fault]

PACKAGE = Path(__file__).parents[2]


def backend(row: Row, ask: Ask) -> Faults:
    """A device that is not here is asked about by what the row declares."""
    if not ask.device.simulated and not _backend_exists(row.load):
        why = f"this tree has no {row.load.partition(':')[0]} yet"
        yield Fault("backend_absent", "backend", "absent", "present", why)


def library(row: Row, ask: Ask) -> Faults:
    if row.library == "flashinfer" and ask.library is None:
        why = "FlashInfer is not installed: pip install 'expertd[gpu]', or ask with --flashinfer"
        yield Fault("library_absent", "flashinfer", "none", _since(row.since), why)
    if row.library == "triton" and not ask.device.simulated and not _importable("triton"):
        why = "Triton is not installed: pip install 'expertd[gpu]'"
        yield Fault("library_absent", "triton", "none", "installed", why)


def version(row: Row, ask: Ask) -> Faults:
    if row.library == "flashinfer" and ask.library is not None:
        yield from too_old(ask.library, row.since, f"{row.entry} is right only from there on")


def names(row: Row, ask: Ask) -> Faults:
    """The function, the arguments that are always passed, and the enum members they take."""
    if row.call is None or ask.library is None:
        return
    signature = ask.library.functions.get(row.call.function)
    if signature is None:
        yield _missing("entry_missing", ask.library, f"function {row.call.function}")
        return
    yield from _unbound(row.call, signature, ask.library)
    for enum, member in row.call.members:
        yield from missing_member(ask.library, enum, member)


def activation(row: Row, ask: Ask) -> Faults:
    """What this layer's activation needs on top."""
    given = ask.spec.activation
    use = row.activations.get(given.kind)
    if row.call is None or ask.library is None or use is None:
        return
    why = f"{given.kind} has kernels only from there on"
    yield from too_old(ask.library, use.since, why)
    yield from missing_member(ask.library, "ActivationType", use.member)
    limit = use.limit if given.limit is not None else None
    signature = ask.library.functions.get(row.call.function)
    wanted = (*use.passes, *(limit or ()))
    if signature is not None:
        yield from _missing_arguments(ask.library, signature, wanted, row.call.function)


def repeats(row: Row, ask: Ask) -> Faults:
    """Where the operator wants it: the argument is there that keeps sums in their order."""
    if not (ask.repeatable and row.repeats_with and row.call and ask.library):
        return
    signature = ask.library.functions.get(row.call.function)
    if signature is not None and row.repeats_with not in signature.names:
        why = f"without {row.repeats_with} the same call may give other bits each time"
        yield Fault("not_deterministic", "deterministic", "true", "false", why)


def too_old(found: Library, since: str | None, why: str) -> Faults:
    if not at_least(found.version, since):
        yield Fault("version", "flashinfer", found.version, _since(since), why)


def missing_member(found: Library, enum: str, member: str) -> Faults:
    if member not in found.members(enum):
        yield _missing("enum_missing", found, f"{enum}.{member}")


def _unbound(call: KernelCall, signature: Signature, found: Library) -> Faults:
    yield from _missing_arguments(found, signature, call.passes, call.function)
    for name in sorted(set(signature.required) - {*call.passes, *call.prefers}):
        why = f"{call.function} of this version wants {name}, which expertd does not pass"
        yield Fault("argument_required", "flashinfer", found.version, "another version", why)


def _missing_arguments(
    found: Library, signature: Signature, wanted: tuple[str, ...], function: str
) -> Faults:
    for name in wanted:
        if name not in signature.names:
            yield _missing("argument_missing", found, f"argument {name} of {function}")


def _missing(code: str, found: Library, what: str) -> Fault:
    why = f"this FlashInfer has no {what}"
    return Fault(code, "flashinfer", found.version, f"a version with {what}", why)


def _since(version: str | None) -> str:
    return f">= {version}" if version else "installed"


@cache
def _importable(package: str) -> bool:
    return util.find_spec(package) is not None


@cache
def _backend_exists(load: str) -> bool:
    """Whether the module holds the class; found in its text, because importing it needs torch."""
    module, _, name = load.partition(":")
    file = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    lines = file.read_text().splitlines() if file.is_file() else []
    return any(line.startswith((f"class {name}(", f"class {name}:")) for line in lines)


CHECKS: tuple[Check, ...] = (backend, library, version, names, repeats)
