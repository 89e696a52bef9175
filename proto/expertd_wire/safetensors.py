"""The safetensors layout, read strictly: HTTP bodies here, headers of weight files elsewhere.

A file is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without
holes. Nothing in it is trusted: every number is checked before it is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

from expertd_wire.tensors import DTYPES, WireError, WireTensor, checked_tensor

LENGTH_BYTES = 8
MAX_BODY_HEADER = 1 << 20
MAX_FILE_HEADER = 100 << 20
_MAX_FILE_RANK = 8

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Every dtype of the format and the bits of one element."""

WIRE_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
}
"""The dtypes that may travel, by the format's name."""

_FILE_DTYPES = {wire: name for name, wire in WIRE_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: dtype as the format spells it; [begin, end) counts from byte 0."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds; data_begin is where the tensors' bytes start."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_begin: int


def header_end(prefix: bytes | memoryview, total: int, limit: int = MAX_FILE_HEADER) -> int:
    """Where the header of a file of total bytes ends, from its first 8 bytes; raises WireError."""
    if total < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise WireError(f"safetensors: {total} bytes given, the header's length alone takes 8")
    (size,) = struct.unpack_from("<Q", prefix)
    if size > limit:
        raise WireError(f"safetensors: a header of {size} bytes given, at most {limit} accepted")
    if LENGTH_BYTES + size > total:
        raise WireError(f"safetensors: a header of {size} bytes does not fit in {total} bytes")
    return LENGTH_BYTES + int(size)


def parse_header(head: bytes | memoryview, total: int, limit: int = MAX_FILE_HEADER) -> Header:
    """The header of a file of total bytes; head starts at byte 0 and holds at least all of it.

    Raises WireError for anything but a complete, exact description of every byte of the file.
    """
    data_begin = header_end(head, total, limit)
    if len(head) < data_begin:
        raise WireError(f"safetensors: {len(head)} bytes of a header of {data_begin} given")
    table = _parse_json(bytes(head[LENGTH_BYTES:data_begin]))
    metadata = _metadata(table.pop("__metadata__", {}))
    tensors = {name: _entry(name, row, data_begin) for name, row in table.items()}
    _check_exact(tensors, data_begin, total)
    return Header(tensors, metadata, data_begin)


def decode_body(data: bytes | memoryview) -> tuple[dict[str, WireTensor], dict[str, str]]:
    """The tensors of a body as views of it, and its metadata; raises WireError."""
    view = memoryview(data)
    header = parse_header(view, len(view), MAX_BODY_HEADER)
    tensors = {name: _wire_tensor(name, entry, view) for name, entry in header.tensors.items()}
    return tensors, header.metadata


def encode_body(tensors: Mapping[str, WireTensor], metadata: Mapping[str, str]) -> bytes:
    """A file of tensors and metadata, widest dtype first so that every tensor is aligned."""
    rows = sorted(tensors.items(), key=lambda row: (-DTYPES[row[1].dtype].itemsize, row[0]))
    ends = list(accumulate(tensor.nbytes for _, tensor in rows))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for (name, tensor), end in zip(rows, ends, strict=True):
        table[name] = {
            "dtype": _FILE_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end - tensor.nbytes, end],
        }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    length = struct.pack("<Q", len(header))
    return b"".join((length, header, *(tensor.data for _, tensor in rows)))


def _wire_tensor(name: str, entry: Entry, view: memoryview) -> WireTensor:
    dtype = WIRE_DTYPES.get(entry.dtype)
    if dtype is None:
        accepted = ", ".join(WIRE_DTYPES)
        raise WireError(f"{name!r:.60}: dtype {entry.dtype} is not one of {accepted}")
    return checked_tensor(f"{name!r:.60}", dtype, entry.shape, view[entry.begin : entry.end])


def _parse_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise WireError("safetensors: the header does not start with '{'")
    try:
        table: dict[str, Any] = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except WireError:
        raise
    except (ValueError, RecursionError) as problem:
        raise WireError(f"safetensors: the header is not JSON: {problem!s:.100}") from None
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if _text(key) in table:
            raise WireError(f"safetensors: the header has {key!r:.60} twice")
        table[key] = value
    return table


def _refuse_constant(name: str) -> None:
    raise WireError(f"safetensors: {name} in the header is not JSON")


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise WireError(f"safetensors: {value!r:.60} in the header is not Unicode text") from None
    return value


def _metadata(value: Any) -> dict[str, str]:
    if type(value) is not dict or any(type(text) is not str for text in value.values()):
        raise WireError("safetensors: __metadata__ is not an object of strings")
    return {key: _text(text) for key, text in value.items()}


def _entry(name: str, row: Any, data_begin: int) -> Entry:
    if type(row) is not dict or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise _wrong(name, "takes exactly dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if type(dtype) is not str or dtype not in BITS:
        raise _wrong(name, f"dtype {dtype!r:.40} is not one of {', '.join(BITS)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _wrong(name, "shape and data_offsets take integers, data_offsets two of them")
    begin, end = offsets
    bits = prod(shape) * BITS[dtype]
    if bits != (end - begin) * 8:
        raise _wrong(name, f"{dtype} {shape} takes {bits} bits, {end - begin} bytes given")
    return Entry(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _sizes(value: Any) -> bool:
    """Whether value is a short list of whole numbers that a length can be (True is not 1 here)."""
    return (
        type(value) is list
        and len(value) <= _MAX_FILE_RANK
        and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
    )


def _check_exact(tensors: Mapping[str, Entry], data_begin: int, total: int) -> None:
    """Refuses overlaps, holes and bytes that no tensor claims."""
    position = data_begin
    for name, entry in sorted(tensors.items(), key=lambda row: (row[1].begin, row[1].end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "follows a hole"
            raise _wrong(name, f"begins at {entry.begin - data_begin} and {what}")
        position = entry.end
    if position != total:
        raise WireError(
            f"safetensors: the header describes {position} bytes, {total} bytes are given"
        )


def _wrong(name: str, text: str) -> WireError:
    return WireError(f"safetensors: {name!r:.60}: {text}")
