"""Two batches under way at once, as on a card: order, growth, answers, faults; without a card."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service.engine.parts import Reports, echo, running
from tests.strategies import generator, torch_tensor, wire_call
from tests.waiting import until

from expertd.engine.staging import Staging
from expertd.errors import Unavailable

WIDTH = 8


class Slow(Staging):
    """A way whose device computes until the test says that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = threading.Semaphore(0)
        self.launched = threading.Semaphore(0)
        self.broken: Exception | None = None

    def bring_out(self, tensors: Any) -> Any:
        self.launched.release()
        return super().bring_out(tensors)

    def wait_computed(self) -> None:
        assert self.computed.acquire(timeout=10)
        if self.broken is not None:
            raise self.broken


def rows(random: torch.Generator, tokens: int) -> Any:
    return wire_call(model="echo", hidden_states=torch.randn(tokens, WIDTH, generator=random))


def launched(way: Slow) -> None:
    assert way.launched.acquire(timeout=10)


def test_a_batch_as_large_as_the_one_that_computes_is_launched_beside_it() -> None:
    random, ways, reports = generator(71), [Slow(), Slow()], Reports()
    with running(echo(WIDTH), ways=ways, reports=reports) as engine:
        calls = [rows(random, tokens) for tokens in (4, 4, 3, 1, 2)]
        tickets = [engine.submit(calls[0], "test", None)]
        launched(ways[0])
        tickets += [engine.submit(calls[1], "test", None)]
        launched(ways[1])
        tickets += [engine.submit(call, "test", None) for call in calls[2:]]
        ways[0].computed.release()
        assert tickets[0].future.result(10)
        launched(ways[0])  # 6 rows beside the 4 that compute
        for way in (ways[1], ways[0]):
            way.computed.release()
        replies = [ticket.future.result(10) for ticket in tickets]
    assert [report.tokens for report in reports.ran_batches] == [4, 4, 6]
    for call, reply in zip(calls, replies, strict=True):
        assert torch.equal(torch_tensor(reply.output), torch_tensor(call.hidden_states))


def test_a_smaller_one_grows_until_the_device_is_free() -> None:
    random, ways, reports = generator(72), [Slow(), Slow()], Reports()
    with running(echo(WIDTH), ways=ways, reports=reports) as engine:
        tickets = [engine.submit(rows(random, 9), "test", None)]
        launched(ways[0])
        tickets += [engine.submit(rows(random, 2), "test", None) for _ in range(3)]
        assert not ways[1].launched.acquire(timeout=0.05)
        ways[0].computed.release()
        launched(ways[1])
        ways[1].computed.release()
        assert all(ticket.future.result(10) for ticket in tickets)
    assert [(report.requests, report.tokens) for report in reports.ran_batches] == [(1, 9), (3, 6)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(0, 2**30))
def test_every_call_gets_its_own_rows(sizes: list[int], seed: int) -> None:
    random, reports = generator(seed), Reports()
    calls = [rows(random, tokens) for tokens in sizes]
    ways = [Staging(), Staging()]
    with running(echo(WIDTH), ways=ways, reports=reports, max_batch_tokens=10) as engine:
        tickets = [engine.submit(call, "test", None) for call in calls]
        replies = [ticket.future.result(10) for ticket in tickets]
    assert sum(report.tokens for report in reports.ran_batches) == sum(sizes)
    for call, reply in zip(calls, replies, strict=True):
        assert torch.equal(torch_tensor(reply.output), torch_tensor(call.hidden_states))


@pytest.mark.parametrize("count", [1, 2])
def test_a_layer_that_is_unloaded_is_not_held_by_its_last_batch(count: int) -> None:
    """Else its weights would stay on the device until there is another call."""
    layer = echo(WIDTH)
    with running(layer, ways=[Staging() for _ in range(count)]) as engine:
        assert engine.submit(rows(generator(75), 3), "test", None).future.result(10)
        kept = [weakref.ref(backend) for backend in layer.backends.values()]
        layer.backends = {}
        until(lambda: [ref() for ref in kept] == [None])


def test_a_drain_waits_for_what_is_under_way() -> None:
    random, ways = generator(73), [Slow(), Slow()]
    with running(echo(WIDTH), ways=ways) as engine:
        ticket = engine.submit(rows(random, 1), "test", None)
        launched(ways[0])
        assert not engine.drain(0.05)
        ways[0].computed.release()
        assert engine.drain(10) and ticket.future.done()


def test_a_device_lost_while_it_computes_answers_nobody_wrongly() -> None:
    random, ways, lost = generator(74), [Slow(), Slow()], threading.Event()
    told: list[bool] = []
    with running(echo(WIDTH), ways=ways, on_lost=lost.set) as engine:
        tickets = [engine.submit(rows(random, 4), "test", None) for _ in range(3)]
        for ticket in tickets:
            ticket.future.add_done_callback(lambda _: told.append(lost.is_set()))
        launched(ways[0])
        ways[0].broken = torch.AcceleratorError("CUDA error: an illegal memory access")
        ways[0].computed.release()
        for ticket in tickets:
            with pytest.raises(Unavailable, match="its device is lost"):
                ticket.future.result(10)
        assert engine.device_lost and not engine.healthy
        assert told == [True] * 3, "out of health before anybody is told"
        with pytest.raises(Unavailable, match="its device is lost"):
            engine.submit(rows(random, 1), "test", None)
        ways[1].computed.release()
        assert engine.drain(10)
