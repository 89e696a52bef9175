"""The safetensors reader and writer against the safetensors library, and against liars."""

from __future__ import annotations

import json
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors import torch as library
from tests.wire.strategies import tensors

from expertd_wire.safetensors import (
    BITS,
    WIRE_DTYPES,
    Entry,
    decode_body,
    encode_body,
    header_end,
    parse_header,
)
from expertd_wire.tensors import DTYPES, WireError, WireTensor, to_numpy

NAMES = st.text(max_size=8).filter(lambda name: name != "__metadata__")
BODIES = st.dictionaries(NAMES, tensors(), max_size=5)
METADATA = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


@given(BODIES, METADATA)
def test_the_library_reads_what_we_write(
    body: dict[str, WireTensor], metadata: dict[str, str]
) -> None:
    data = encode_body(body, metadata)
    found = {name: row for name, row in deserialize(data)}
    assert found.keys() == body.keys()
    for name, tensor in body.items():
        assert WIRE_DTYPES[found[name]["dtype"]] == tensor.dtype
        assert tuple(found[name]["shape"]) == tensor.shape
        assert bytes(found[name]["data"]) == bytes(tensor.data)
    assert decode_body(data) == (body, metadata)


@given(BODIES, METADATA.filter(bool))
def test_we_read_what_the_library_writes(
    body: dict[str, WireTensor], metadata: dict[str, str]
) -> None:
    data = library.save({name: _to_torch(tensor) for name, tensor in body.items()}, metadata)
    assert decode_body(data) == (body, metadata)


def test_tensors_are_aligned_and_views_of_the_body() -> None:
    data = encode_body({"a": _rows("uint8", 3), "b": _rows("float32", 2)}, {})
    found, _ = decode_body(data)
    assert found["b"].data.obj is data
    header = parse_header(data, len(data))
    assert header.tensors["b"] == Entry("F32", (2,), header.data_begin, header.data_begin + 8)
    assert header.data_begin % 8 == 0


def test_a_header_is_read_without_the_tensors() -> None:
    data = encode_body({"a": _rows("bfloat16", 5)}, {"k": "v"})
    end = header_end(data[:8], len(data))
    assert parse_header(data[:end], len(data)) == parse_header(data, len(data))
    with pytest.raises(WireError, match="of a header"):
        parse_header(data[: end - 1], len(data))


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_of_the_library_has_its_size(dtype: str) -> None:
    size = BITS[dtype]
    head = {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}
    assert parse_header(_file(head, size), len(_file(head, size))).tensors["a"].dtype == dtype
    assert deserialize(_file(head, size))
    with pytest.raises(SafetensorError):
        deserialize(_file(head, size + 1))


def _row(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


LIARS: dict[str, tuple[Any, int]] = {
    "hole at the start": ({"a": _row(offsets=(1, 5))}, 5),
    "hole between": ({"a": _row(), "b": _row(offsets=(5, 9))}, 9),
    "overlap": ({"a": _row(), "b": _row(offsets=(3, 7))}, 7),
    "same bytes twice": ({"a": _row(), "b": _row()}, 4),
    "bytes that no tensor claims": ({"a": _row()}, 5),
    "fewer bytes than claimed": ({"a": _row()}, 3),
    "end before begin": ({"a": _row(shape=(0,), offsets=(4, 0))}, 4),
    "size and offsets differ": ({"a": _row(shape=(5,))}, 4),
    "negative sizes": ({"a": _row(shape=(-2, -2))}, 4),
    "negative offsets": ({"a": _row(offsets=(-4, 0))}, 4),
    "a product that would wrap": ({"a": _row(shape=(2**62, 4, 4), offsets=(0, 0))}, 0),
    "a size beyond 64 bits": ({"a": _row(shape=(2**64, 0), offsets=(0, 0))}, 0),
    "half a byte": ({"a": _row("F4", (7,))}, 4),
    "a bool for a size": ({"a": _row(shape=(True, 4))}, 4),
    "a float for a size": ({"a": _row(shape=(4.0,))}, 4),
    "a float for an offset": ({"a": _row(offsets=(0, 4.0))}, 4),
    "three offsets": ({"a": _row(offsets=(0, 4, 4))}, 4),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4),
    "more keys": ({"a": _row(strides=[1])}, 4),
    "an unknown dtype": ({"a": _row("F128")}, 4),
    "a list for a dtype": ({"a": _row(["U8"])}, 4),
    "a tensor that is a list": ({"a": [1]}, 4),
    "too many dimensions": ({"a": _row(shape=(1,) * 8 + (4,))}, 4),
    "metadata that is no object": ({"__metadata__": ["x"], "a": _row()}, 4),
    "metadata of numbers": ({"__metadata__": {"k": 1}, "a": _row()}, 4),
}


