"""--log json: every line parses, failed calls have their ids, nobody's data is in it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch
from safetensors.torch import save
from tests.door.conftest import TOKENS
from tests.door.probing import demo_call
from tests.e2e.servers import MINUTE, serving
from tests.strategies import wire_call

from expertd_client import Client, ExpertdError
from expertd_wire.codec import encode_forward_call
from expertd_wire.methods import FORWARD, FORWARD_STREAM

MARK = 1234567.0
"""A value whose digits and whose bytes would be seen in a log."""
STRANGER = "stranger-token-that-nobody-knows"


def test_the_log_is_json_with_request_ids_and_nobodys_data(home: Path) -> None:
    tokens = home / "log-tokens"
    tokens.write_text("".join(f"{scope} {token}\n" for scope, token in TOKENS.items()))
    with serving(home, "--demo", "--log", "json", "--tokens", str(tokens)) as server:
        misbehave(server.grpc, server.http)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(MINUTE) == 0
        log = server.log.read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert any("loading" in line for line in lines), "a load's progress is JSON too"
    lines = [line for line in lines if "loading" not in line]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    failed = {line["request_id"]: line for line in lines if line.get("request_id")}
    for name, code in EXPECTED.items():
        assert failed[name]["code"] == code
        assert failed[name]["carrier"] == name.partition("-")[0]
    assert not any(token in log for token in (*TOKENS.values(), STRANGER))
    assert (
        "1234567" not in log and repr(MARK_BYTES)[2:-1] not in log and MARK_BYTES.hex() not in log
    )
    assert all(len(line) < 4000 for line in log.splitlines()), "a caller's text is cut short"


MARK_BYTES = torch.tensor([MARK]).numpy().tobytes()
EXPECTED = {
    "grpc-bad": "INVALID_ARGUMENT",
    "grpc-model": "NOT_FOUND",
    "grpc-stream": "NOT_FOUND",
    "http-bad": "INVALID_ARGUMENT",
    "http-model": "NOT_FOUND",
}


def misbehave(at_grpc: str, at_http: str) -> None:
    """Calls that fail, all with values and tokens that must not be repeated."""
    bad = demo_call()
    bad["hidden_states"][:] = MARK
    bad["router_logits"][0] = float("nan")
    metadata = (("authorization", f"Bearer {TOKENS['infer']}"),)
    with grpc.insecure_channel(at_grpc) as channel:
        for name, fields in {
            "grpc-bad": bad,
            "grpc-model": bad | {"model": "nobody"},
            "y" * 100_000: bad | {"model": "nobody"},
        }.items():
            request = encode_forward_call(wire_call(**fields, request_id=name))
            assert failed(lambda r=request: channel.unary_unary(FORWARD)(r, metadata=metadata))
        request = encode_forward_call(
            wire_call(**bad | {"model": "nobody"}, request_id="grpc-stream")
        )
        list(channel.stream_stream(FORWARD_STREAM)(iter([request]), metadata=metadata))
    headers = {"authorization": f"Bearer {TOKENS['infer']}"}
    for name, fields in {"http-bad": bad, "http-model": bad | {"model": "nobody"}}.items():
        post(at_http, fields, headers | {"x-request-id": name})
    post(at_http, bad, {"authorization": f"Bearer {STRANGER}"})
    httpx.get(f"http://{at_http}/x?token={STRANGER}", headers=headers, trust_env=False)
    with Client(at_grpc, token=STRANGER) as client:
        assert failed(client.layers)


def failed(ask: Any) -> bool:
    try:
        ask()
    except (grpc.RpcError, ExpertdError):
        return True
    return False


def post(address: str, fields: dict[str, Any], headers: dict[str, str]) -> None:
    tensors = {n: v for n, v in fields.items() if isinstance(v, torch.Tensor)}
    query = {"model": fields["model"], "layer": "0"}
    url = f"http://{address}/v1/forward"
    answer = httpx.post(
        url, params=query, content=save(tensors), headers=headers, trust_env=False, timeout=20
    )
    assert answer.status_code >= 400
