"""The codec against google.protobuf, in both directions."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.strategies import (
    CALLS,
    REPLIES,
    TENSOR_BYTES,
    from_pb,
    protobuf,
    split_tensors,
    to_pb,
    varints,
)

from expertd_wire import codec
from expertd_wire.codec import (
    MAX_FIELDS,
    decode_forward_call,
    decode_forward_reply,
    encode_forward_call,
    encode_forward_reply,
)
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import WireError, WireTensor, from_numpy
from expertd_wire.v1 import experts_pb2 as pb

VALID = encode_forward_call(
    ForwardCall(
        model="demo",
        layer=3,
        hidden_states=from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3)),
        topk_ids=from_numpy(np.arange(4, dtype=np.int32).reshape(2, 2)),
        request_id="r",
        priority=-1,
    )
)


@given(CALLS)
def test_what_protobuf_writes_of_a_call_reads_the_same(call: ForwardCall) -> None:
    assert decode_forward_call(to_pb(call).SerializeToString()) == call


@given(CALLS)
def test_what_we_write_of_a_call_is_what_protobuf_reads(call: ForwardCall) -> None:
    assert pb.ForwardRequest.FromString(encode_forward_call(call)) == to_pb(call)


@given(REPLIES)
def test_what_protobuf_writes_of_a_reply_reads_the_same(reply: ForwardReply) -> None:
    assert decode_forward_reply(to_pb(reply).SerializeToString()) == reply


@given(REPLIES, st.builds(status_pb2.Status, code=st.integers(0, 16), message=st.text(max_size=9)))
def test_what_we_write_of_a_reply_is_what_protobuf_reads(
    reply: ForwardReply, status: status_pb2.Status
) -> None:
    fields = reply._asdict()
    reply = ForwardReply(**fields | {"status": status.SerializeToString()})
    assert pb.ForwardReply.FromString(encode_forward_reply(reply)) == to_pb(reply)
    assert decode_forward_reply(encode_forward_reply(reply)) == reply


@given(protobuf(TENSOR_BYTES | st.binary(max_size=4), 13))
def test_any_protobuf_is_read_or_refused_as_protobuf_does(data: bytes) -> None:
    assert _outcome(decode_forward_call, data) == _outcome(_by_protobuf, data)


@given(protobuf(TENSOR_BYTES | st.binary(max_size=4), 9), st.integers(0, 200))
def test_cut_protobuf_is_refused_as_protobuf_does(data: bytes, cut: int) -> None:
    assert _outcome(decode_forward_call, data[:cut]) == _outcome(_by_protobuf, data[:cut])


@given(split_tensors().flatmap(st.permutations), st.data())
def test_occurrences_of_a_tensor_merge(fields: list[bytes], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(fields)))
    halves = (b"".join(fields[:cut]), b"".join(fields[cut:]))
    message = b"".join(b"\x1a" + _length(half) + half for half in halves)
    # Sizes may have come out in another order: then neither side can make sense of the tensor.
    assert _outcome(decode_forward_call, message) == _outcome(_by_protobuf, message)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_wire_error(data: bytes) -> None:
    assert_reads_or_refuses(decode_forward_call, data, ForwardCall)
    assert_reads_or_refuses(decode_forward_reply, data, ForwardReply)


@given(st.data())
def test_mutated_bytes_raise_nothing_but_wire_error(data: st.DataObject) -> None:
    mutated = bytearray(VALID)
    for at in data.draw(st.lists(st.integers(0, len(VALID) - 1), max_size=6)):
        mutated[at] = data.draw(st.integers(0, 255))
    assert_reads_or_refuses(decode_forward_call, bytes(mutated), ForwardCall)


def test_tensors_are_views_of_the_message() -> None:
    data = encode_forward_call(ForwardCall(hidden_states=from_numpy(np.zeros(4, np.float32))))
    tensor = decode_forward_call(data).hidden_states
    assert tensor is not None
    assert tensor.data.obj is data


def test_bytearrays_and_views_are_read_like_bytes() -> None:
    for kind in (bytearray, memoryview):
        assert decode_forward_call(kind(VALID)) == decode_forward_call(VALID)


def test_encoding_never_copies_a_tensor_before_the_join() -> None:
    view = memoryview(bytes(64))
    parts: list[bytes | memoryview] = []
    codec.TENSOR.write(parts, 3, "hidden_states", WireTensor("uint8", (64,), view))
    assert any(part is view for part in parts)


@pytest.mark.parametrize("cut", range(1, len(VALID)))
def test_every_prefix_is_refused_or_is_a_shorter_message(cut: int) -> None:
    assert _outcome(decode_forward_call, VALID[:cut]) == _outcome(_by_protobuf, VALID[:cut])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x0a\x05ab", "model: 5 bytes announced, 2 left"),
        (b"\x0a\x02\xff\xfe", "model: not UTF-8"),
        (b"\x10\x80", "layer: an integer is cut short"),
        (b"\x10" + b"\x80" * 10 + b"\x01", "layer: an integer of more than 10 bytes"),
        (b"\x1a\x04\x1a\x09ab", "hidden_states.data: 9 bytes announced, 2 left"),
        (b"\x1a\x04\x0a\x02\xff\xfe", "hidden_states.dtype: not UTF-8"),
        (b"\x1a\x07\x12\x05\x01\x01\x01\x01\x01", "hidden_states.shape: more than 4 sizes"),
        (b"\x1a\x03\x0a\x01x", "hidden_states: dtype 'x'"),
        (b"\x1a\x09\x0a\x05uint8\x10\x05", "hidden_states: 0 bytes given, but uint8 [5] takes 5"),
        (b"\x1a\x12\x0a\x05uint8\x10" + b"\xff" * 9 + b"\x01", "negative size"),
        (b"\x0b\x0c", "field 1: protobuf groups"),
        (b"\x0e", "field 1: protobuf groups and unknown wire types"),
        (b"\x00\x01", "0 is not a field number"),
        (b"\x9d\x06\x01", "field 99: a fixed-width number is cut short"),
        (b"\xb0", "field tag: an integer is cut short"),
    ],
)
def test_refusals_name_the_field(data: bytes, text: str) -> None:
    with pytest.raises(WireError) as refusal:
        decode_forward_call(data)
    assert text in str(refusal.value)


def test_a_flood_of_tiny_fields_is_refused() -> None:
    unknown = b"\xa0\x06\x01"
    assert decode_forward_call(VALID[:0] + unknown * MAX_FIELDS) == ForwardCall()
    with pytest.raises(WireError, match=f"more than {MAX_FIELDS} fields"):
        decode_forward_call(unknown * (MAX_FIELDS + 1))


@pytest.mark.parametrize(
    "call",
    [
        ForwardCall(layer=2**31),
        ForwardCall(priority=-(2**31) - 1),
        ForwardCall(model="\ud800"),
    ],
)
def test_values_that_cannot_travel_are_refused(call: ForwardCall) -> None:
    with pytest.raises(WireError):
        encode_forward_call(call)


@pytest.mark.parametrize("last", [0, 1, 2, 0x7F])
@pytest.mark.parametrize("field", [b"\x28", b"\x0a", b"\x12"], ids=["int64", "tensor", "text"])
def test_integers_of_more_than_64_bits_end_as_in_protobuf(field: bytes, last: int) -> None:
    data = field + b"\x80" * 9 + bytes((last,))
    assert _outcome(decode_forward_reply, data) == _outcome(_reply_by_protobuf, data)


@given(protobuf(TENSOR_BYTES | st.binary(max_size=4), 9))
def test_any_reply_is_read_or_refused_as_protobuf_does(data: bytes) -> None:
    reply = _outcome(decode_forward_reply, data)
    expected = _outcome(_reply_by_protobuf, data)
    if isinstance(reply, ForwardReply) and reply.status:
        # The status stays bytes here: whoever opens it finds out whether they are a status.
        reply = _outcome(_with_checked_status, data)
    assert reply == expected


def test_occurrences_of_a_status_merge() -> None:
    halves = (status_pb2.Status(code=5), status_pb2.Status(message="gone"))
    data = b"".join(encode_forward_reply(ForwardReply(status=_bytes(half))) for half in halves)
    merged = status_pb2.Status.FromString(decode_forward_reply(data).status)
    assert merged == status_pb2.Status(code=5, message="gone")


@given(varints(st.integers(-(2**63), 2**63 - 1)))
def test_integers_wrap_as_protobuf_has_it(number: bytes) -> None:
    data = b"\x10" + number + b"\x48" + number
    assert decode_forward_call(data) == _by_protobuf(data)


def _by_protobuf(data: bytes) -> ForwardCall | ForwardReply:
    try:
        return from_pb(pb.ForwardRequest.FromString(data))
    except DecodeError as problem:
        raise WireError(str(problem)) from problem


def _reply_by_protobuf(data: bytes) -> ForwardCall | ForwardReply:
    try:
        return from_pb(pb.ForwardReply.FromString(data))
    except DecodeError as problem:
        raise WireError(str(problem)) from problem


def _with_checked_status(data: bytes) -> ForwardReply:
    reply = decode_forward_reply(data)
    try:
        status = status_pb2.Status.FromString(reply.status)
    except DecodeError as problem:
        raise WireError(str(problem)) from problem
    return reply._replace(status=_bytes(status))


def _bytes(message: Message) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _outcome(decode: object, data: bytes) -> object:
    try:
        return decode(data)  # type: ignore[operator]
    except WireError:
        return "refused"


def assert_reads_or_refuses(decode: object, data: bytes, kind: type) -> None:
    outcome = _outcome(decode, data)
    assert outcome == "refused" or type(outcome) is kind


def _length(data: bytes) -> bytes:
    return bytes((len(data) & 0x7F | 0x80, len(data) >> 7))
