"""HTTP as curl, browsers and the safetensors library see it."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load as load_numpy
from safetensors.numpy import save as save_numpy
from safetensors.torch import load, save
from tests.e2e.servers import in_process
from tests.strategies import generator, relative

from expertd_client import Client


def body(tokens: int = 4) -> dict[str, torch.Tensor]:
    random = generator(11)
    return {
        "hidden_states": torch.randn(tokens, 256, generator=random).bfloat16(),
        "router_logits": torch.randn(tokens, 32, generator=random),
    }


def post(web: httpx.Client, tensors: Any, **query: Any) -> httpx.Response:
    content = tensors if isinstance(tensors, bytes) else save(tensors)
    return web.post("/v1/forward", params={"model": "demo", "layer": 0} | query, content=content)


def test_forward_answers_what_grpc_does(web: httpx.Client, client: Client) -> None:
    tensors = body()
    response = post(web, tensors)
    assert response.status_code == 200
    output = load(response.content)["output"]
    rows, logits = tensors["hidden_states"], tensors["router_logits"]
    assert torch.equal(output, client.forward("demo", 0, rows, router_logits=logits))


def test_the_plan_and_the_times_are_in_the_metadata(web: httpx.Client, tmp_path: Any) -> None:
    content = save(body())
    query: dict[str, Any] = {"model": "demo", "layer": 1, "backend": "reference"}
    response = web.post(
        "/v1/forward", params=query, content=content, headers={"X-Request-Id": "id-3"}
    )
    assert response.headers["x-request-id"] == "id-3"
    refused = web.post("/v1/forward", params=query, headers={"X-Request-Id": "id-4"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "id-4")
    (tmp_path / "reply").write_bytes(response.content)
    with safe_open(tmp_path / "reply", "pt") as reply:
        told = reply.metadata()
    assert (told["backend"], told["mode"], told["entry"]) == ("reference", "routed", "reference")
    assert told["request_id"] == "id-3"
    assert all(int(told[f"{stage}_ns"]) > 0 for stage in ("queued", "staged", "computed"))


def test_numpy_alone_can_use_it(web: httpx.Client) -> None:
    random = np.random.default_rng(12)
    tensors = {
        "hidden_states": random.standard_normal((2, 256)).astype(np.float16),
        "topk_ids": np.array([[1, 5], [31, -1]]),
        "topk_weights": np.array([[0.5, 0.5], [1, 7]], np.float32),
    }
    response = post(web, save_numpy(tensors), reply_dtype="float32")
    output = load_numpy(response.content)["output"]
    assert output.dtype == np.float32 and output.shape == (2, 256) and output.any()


def test_partial_and_formats_travel_in_the_query(web: httpx.Client) -> None:
    tensors = body()
    assert load(post(web, tensors, partial=True).content)["output"].dtype == torch.float32
    rows = tensors["hidden_states"]
    truth = load(post(web, tensors).content)["output"]
    scale = torch.full((4, 2), 0.5)
    fp8 = tensors | {
        "hidden_states": (rows.float() * 2).to(torch.float8_e4m3fn),
        "hidden_states_scale": scale,
    }
    output = load(post(web, fp8, hidden_states_format="fp8_group128").content)["output"]
    assert relative(output, truth.double()) < 0.1


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"layer": "x"}, "layer"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": "nan"}, "timeout"),
        ({"partial": "maybe"}, "partial"),
        ({"priority": 1.5}, "priority"),
        ({"model": None}, "model"),
    ],
)
def test_bad_values_are_400_in_our_shape(
    web: httpx.Client, query: dict[str, Any], words: str
) -> None:
    params = {n: v for n, v in ({"model": "demo", "layer": 0} | query).items() if v is not None}
    response = web.post("/v1/forward", params=params, content=save(body()))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["reason"] == "INVALID_ARGUMENT" and words in error["message"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "safetensors"),
        (b"x" * 100, "safetensors"),
        (save(body())[:-1], "."),
        (save(body() | {"other": torch.zeros(1)}), "'other' given; accepted: hidden_states"),
        (save(body() | {"hidden_states": torch.zeros(4, 256).double()}), "F64"),
    ],
)
def test_bad_bodies_are_400(web: httpx.Client, content: bytes, words: str) -> None:
    response = post(web, content)
    assert response.status_code == 400
    assert re.search(words, response.json()["error"]["message"])


def test_a_body_of_unknown_length_is_read(web: httpx.Client) -> None:
    content = save(body())
    parts = (content[n : n + 100] for n in range(0, len(content), 100))
    response = web.post("/v1/forward", params={"model": "demo", "layer": 0}, content=parts)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/forward", 405), ("DELETE", "/v1/layers", 405)],
)
def test_what_is_no_route_is_told_in_our_shape(
    web: httpx.Client, method: str, path: str, status: int
) -> None:
    response = web.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"code", "reason", "message", "reasons"}


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_balancer_may_ask_for_the_head_alone(web: httpx.Client, path: str) -> None:
    asked = web.head(path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-length"] == web.get(path).headers["content-length"]


def test_a_model_may_be_named_as_its_authors_do() -> None:
    model = "deepseek-ai/DeepSeek-V3"
    with (
        in_process("--identity", f"{model}=8") as (_, addresses),
        httpx.Client(base_url=f"http://{addresses.http}", trust_env=False) as web,
    ):
        for name in (model, "deepseek-ai%2FDeepSeek-V3"):
            assert web.get(f"/v1/layers/{name}/0").json()["model"] == model
            assert web.get(f"/v1/layers/{name}/1").status_code == 404
            assert web.get(f"/v1/layers/{name}/x").status_code == 400
        assert post(web, {"hidden_states": torch.ones(2, 8)}, model=model).status_code == 200


def test_layers(web: httpx.Client) -> None:
    layers = web.get("/v1/layers").json()["layers"]
    found = sorted((x["model"], x["layer"]) for x in layers)
    assert found == [("deep", 0), ("deep", 1), ("demo", 0), ("demo", 1), ("echo", 0)]
    demo = web.get("/v1/layers/demo/1").json()
    assert demo in layers
    assert (demo["state"], demo["hidden"], demo["expert_begin"]) == ("ready", 256, 0)
    assert demo["plans"][0]["backend"] == "grouped"
    only = web.get("/v1/layers", params={"model": "deep"}).json()["layers"]
    assert [x["model"] for x in only] == ["deep", "deep"]
    assert only[0]["routing"]["correction_bias"]["shape"] == [32]
    for path in ("/v1/layers/demo/9", "/v1/layers/nobody/0", "/v1/layers?model=nobody"):
        response = web.get(path)
        assert response.status_code == 404 and response.json()["error"]["code"] == "NOT_FOUND"


def test_capabilities(web: httpx.Client) -> None:
    told = web.get("/v1/capabilities").json()
    assert set(told) == {"device", "flashinfer", "cells", "drift"} and told["device"] == "cpu"
    keys = {"backend", "entry", "mode", "activation_quant", "quant", "state", "why"}
    assert told["cells"] and all(set(cell) == keys for cell in told["cells"])


def test_health_and_readiness(web: httpx.Client) -> None:
    assert web.get("/healthz").status_code == 200
    ready = web.get("/readyz")
    assert ready.status_code == 200 and ready.json() == {"ready": True, "missing": []}


def test_docs_need_nobody_else(web: httpx.Client) -> None:
    page = web.get("/docs")
    assert page.status_code == 200
    links = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page.text)
    assert len(links) >= 4
    for link in links:
        assert not urlsplit(link).netloc, link
        assert web.get(link).status_code == 200, link
    assert not re.search(r"https?://", page.text)
    paths = web.get("/openapi.json").json()["paths"]
    assert {"/v1/forward", "/v1/layers", "/v1/capabilities", "/healthz", "/readyz"} <= set(paths)


def test_what_is_described_is_what_is_answered(web: httpx.Client) -> None:
    told = web.get("/openapi.json").json()["paths"]
    forward = told["/v1/forward"]["post"]
    assert list(forward["requestBody"]["content"]) == ["application/octet-stream"]
    assert post(web, body()).headers["content-type"] in forward["responses"]["200"]["content"]
    assert list(told["/v1/explain"]["post"]["requestBody"]["content"]) == ["application/json"]
    assert list(told["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    refused = web.get("/v1/layers/demo/none")
    for path in told.values():
        for operation in path.values():
            assert set(operation["responses"]) - {"503"} == {"200", "default"}, "no 422"
            error = operation["responses"]["default"]["content"]["application/json"]["schema"]
            fields = error["properties"]["error"]["properties"]
            assert list(fields) == list(refused.json()["error"])
            assert set(fields["reasons"]["items"]["properties"]) == {
                *("backend", "mode", "entry", "code", "text")
            }
