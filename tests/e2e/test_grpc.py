"""gRPC as others' clients see it: generated stubs, health, reflection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.e2e.servers import Server

from expertd_wire.v1 import experts_pb2 as pb
from expertd_wire.v1.experts_pb2_grpc import ExpertsStub

SERVICE = "expertd_wire.v1.Experts"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


def tensor(array: Any) -> pb.Tensor:
    return pb.Tensor(dtype=array.dtype.name, shape=array.shape, data=array.tobytes())


def array(message: pb.Tensor) -> Any:
    return np.frombuffer(message.data, message.dtype).reshape(tuple(message.shape))


def test_the_generated_stub_gets_the_answer(channel: grpc.Channel) -> None:
    random = np.random.default_rng(1)
    rows = random.standard_normal((3, 256), np.float32)
    logits = random.standard_normal((3, 32), np.float32)
    best = np.argsort(-logits, axis=1)[:, :4]
    weights = np.exp(np.take_along_axis(logits, best, 1))
    weights /= weights.sum(1, keepdims=True)
    stub = ExpertsStub(channel)
    request = pb.ForwardRequest(
        model="demo", hidden_states=tensor(rows), router_logits=tensor(logits), request_id="r7"
    )
    reply = stub.Forward(request, timeout=30)
    assert (reply.backend, reply.mode, reply.entry) == ("grouped", "routed", "grouped")
    assert reply.request_id == "r7" and not reply.HasField("status")
    layer = stub.GetLayer(pb.GetLayerRequest(model="demo"))
    assert (reply.weights_digest, reply.generation) == (layer.weights_digest, layer.generation)
    empty = pb.ForwardRequest(
        model="demo", hidden_states=tensor(rows[:0]), router_logits=tensor(logits[:0])
    )
    assert stub.Forward(empty, timeout=30).weights_digest == reply.weights_digest != ""
    assert min(reply.queued_ns, reply.staged_ns, reply.computed_ns) > 0
    for ids in (best.astype(np.int32), best.astype(np.int64)):
        request = pb.ForwardRequest(
            model="demo",
            hidden_states=tensor(rows),
            topk_ids=tensor(ids),
            topk_weights=tensor(weights),
        )
        routed = stub.Forward(request, timeout=30)
        np.testing.assert_allclose(array(routed.output), array(reply.output), atol=1e-5)


def test_the_generated_stub_gets_the_answers_to_questions(channel: grpc.Channel) -> None:
    stub = ExpertsStub(channel)
    layers = stub.ListLayers(pb.ListLayersRequest(), timeout=10).layers
    assert len(layers) == 5
    assert [x.model for x in stub.ListLayers(pb.ListLayersRequest(model="deep")).layers] == [
        "deep",
        "deep",
    ]
    assert stub.GetLayer(pb.GetLayerRequest(model="demo", layer=1)) in layers
    reply = stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert reply.device == "cpu" and {"grouped", "reference"} <= {c.backend for c in reply.cells}
    for ask in (
        lambda: stub.ListLayers(pb.ListLayersRequest(model="nobody")),
        lambda: stub.GetLayer(pb.GetLayerRequest(model="demo", layer=9)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.NOT_FOUND


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/Backward")(b"", timeout=10)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health(channel: grpc.Channel, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    assert stub.Check(request, timeout=10).status == SERVING
    watch = stub.Watch(request, timeout=10)
    assert next(watch).status == SERVING
    watch.cancel()


def test_the_health_of_an_unknown_service_is_not_found(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="x.Y"), timeout=10)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.NOT_FOUND


def reflect(channel: grpc.Channel, **question: Any) -> Any:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(**question)
    return next(iter(stub.ServerReflectionInfo(iter([request]), timeout=10)))


def test_reflection_lists_the_services_and_their_files(channel: grpc.Channel) -> None:
    listed = reflect(channel, list_services="").list_services_response.service
    names = {service.name for service in listed}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    answer = reflect(channel, file_containing_symbol=SERVICE).file_descriptor_response
    files = [FileDescriptorProto.FromString(f) for f in answer.file_descriptor_proto]
    (ours,) = (file for file in files if file.package == "expertd_wire.v1")
    assert "Forward" in {m.name for s in ours.service if s.name == "Experts" for m in s.method}
