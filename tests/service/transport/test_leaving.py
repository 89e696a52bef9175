"""A caller that left before anybody could be told: its call is taken back at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch
from tests.service.engine.parts import Gate, resident, running
from tests.strategies import generator, layer_spec, wire_call

from expertd.engine.engine import Engine
from expertd.engine.resident import Residents
from expertd.metrics.registry import Metrics
from expertd.transport.calls import Desk
from expertd.transport.ingress import Ingress
from expertd.transport.native import ExpertsService
from expertd_wire.codec import encode_forward_call
from expertd_wire.v1 import experts_pb2 as pb

SPEC = layer_spec()


class Aborted(Exception):
    """What grpc's own abort raises."""


class Gone:
    """The context of a call that has already ended."""

    def set_trailing_metadata(self, pairs: Any) -> None:
        """Nobody reads it."""

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted(code.name)

    def time_remaining(self) -> float:
        return 30.0

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """False: grpc will not call it any more."""
        return False


def forward(engine: Engine) -> Any:
    desk = Desk("grpc", engine, Metrics(Residents(), {}))
    service = ExpertsService(desk, Ingress(1 << 20, 1 << 20), 4, pb.GetCapabilitiesReply)
    return service.handlers()["Forward"].unary_unary


def test_its_call_leaves_the_queue_without_being_run() -> None:
    random, gate = generator(97), Gate()
    layer = resident(SPEC, random, gate)
    rows = torch.randn(2, SPEC.hidden, generator=random)
    logits = torch.randn(2, SPEC.num_experts, generator=random)
    call = wire_call(hidden_states=rows, router_logits=logits)
    with running(layer) as engine:
        engine.submit(call, "test", None)
        assert gate.entered.wait(10)
        ended = threading.Event()

        def ask() -> None:
            with pytest.raises(Aborted, match="CANCELLED"):
                forward(engine)(encode_forward_call(call), Gone())
            ended.set()

        threading.Thread(target=ask).start()
        assert ended.wait(10), "while another call still runs"
        assert layer.queued_tokens == 0
        gate.opened.set()
    assert gate.batches == [2]