@pytest.mark.parametrize("liar", LIARS)
def test_liars_are_refused(liar: str) -> None:
    head, size = LIARS[liar]
    with pytest.raises(WireError, match="safetensors"):
        decode_body(_file(head, size))


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (b'{"a":1,"a":1}', "'a' twice"),
        (b'{"__metadata__":{"k":"v","k":"v"}}', "'k' twice"),
        (b' {"a":1}', "does not start"),
        (b"[]", "does not start"),
        (b"", "does not start"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b'{"a":' + b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"\xff":1}', "not JSON"),
        (b'{"\\ud800":1}', "not Unicode"),
        (b'{"__metadata__":{"k":"\\udc00"}}', "not Unicode"),
        (b'{"a":1}}', "not JSON"),
    ],
)
def test_headers_that_are_not_strict_json_are_refused(head: bytes, text: str) -> None:
    with pytest.raises(WireError) as refusal:
        decode_body(struct.pack("<Q", len(head)) + head)
    assert text in str(refusal.value)
    str(refusal.value).encode()


@pytest.mark.parametrize("size", [0, 7, 8, 12])
def test_bodies_too_short_for_their_header_are_refused(size: int) -> None:
    with pytest.raises(WireError, match="bytes"):
        decode_body((struct.pack("<Q", 50) + b"{}  ")[:size])


def test_the_header_has_a_limit() -> None:
    assert header_end(struct.pack("<Q", 100), 2**40, limit=100) == 108
    with pytest.raises(WireError, match="101 bytes given, at most 100 accepted"):
        header_end(struct.pack("<Q", 101), 2**40, limit=100)
    with pytest.raises(WireError, match="at most"):
        decode_body(struct.pack("<Q", 2**63) + b"{}")


def test_a_dtype_that_does_not_travel_is_refused_in_bodies_only() -> None:
    data = _file({"a": _row("F64", (2,), (0, 16))}, 16)
    assert parse_header(data, len(data)).tensors["a"].dtype == "F64"
    with pytest.raises(WireError, match="'a': dtype F64 is not one of F32"):
        decode_body(data)


@given(st.binary(max_size=60), st.binary(max_size=10))
def test_random_headers_raise_nothing_but_wire_error(head: bytes, rest: bytes) -> None:
    assert_refused_or_sound(struct.pack("<Q", len(head)) + head + rest)
    assert_refused_or_sound(head)


@given(BODIES, st.data())
def test_what_we_accept_of_a_mutated_file_the_library_accepts(
    body: dict[str, WireTensor], data: st.DataObject
) -> None:
    mutated = bytearray(encode_body(body, {}))
    for at in data.draw(st.lists(st.integers(0, len(mutated) - 1), min_size=1, max_size=3)):
        mutated[at] = data.draw(st.integers(0x20, 0x7E) | st.integers(0, 255))
    assert_refused_or_sound(bytes(mutated))


def test_metadata_and_float_bits_survive() -> None:
    rows = np.arange(4, dtype=ml_dtypes.bfloat16)
    data = library.save({"rows": torch.arange(4, dtype=torch.bfloat16)}, {"plan": "a"})
    found, metadata = decode_body(data)
    assert metadata == {"plan": "a"}
    np.testing.assert_array_equal(to_numpy(found["rows"]), rows)


def assert_refused_or_sound(data: bytes) -> None:
    """Refused with a WireError and nothing else, or read by the library too, to the same names."""
    try:
        found, _ = decode_body(data)
    except WireError:
        return
    assert found.keys() == {name for name, _ in deserialize(data)}


def _file(head: Any, size: int) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def _rows(dtype: str, count: int) -> WireTensor:
    return WireTensor(dtype, (count,), memoryview(bytes(count * DTYPES[dtype].itemsize)))


def _to_torch(tensor: WireTensor) -> torch.Tensor:
    made = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    made.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(tensor.data, np.uint8)
    return made
