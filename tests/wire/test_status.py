"""Errors as google.rpc.Status: read by Google's own classes, small enough for every peer."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from expertd_wire.errors import REASONS, Refusal
from expertd_wire.status import MAX_STATUS_BYTES, make_status, pack_status, unpack_status
from expertd_wire.tensors import WireError

WORDS = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), max_size=20)
REFUSALS = st.lists(st.builds(Refusal, *[WORDS] * 5), max_size=8).map(tuple)


@given(st.sampled_from(sorted(REASONS)), WORDS, REFUSALS, st.none() | st.floats(0, 86400))
def test_what_is_packed_is_unpacked(
    reason: str, message: str, refusals: tuple[Refusal, ...], retry: float | None
) -> None:
    *found, waits = unpack_status(pack_status(reason, message, refusals + refusals, retry))
    told_once = tuple(dict.fromkeys(refusals))
    assert found == [REASONS[reason].grpc, reason, message, told_once]
    assert waits == (None if retry is None else pytest.approx(retry, abs=1e-8))


def test_googles_classes_read_it() -> None:
    refusal = Refusal("triton", "routed", "moe/fused", "ARCH", "sm90 given, sm100 accepted")
    status = status_pb2.Status.FromString(pack_status("NO_USABLE_PLAN", "no plan", [refusal]))
    assert (status.code, status.message) == (code_pb2.FAILED_PRECONDITION, "no plan")
    info, failure = error_details_pb2.ErrorInfo(), error_details_pb2.PreconditionFailure()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(failure)
    assert (info.domain, info.reason) == ("expertd", "NO_USABLE_PLAN")
    (violation,) = failure.violations
    assert violation.type == "ARCH"
    assert violation.subject == "triton/routed/moe/fused"
    assert violation.description == "sm90 given, sm100 accepted"
    assert unpack_status(status.SerializeToString()).refusals == (refusal,)


def test_every_reason_has_a_code_of_grpc() -> None:
    for row in REASONS.values():
        assert make_status(row.name, "").code == code_pb2.Code.Value(row.grpc) != 0


FULL = [Refusal(f"b{at}", "routed", "e", "C", "é" * 40) for at in range(99)]


@example("", FULL, "é" * 3000)
@example("", FULL, "%" * 3000)
@example("x" * 900, FULL, "é" * 3000)
@given(
    st.text(max_size=5000),
    st.lists(st.builds(Refusal, *[st.text(max_size=50)] * 4, st.text(max_size=3000)), max_size=99),
    st.sampled_from(["", "é" * 3000, "%" * 3000, "x" * 3000, "\ud800"]),
)
def test_a_status_fits_into_the_headers_of_every_peer(
    message: str, refusals: list[Refusal], more: str
) -> None:
    status = make_status("NO_USABLE_PLAN", message + more, refusals)
    assert status.ByteSize() <= MAX_STATUS_BYTES
    # gRPC sends the message a second time, escaped; 8 KiB is its peers' default limit.
    escaped = quote(status.message, safe="".join(map(chr, range(0x20, 0x7F))).replace("%", ""))
    assert status.ByteSize() + len(escaped) <= 8 * 1024 - 256


def test_refusals_left_out_are_counted() -> None:
    refusals = [Refusal(f"b{at}", "routed", "e", "CODE", "x" * 90) for at in range(200)]
    found = unpack_status(pack_status("NO_USABLE_PLAN", "no plan", refusals))
    assert found.refusals == tuple(refusals[: len(found.refusals)])
    assert len(found.refusals) > 20
    assert found.message == f"no plan ({200 - len(found.refusals)} more reasons did not fit)"


def test_a_long_message_ends_in_dots() -> None:
    message = make_status("INTERNAL", "x" * 9999).message
    assert message.endswith("x...")


def test_a_status_of_others_has_no_reason() -> None:
    status = status_pb2.Status(code=14, message="upstream")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain="envoy", reason="RESET"))
    assert unpack_status(status.SerializeToString()) == ("UNAVAILABLE", "", "upstream", (), None)
    assert unpack_status(status_pb2.Status(code=99).SerializeToString()).code == "UNKNOWN"


@pytest.mark.parametrize("data", [b"\xff", b"\x1a\x05abc"])
def test_bytes_that_are_no_status_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="status"):
        unpack_status(data)


@given(st.binary(max_size=80))
def test_random_bytes_raise_nothing_but_wire_error(data: bytes) -> None:
    packed = pack_status("INTERNAL", "x", [Refusal("b", "m", "e", "c", "t")])
    for bad in (data, packed[: len(data)], packed[:40] + data):
        try:
            unpack_status(bad)
        except WireError as refusal:
            assert "status" in str(refusal)
