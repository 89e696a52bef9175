"""Bytes to ForwardCall and ForwardReply and back: ordinary protobuf that never copies a tensor.

One table per message says number, name and kind of each field; one loop walks the bytes. Tensor
bytes stay views of the input, an encoded message is joined once. As protobuf has it: unknown fields
are skipped, the last scalar wins, repeated occurrences of a submessage merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import MAX_RANK, WireError, WireTensor, checked_tensor
from expertd_wire.varints import (
    LEN,
    READERS,
    VARINT,
    Malformed,
    read_varint,
    read_varint32,
    signed32,
    signed64,
    varint,
)

# A stranger's message may be 256 MiB of tiny fields; ours have a dozen.
MAX_FIELDS = 256

Values = dict[str, Any]
Part = bytes | memoryview


Write = Callable[[list[Part], bytes, str, Any], None]


class Kind(NamedTuple):
    """How a field's value enters the values of a message, per wire type, and how it is written."""

    put: dict[int, Callable[[Values, str, Any], None]]
    wire: int
    write: Write


def decode_forward_call(data: bytes) -> ForwardCall:
    """A ForwardRequest whose tensors view data; raises WireError naming the field that is wrong."""
    return ForwardCall(**_decode(data, _CALL))


def decode_forward_reply(data: bytes) -> ForwardReply:
    """A ForwardReply whose output views data; raises WireError naming the field that is wrong."""
    return ForwardReply(**_decode(data, _REPLY))


def encode_forward_call(call: ForwardCall) -> bytes:
    """The bytes of a ForwardRequest; raises WireError for a value that cannot travel."""
    return _encode(call, _CALL_WRITERS)


def encode_forward_reply(reply: ForwardReply) -> bytes:
    """The bytes of a ForwardReply; raises WireError for a value that cannot travel."""
    return _encode(reply, _REPLY_WRITERS)


def _decode(data: bytes, fields: Fields) -> Values:
    values: Values = {}
    _walk(memoryview(data), fields, values, "")
    for name, value in values.items():
        if type(value) is dict:
            values[name] = _tensor(name, **value)
    return values


def _tensor(
    name: str, dtype: str = "", shape: Iterable[int] = (), data: memoryview | bytes = b""
) -> WireTensor:
    return checked_tensor(name, dtype, tuple(shape), memoryview(data))


def _walk(view: memoryview, fields: Fields, values: Values, where: str) -> None:
    """Put every field of view into values; where is the path of the enclosing field."""
    pos, end = 0, len(view)
    name = "field tag"
    try:
        for _ in range(MAX_FIELDS + 1):
            if pos == end:
                return
            tag = view[pos]
            pos += 1
            if tag >= 0x80:
                tag, pos = read_varint32(view, pos - 1, end)
            name, put = fields.get(tag) or _unknown(tag)
            value, pos = READERS[tag & 7](view, pos, end)
            put(values, name, value)
            name = "field tag"
        raise Malformed(f"more than {MAX_FIELDS} fields in one message")
    except Malformed as problem:
        raise WireError(f"{where}{name}: {problem}") from None


def _unknown(tag: int) -> tuple[str, Callable[[Values, str, Any], None]]:
    number = tag >> 3
    if not 0 < number < 1 << 29:
        raise Malformed(f"{number} is not a field number")
    return f"field {number}", _skip


def _skip(values: Values, name: str, value: Any) -> None:
    """An unknown field has been read; protobuf wants it forgotten."""


def _put_text(values: Values, name: str, value: memoryview) -> None:
    try:
        values[name] = str(value, "utf-8")
    except UnicodeDecodeError as problem:
        raise Malformed(f"not UTF-8 at byte {problem.start}") from None


def _put_int32(values: Values, name: str, value: int) -> None:
    values[name] = signed32(value)


def _put_int64(values: Values, name: str, value: int) -> None:
    values[name] = signed64(value)


def _put_bool(values: Values, name: str, value: int) -> None:
    values[name] = value != 0


def _put_bytes(values: Values, name: str, value: memoryview) -> None:
    values[name] = value


def _put_message(values: Values, name: str, value: memoryview) -> None:
    # Serialised messages merge by concatenation.
    values[name] = values.get(name, b"") + value


def _put_tensor(values: Values, name: str, value: memoryview) -> None:
    _walk(value, _TENSOR, values.setdefault(name, {}), f"{name}.")


def _put_one(values: Values, name: str, value: int) -> None:
    items = values.setdefault(name, [])
    if len(items) == MAX_RANK:
        raise Malformed(f"more than {MAX_RANK} sizes")
    items.append(signed64(value))


def _put_packed(values: Values, name: str, value: memoryview) -> None:
    pos, end = 0, len(value)
    while pos < end:
        item, pos = read_varint(value, pos, end)
        _put_one(values, name, item)


