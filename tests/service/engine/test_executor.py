"""An executor that dies takes the process out of service; nobody waits for it."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tests.service.engine.parts import Gate, Reports, resident, running
from tests.strategies import generator, layer_spec, wire_call

from expertd.backends.base import Batch
from expertd.engine.observer import BatchReport
from expertd.errors import Unavailable

SPEC = layer_spec()


class Sudden(BaseException):
    """What no handler expects."""


def die(batch: Batch) -> None:
    raise Sudden


def call(random: torch.Generator, tokens: int = 2, **fields: object) -> object:
    rows = torch.randn(tokens, SPEC.hidden, generator=random)
    logits = torch.randn(tokens, SPEC.num_experts, generator=random)
    return wire_call(hidden_states=rows, router_logits=logits, **fields)


@pytest.mark.parametrize("kind", [Sudden, SystemExit, KeyboardInterrupt, MemoryError])
def test_death_answers_running_and_waiting_calls(kind: type[BaseException]) -> None:
    random = generator(31)

    def die_of(batch: Batch) -> None:
        raise kind

    layer = resident(SPEC, random, Gate(then=die_of))
    gate = layer.backends[next(iter(layer.backends))].script  # type: ignore[attr-defined]
    with running(layer, max_batch_tokens=2) as engine:
        tickets = [engine.submit(call(random), "test", None) for _ in range(4)]
        assert gate.entered.wait(10) and engine.healthy
        gate.opened.set()
        if kind is MemoryError:  # an ordinary exception: one batch fails, the executor goes on
            assert all(t.future.exception(10) for t in tickets) and engine.healthy
            return
        for ticket in tickets:
            with pytest.raises(Unavailable, match="its executor died"):
                ticket.future.result(10)
        assert not engine.healthy
        assert engine.missing() == ["the executor died; restart this process"]
        with pytest.raises(Unavailable, match="broken"):
            engine.submit(call(random), "test", None)
        assert engine.drain(10)


def test_an_observer_that_raises_is_a_death_too() -> None:
    class Broken(Reports):
        def ran(self, report: BatchReport) -> None:
            raise ValueError

    random = generator(32)
    with running(resident(SPEC, random), reports=Broken()) as engine:
        ticket = engine.submit(call(random), "test", None)
        with pytest.raises(Unavailable):
            ticket.future.result(10)
        assert not engine.healthy


def test_a_caller_who_leaves_a_running_call_does_not_kill_the_executor() -> None:
    random, gate = generator(33), Gate()
    with running(resident(SPEC, random, gate)) as engine:
        ticket = engine.submit(call(random), "test", None)
        assert gate.entered.wait(10)

        async def leave() -> None:
            asyncio.wrap_future(ticket.future).cancel()

        asyncio.run(leave())
        engine.cancel(ticket)
        gate.opened.set()
        later = engine.submit(call(random), "test", None)
        assert later.future.result(10) and engine.healthy


def test_a_caller_who_leaves_the_queue_through_asyncio_is_not_run() -> None:
    random, gate, reports = generator(34), Gate(), Reports()
    with running(resident(SPEC, random, gate), reports=reports) as engine:
        first = engine.submit(call(random), "test", None)
        assert gate.entered.wait(10)
        gone = engine.submit(call(random, 3), "test", None)

        async def leave() -> None:
            asyncio.wrap_future(gone.future).cancel()

        asyncio.run(leave())
        engine.cancel(gone)
        gate.opened.set()
        assert first.future.result(10)
        later = engine.submit(call(random, 5), "test", None)
        assert later.future.result(10) and engine.healthy
    assert gate.batches == [2, 5]
