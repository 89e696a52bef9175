"""One call over either protocol, raw: its output, or its error as the protocol tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
import httpx
from safetensors.torch import load, save
from tests.strategies import torch_tensor, wire_call
from torch import Tensor

from expertd_wire.codec import decode_forward_reply, encode_forward_call
from expertd_wire.errors import REASONS
from expertd_wire.methods import FORWARD, STATUS_KEY
from expertd_wire.status import unpack_status

TENSORS = ("hidden_states", "router_logits", "topk_ids", "topk_weights", "hidden_states_scale")


class Told(NamedTuple):
    """One of the reasons that an error carries."""

    backend: str
    mode: str
    entry: str
    code: str
    text: str


@dataclass
class Answer:
    """output, or code (a gRPC status name), reason, message and reasons."""

    output: Tensor | None = None
    code: str = "OK"
    reason: str = ""
    message: str = ""
    reasons: list[Told] = field(default_factory=list)


def by_grpc(address: str, fields: dict[str, Any], timeout: float = 30) -> Answer:
    """Through a channel without any of our client's code."""
    with grpc.insecure_channel(address) as channel:
        return raw_grpc(channel, encode_forward_call(wire_call(**fields)), timeout)


def raw_grpc(channel: grpc.Channel, data: bytes, timeout: float = 30) -> Answer:
    """The answer to a ForwardRequest's bytes, whatever they are."""
    try:
        reply = decode_forward_reply(channel.unary_unary(FORWARD)(data, timeout=timeout))
        return Answer(torch_tensor(reply.output))
    except grpc.RpcError as error:
        return told_by(error)


def told_by(error: Any) -> Answer:
    """What a failed gRPC call tells; its details and its status must say the same."""
    code = error.code().name
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_KEY:
            status = unpack_status(value)
            assert (status.code, status.message) == (code, error.details())
            reasons = [Told(r.backend, r.mode, r.entry, r.code, r.text) for r in status.refusals]
            return Answer(None, code, status.reason, status.message, reasons)
    return Answer(None, code, message=error.details() or "")


def by_http(address: str, fields: dict[str, Any], timeout: float = 30) -> Answer:
    """Through httpx and the safetensors library."""
    fields = {"model": "m", "layer": 0} | fields
    tensors = {n: fields.pop(n).contiguous() for n in TENSORS if fields.get(n) is not None}
    query = {n: v for n, v in fields.items() if v is not None} | {"timeout": timeout}
    headers = {"X-Request-Id": query.pop("request_id")} if "request_id" in query else {}
    response = httpx.post(
        f"http://{address}/v1/forward",
        params=query,
        content=save(tensors),
        headers=headers,
        timeout=60,
        trust_env=False,
    )
    return told_in(response)


def told_in(response: httpx.Response) -> Answer:
    """What a response tells; an error's status must be the one of its reason."""
    if response.status_code == 200:
        return Answer(load(response.content)["output"])
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert response.status_code == REASONS[error["reason"]].http
    assert set(error) == {"code", "reason", "message", "reasons"}
    reasons = [Told(**reason) for reason in error["reasons"]]
    return Answer(None, error["code"], error["reason"], error["message"], reasons)


Ask = Callable[..., Answer]
PROTOCOLS: dict[str, Ask] = {"grpc": by_grpc, "http": by_http}