def _encode(message: ForwardCall | ForwardReply, writers: Writers) -> bytes:
    parts: list[Part] = []
    for key, name, write in writers:
        value = getattr(message, name)
        if value:
            write(parts, key, name, value)
    return b"".join(parts)


def _write_text(parts: list[Part], key: bytes, name: str, value: str) -> None:
    try:
        _write_bytes(parts, key, name, value.encode())
    except UnicodeEncodeError:
        raise WireError(f"{name}: {value!r:.60} is not text that UTF-8 can carry") from None


def _write_bytes(parts: list[Part], key: bytes, name: str, value: Part) -> None:
    parts += (key, varint(len(value)), value)


def _write_int32(parts: list[Part], key: bytes, name: str, value: int) -> None:
    _write_int(parts, key, name, value, 32)


def _write_int64(parts: list[Part], key: bytes, name: str, value: int) -> None:
    _write_int(parts, key, name, value, 64)


def _write_int(parts: list[Part], key: bytes, name: str, value: int, bits: int) -> None:
    limit = 1 << (bits - 1)
    if not -limit <= value < limit:
        raise WireError(f"{name}: {value!r:.60} does not fit into int{bits}")
    parts += (key, varint(value))


def _write_packed(parts: list[Part], key: bytes, name: str, value: tuple[int, ...]) -> None:
    _write_bytes(parts, key, name, b"".join(map(varint, value)))


def _write_tensor(parts: list[Part], key: bytes, name: str, value: WireTensor) -> None:
    inner: list[Part] = []
    for inner_key, inner_name, write in _TENSOR_WRITERS:
        write(inner, inner_key, inner_name, getattr(value, inner_name))
    parts += (key, varint(sum(map(len, inner))), *inner)


TEXT = Kind({LEN: _put_text}, LEN, _write_text)
INT32 = Kind({VARINT: _put_int32}, VARINT, _write_int32)
INT64 = Kind({VARINT: _put_int64}, VARINT, _write_int64)
BOOL = Kind({VARINT: _put_bool}, VARINT, _write_int32)
BYTES = Kind({LEN: _put_bytes}, LEN, _write_bytes)
MESSAGE = Kind({LEN: _put_message}, LEN, _write_bytes)
TENSOR = Kind({LEN: _put_tensor}, LEN, _write_tensor)
INT64S = Kind({LEN: _put_packed, VARINT: _put_one}, LEN, _write_packed)

Rows = tuple[tuple[int, str, Kind], ...]
Writers = tuple[tuple[bytes, str, Write], ...]
Fields = dict[int, tuple[str, Callable[[Values, str, Any], None]]]

_TENSOR_ROWS: Rows = (
    (1, "dtype", TEXT),
    (2, "shape", INT64S),
    (3, "data", BYTES),
)

_CALL_ROWS: Rows = (
    (1, "model", TEXT),
    (2, "layer", INT32),
    (3, "hidden_states", TENSOR),
    (4, "router_logits", TENSOR),
    (5, "topk_ids", TENSOR),
    (6, "topk_weights", TENSOR),
    (7, "hidden_states_format", TEXT),
    (8, "hidden_states_scale", TENSOR),
    (9, "partial", BOOL),
    (10, "backend", TEXT),
    (11, "reply_dtype", TEXT),
    (12, "request_id", TEXT),
    (13, "priority", INT32),
)

_REPLY_ROWS: Rows = (
    (1, "output", TENSOR),
    (2, "backend", TEXT),
    (3, "mode", TEXT),
    (4, "entry", TEXT),
    (5, "queued_ns", INT64),
    (6, "staged_ns", INT64),
    (7, "computed_ns", INT64),
    (8, "request_id", TEXT),
    (9, "status", MESSAGE),
    (10, "generation", INT32),
    (11, "weights_digest", TEXT),
)


def _by_tag(rows: Rows) -> Fields:
    """A known number with another wire type has no entry: it is skipped like an unknown field."""
    return {
        number << 3 | wire: (name, put)
        for number, name, kind in rows
        for wire, put in kind.put.items()
    }


def _writers(rows: Rows) -> Writers:
    """Each row with its key, the varint of its number and wire type."""
    return tuple((varint(number << 3 | kind.wire), name, kind.write) for number, name, kind in rows)


_TENSOR_WRITERS = _writers(_TENSOR_ROWS)
_CALL_WRITERS = _writers(_CALL_ROWS)
_REPLY_WRITERS = _writers(_REPLY_ROWS)

_TENSOR = _by_tag(_TENSOR_ROWS)
_CALL = _by_tag(_CALL_ROWS)
_REPLY = _by_tag(_REPLY_ROWS)
