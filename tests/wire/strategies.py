"""Random messages and random protobuf, and what google.protobuf makes of them."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from hypothesis import strategies as st

from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import DTYPES, WireTensor, checked_tensor
from expertd_wire.v1 import experts_pb2 as pb

TENSORS = {"hidden_states", "router_logits", "topk_ids", "topk_weights", "hidden_states_scale"}
TENSORS |= {"output"}
INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=12)


@st.composite
def tensors(draw: st.DrawFn) -> WireTensor:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    size = DTYPES[dtype].itemsize
    for length in shape:
        size *= length
    data = draw(st.binary(min_size=size, max_size=size))
    return WireTensor(dtype, tuple(shape), memoryview(data))


MAYBE = st.none() | tensors()

CALLS = st.builds(
    ForwardCall,
    model=TEXT,
    layer=INT32,
    hidden_states=MAYBE,
    router_logits=MAYBE,
    topk_ids=MAYBE,
    topk_weights=MAYBE,
    hidden_states_format=TEXT,
    hidden_states_scale=MAYBE,
    partial=st.booleans(),
    backend=TEXT,
    reply_dtype=TEXT,
    request_id=TEXT,
    priority=INT32,
)

REPLIES = st.builds(
    ForwardReply,
    output=MAYBE,
    backend=TEXT,
    mode=TEXT,
    entry=TEXT,
    queued_ns=INT64,
    staged_ns=INT64,
    computed_ns=INT64,
    request_id=TEXT,
    status=st.just(b""),
    generation=INT32,
    weights_digest=TEXT,
)


def to_pb(message: ForwardCall | ForwardReply) -> Message:
    """message as google.protobuf's, field by field."""
    kind = pb.ForwardRequest if isinstance(message, ForwardCall) else pb.ForwardReply
    fields = message._asdict()
    status = fields.pop("status", b"")
    made: Message = kind(**{name: _tensor_to_pb(value) for name, value in fields.items()})
    if status:
        made.status.MergeFromString(status)
    return made


def from_pb(made: Message) -> ForwardCall | ForwardReply:
    """google.protobuf's message as ours; raises WireError for an impossible tensor."""
    kind = ForwardCall if isinstance(made, pb.ForwardRequest) else ForwardReply
    return kind(**{name: _from_field(made, name) for name in kind._fields})


def _tensor_to_pb(value: Any) -> Any:
    if not isinstance(value, WireTensor):
        return value
    return pb.Tensor(dtype=value.dtype, shape=value.shape, data=bytes(value.data))


def _from_field(made: Message, name: str) -> Any:
    value = getattr(made, name)
    if name == "status":
        return value.SerializeToString()
    if name not in TENSORS:
        return value
    if not made.HasField(name):
        return None
    return checked_tensor(name, value.dtype, tuple(value.shape), memoryview(value.data))


@st.composite
def varints(draw: st.DrawFn, value: st.SearchStrategy[int]) -> bytes:
    """A varint of 64 bits, sometimes longer than it needs to be."""
    number = draw(value) & (2**64 - 1)
    groups = [number >> shift & 0x7F for shift in range(0, 70, 7)]
    needed = max((at + 1 for at, group in enumerate(groups) if group), default=1)
    length = min(10, needed + draw(st.sampled_from((0, 0, 0, 1, 3))))
    last = length - 1
    return bytes(group | (0x80 if at < last else 0) for at, group in enumerate(groups[:length]))


@st.composite
def _length_delimited(draw: st.DrawFn, payload: st.SearchStrategy[bytes]) -> bytes:
    data = draw(payload)
    return draw(varints(st.just(len(data)))) + data


@st.composite
def protobuf(draw: st.DrawFn, payload: st.SearchStrategy[bytes], max_number: int) -> bytes:
    """Well-formed protobuf with any field in any wire type but groups, in any order, repeated."""
    bodies = {
        0: varints(INT64),
        1: st.binary(min_size=8, max_size=8),
        2: _length_delimited(payload),
        5: st.binary(min_size=4, max_size=4),
    }
    parts = []
    for _ in range(draw(st.integers(0, 8))):
        wire = draw(st.sampled_from(sorted(bodies)))
        number = draw(st.integers(1, max_number) | st.integers(1, 2**29 - 1))
        parts.append(draw(varints(st.just(number << 3 | wire))))
        parts.append(draw(bodies[wire]))
    return b"".join(parts)


_SIZES = st.lists(varints(st.integers(0, 3)), max_size=2).map(b"".join)
_LEAF = st.sampled_from([name.encode() for name in DTYPES]) | _SIZES | st.binary(max_size=8)
TENSOR_BYTES = protobuf(_LEAF, 3)
"""A Tensor that rarely agrees with itself: fields split, repeated, packed and not."""


@st.composite
def split_tensors(draw: st.DrawFn) -> list[bytes]:
    """A valid Tensor as fields to be spread over several occurrences of one submessage."""
    tensor = draw(tensors())
    fields = [b"\x0a" + bytes((len(tensor.dtype),)) + tensor.dtype.encode()]
    fields.append(b"\x1a" + draw(varints(st.just(len(tensor.data)))) + bytes(tensor.data))
    cut = draw(st.integers(0, len(tensor.shape)))
    packed = bytes(tensor.shape[:cut])
    fields.append(b"\x12" + bytes((len(packed),)) + packed)
    fields += [b"\x10" + bytes((size,)) for size in tensor.shape[cut:]]
    return fields
