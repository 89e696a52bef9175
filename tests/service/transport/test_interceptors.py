"""Errors as status: the same facts over both protocols, for every class of the tree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from expertd import errors
from expertd.errors import ExpertdError, Internal, NoUsablePlan, Overloaded
from expertd.transport.interceptors import INTERNAL, guarded, http_error
from expertd_wire.errors import REASONS, Refusal
from expertd_wire.methods import STATUS_KEY
from expertd_wire.status import unpack_status


def tree(root: type[ExpertdError] = ExpertdError) -> Iterator[type[ExpertdError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


CLASSES = [kind for kind in tree() if kind.__module__ == errors.__name__]


class Aborted(Exception):
    """What grpc's own abort raises."""


class Context:
    """The part of grpc's context that a guarded method uses."""

    def __init__(self) -> None:
        self.metadata: dict[str, bytes] = {}
        self.code: Any = None
        self.details = ""

    def set_trailing_metadata(self, pairs: Any) -> None:
        self.metadata = dict(pairs)

    def abort(self, code: Any, details: str) -> None:
        self.code, self.details = code, details
        raise Aborted


def aborted(error: BaseException) -> Context:
    """The context after a method that raises error."""
    context = Context()

    def method(request: bytes, _: Any) -> bytes:
        raise error

    with pytest.raises(Aborted):
        guarded(method)(b"", context)
    return context


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_travels_as_its_row_says(kind: type[ExpertdError]) -> None:
    refusals = (Refusal("b", "routed", "e", "arch", "no build"),)
    error = kind("what was given; what is accepted", refusals)
    row = REASONS[kind.reason]
    context = aborted(error)
    status = unpack_status(context.metadata[STATUS_KEY])
    assert context.code.name == status.code == row.grpc
    assert context.details == status.message == str(error)
    assert status.reason == kind.reason and status.refusals == refusals
    response = http_error(error)
    assert response.status_code == row.http
    told = json.loads(bytes(response.body))["error"]
    assert (told["code"], told["reason"], told["message"]) == (row.grpc, row.name, str(error))
    (reason,) = told["reasons"]
    assert reason == {
        "backend": "b",
        "mode": "routed",
        "entry": "e",
        "code": "arch",
        "text": "no build",
    }


def test_when_to_come_back_is_told_in_both_protocols() -> None:
    error = Overloaded("full", retry_seconds=1.25)
    assert unpack_status(aborted(error).metadata[STATUS_KEY]).retry_seconds == 1.25
    assert http_error(error).headers["retry-after"] == "2"
    plain = Overloaded("full")
    assert unpack_status(aborted(plain).metadata[STATUS_KEY]).retry_seconds is None
    assert "retry-after" not in http_error(plain).headers


def test_every_row_has_its_class() -> None:
    assert {kind.reason for kind in CLASSES} == set(REASONS)


@pytest.mark.parametrize("error", [RuntimeError("/secret"), ValueError("/secret"), KeyError("x")])
def test_what_we_did_not_foresee_is_internal_and_tells_nothing(error: Exception) -> None:
    context = aborted(error)
    status = unpack_status(context.metadata[STATUS_KEY])
    assert (status.code, status.reason) == ("INTERNAL", Internal.reason)
    assert context.details == INTERNAL and "secret" not in context.details


def test_more_reasons_than_fit_are_counted() -> None:
    refusals = tuple(Refusal("b", "m", "e", "c", f"{n} " + "x" * 500) for n in range(100))
    context = aborted(NoUsablePlan("none", refusals))
    status = unpack_status(context.metadata[STATUS_KEY])
    left_out = 100 - len(status.refusals)
    assert context.details == f"none ({left_out} more reasons did not fit)" and left_out > 0


def test_a_result_is_handed_on() -> None:
    assert guarded(lambda request, context: request + b"!")(b"a", Context()) == b"a!"
