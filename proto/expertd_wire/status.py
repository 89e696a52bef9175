"""An error as google.rpc.Status: its reason as ErrorInfo, its refusals as a PreconditionFailure.

When a caller should come back is told as RetryInfo.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from expertd_wire.errors import DOMAIN, REASONS, Refusal
from expertd_wire.tensors import WireError

# gRPC's peers accept 8 KiB of headers by default; the message travels there a second time.
MAX_STATUS_BYTES = 6 << 10
MAX_MESSAGE_BYTES = 1536
MAX_TEXT_BYTES = 1024
_UNESCAPED = bytes(set(range(0x20, 0x7F)) - {ord("%")})


class UnpackedStatus(NamedTuple):
    """What unpack_status found; reason is empty when the status is not one of expertd's.

    retry_seconds is when the server expects to have room again; None if it did not say.
    """

    code: str
    reason: str
    message: str
    refusals: tuple[Refusal, ...]
    retry_seconds: float | None = None


def pack_status(
    reason: str,
    message: str,
    refusals: Sequence[Refusal] = (),
    retry_seconds: float | None = None,
) -> bytes:
    """The bytes of make_status, for the trailing metadata named methods.STATUS_KEY."""
    data: bytes = make_status(reason, message, refusals, retry_seconds).SerializeToString()
    return data


def make_status(
    reason: str,
    message: str,
    refusals: Sequence[Refusal] = (),
    retry_seconds: float | None = None,
) -> status_pb2.Status:
    """The status of a row of REASONS, at most MAX_STATUS_BYTES long.

    Refusals that do not fit are left out and counted in its message: gRPC's own details must be
    that message, not the one given. Equal refusals are told once.
    """
    refusals = tuple(dict.fromkeys(refusals))
    for kept in _shrinking(len(refusals)):
        status = _status(reason, _message(message, len(refusals) - kept), refusals[:kept])
        if retry_seconds is not None:
            status.details.add().Pack(_retry_info(retry_seconds))
        if status.ByteSize() <= MAX_STATUS_BYTES:
            return status
    raise AssertionError("a status without refusals is longer than its limit")


def unpack_status(data: bytes) -> UnpackedStatus:
    """What a serialised status says; raises WireError."""
    try:
        status = status_pb2.Status.FromString(data)
        refusals = tuple(map(_refusal, _violations(status)))
        code, reason = _code_name(status.code), _reason(status)
        return UnpackedStatus(code, reason, status.message, refusals, _retry_seconds(status))
    except DecodeError:
        raise WireError(f"status: {len(data)} bytes that are no google.rpc.Status") from None


def _shrinking(count: int) -> Iterator[int]:
    """count, then ever fewer, down to 0: about 9 of 10 are kept at each step."""
    while count:
        yield count
        count = count * 9 // 10
    yield 0


def _message(message: str, left_out: int) -> str:
    note = f" ({left_out} more reasons did not fit)" if left_out else ""
    return _cut(message, _room(message) - len(note)) + note


def _room(message: str) -> int:
    """How much of message may travel: gRPC spends three bytes on each that it must escape."""
    escaped = len(message.encode(errors="replace").translate(None, _UNESCAPED))
    return max(MAX_MESSAGE_BYTES // 3, MAX_MESSAGE_BYTES - 2 * escaped)


def _cut(text: str, limit: int) -> str:
    """At most limit bytes of UTF-8; what no UTF-8 can carry is replaced."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode(errors="ignore") + "..."


def _status(reason: str, message: str, refusals: Sequence[Refusal]) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.Code.Value(REASONS[reason].grpc), message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason=reason))
    if refusals:
        violations = [_violation(refusal) for refusal in refusals]
        status.details.add().Pack(error_details_pb2.PreconditionFailure(violations=violations))
    return status


def _violation(refusal: Refusal) -> Message:
    violation: Message = error_details_pb2.PreconditionFailure.Violation(
        type=_cut(refusal.code, MAX_TEXT_BYTES),
        subject=_cut("/".join((refusal.backend, refusal.mode, refusal.entry)), MAX_TEXT_BYTES),
        description=_cut(refusal.text, MAX_TEXT_BYTES),
    )
    return violation


def _details(status: status_pb2.Status, kind: type[Message]) -> Iterator[Message]:
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            yield message


def _violations(status: status_pb2.Status) -> Iterable[Message]:
    for failure in _details(status, error_details_pb2.PreconditionFailure):
        yield from failure.violations


def _refusal(violation: Message) -> Refusal:
    backend, mode, entry = (violation.subject.split("/", 2) + ["", ""])[:3]
    return Refusal(backend, mode, entry, violation.type, violation.description)


def _reason(status: status_pb2.Status) -> str:
    infos = _details(status, error_details_pb2.ErrorInfo)
    return next((info.reason for info in infos if info.domain == DOMAIN), "")


def _retry_info(seconds: float) -> Message:
    info: Message = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(int(seconds * 1e9))
    return info


def _retry_seconds(status: status_pb2.Status) -> float | None:
    infos = _details(status, error_details_pb2.RetryInfo)
    delays = (info.retry_delay for info in infos)
    return next((delay.seconds + delay.nanos / 1e9 for delay in delays), None)


def _code_name(code: int) -> str:
    if code in code_pb2.Code.values():
        name: str = code_pb2.Code.Name(code)
        return name
    return "UNKNOWN"
