"""The scalars of protobuf's wire format: read with bounds, written without surprises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VARINT, LEN = 0, 2

_MAX_VARINT, _MAX_VARINT32 = 10, 5
_MASK64 = (1 << 64) - 1
_ONE_BYTE = [bytes((value,)) for value in range(0x80)]


class Malformed(Exception):
    """Bytes that are no protobuf; whoever knows the field's name turns it into a WireError."""


def read_varint(view: memoryview, pos: int, end: int) -> tuple[int, int]:
    """The unsigned 64-bit varint at pos and the position after it; raises Malformed."""
    if pos < end and (first := view[pos]) < 0x80:
        return first, pos + 1
    if pos + 1 < end and (second := view[pos + 1]) < 0x80:
        return first & 0x7F | second << 7, pos + 2
    value = shift = 0
    for at in range(pos, min(end, pos + _MAX_VARINT)):
        byte = view[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK64, at + 1
        shift += 7
    if end - pos >= _MAX_VARINT:
        raise Malformed(f"an integer of more than {_MAX_VARINT} bytes")
    raise Malformed("an integer is cut short")


def read_varint32(view: memoryview, pos: int, end: int) -> tuple[int, int]:
    """A tag or a length: like read_varint, but of at most five bytes."""
    return read_varint(view, pos, min(end, pos + _MAX_VARINT32))


def _read_bytes(view: memoryview, pos: int, end: int) -> tuple[memoryview, int]:
    if pos < end and (size := view[pos]) < 0x80:  # nearly always: saves a call
        pos += 1
    else:
        size, pos = read_varint32(view, pos, end)
    stop = pos + size
    if stop > end:
        raise Malformed(f"{size} bytes announced, {end - pos} left")
    return view[pos:stop], stop


def _read_fixed64(view: memoryview, pos: int, end: int) -> tuple[None, int]:
    return None, _past(pos + 8, end)


def _read_fixed32(view: memoryview, pos: int, end: int) -> tuple[None, int]:
    return None, _past(pos + 4, end)


def _past(stop: int, end: int) -> int:
    if stop > end:
        raise Malformed("a fixed-width number is cut short")
    return stop


def _refuse(view: memoryview, pos: int, end: int) -> tuple[Any, int]:
    raise Malformed("protobuf groups and unknown wire types are not accepted")


READERS: tuple[Callable[[memoryview, int, int], tuple[Any, int]], ...] = (
    read_varint,
    _read_fixed64,
    _read_bytes,
    _refuse,
    _refuse,
    _read_fixed32,
    _refuse,
    _refuse,
)
"""By wire type, the lowest three bits of a tag: the value at pos and the position after it."""


def signed32(value: int) -> int:
    """The int32 that protobuf makes of a varint: its low 32 bits, two's complement."""
    return ((value & 0xFFFF_FFFF) ^ 0x8000_0000) - 0x8000_0000


def signed64(value: int) -> int:
    """The int64 of an unsigned 64-bit varint, two's complement."""
    return (value ^ (1 << 63)) - (1 << 63)


def varint(value: int) -> bytes:
    """The shortest varint of value; negatives take ten bytes, as protobuf has it."""
    if 0 <= value < 0x4000:  # nearly always: tags, lengths and sizes
        return _ONE_BYTE[value] if value < 0x80 else bytes((value & 0x7F | 0x80, value >> 7))
    value &= _MASK64
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
