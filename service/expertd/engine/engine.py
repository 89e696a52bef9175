"""The engine as carriers see it: submit a call, get a future; drain; is it well?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertd.capability.row import Row
from expertd.engine.admission import admit
from expertd.engine.batcher import Batcher
from expertd.engine.choice import choose_backend
from expertd.engine.executor import Executor
from expertd.engine.ledger import Budget
from expertd.engine.observer import Observer
from expertd.engine.policy import Rules
from expertd.engine.resident import Resident, Residents
from expertd.engine.split import split
from expertd.engine.staging_cuda import stagings
from expertd.engine.ticket import Ticket
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import WireTensor

MOMENT_SECONDS = 0.5
"""What an executor gets at least to end in; one that has nothing to do must see so first."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What one call, the queue and a batch may hold; pin is the backend of calls without one."""

    max_call_tokens: int = 65536
    pin: str = ""
    budget: Budget = Budget()
    rules: Rules = Rules()


class Engine:
    """Owns the queue and the device's threads of one process.

    device_lost is for good; on_lost is called before any caller is told.
    """

    def __init__(
        self,
        residents: Residents,
        device: torch.device,
        options: EngineOptions,
        observer: Observer,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.residents = residents
        self._options = options
        ways = stagings(device)
        self._batcher = Batcher(options.budget, options.rules, overlap=len(ways) > 1)
        self._executor = Executor(self._batcher, ways, observer, self._lose)
        self._on_lost = on_lost
        self.device_lost = False
        self._draining = False

    def start(self) -> None:
        self._executor.start()

    def submit(
        self, call: ForwardCall, carrier: str, deadline: float | None, client: str = ""
    ) -> Ticket:
        """Admits and queues a call; its future gets the reply or one of our errors.

        Raises whatever can be told at once: NotFound, Unavailable, InvalidArgument, NoUsablePlan,
        Overloaded. deadline is a time.monotonic(); client is whose share of the queue this takes.
        """
        resident = self.residents.get(call.model, call.layer)
        resident.require_ready()
        form = admit(resident.spec, call, self._options.max_call_tokens, self._pin_for(resident))
        backend = choose_backend(resident, form)
        assert call.hidden_states is not None, "admit() has seen it"
        tokens = call.hidden_states.shape[0]
        ticket = Ticket(call, resident, form, tokens, call.nbytes, deadline, carrier, client)
        if tokens == 0:
            ticket.future.set_result(_empty_reply(ticket, backend.row))
        else:
            split(ticket, self._options.rules.max_batch_tokens, self._batcher.cancel)
            self._batcher.submit(ticket)
        return ticket

    def _pin_for(self, resident: Resident) -> str:
        return self._options.pin if resident.spec.num_experts else ""

    def cancel(self, ticket: Ticket) -> None:
        """Takes a call back whose caller has left."""
        self._batcher.cancel(ticket)

    def _lose(self) -> None:
        self.device_lost = True
        self._on_lost()

    @property
    def healthy(self) -> bool:
        return not self._executor.failed

    @property
    def draining(self) -> bool:
        return self._draining

    def missing(self) -> list[str]:
        """What keeps this process from being ready; empty when it is."""
        if not self.healthy:
            return ["the executor died; restart this process"]
        return (["draining"] if self._draining else []) + self.residents.missing()

    def drain(self, seconds: float) -> bool:
        """Refuses new calls and waits for the accepted ones; True if all were answered in time."""
        self._draining = True
        self._batcher.close("draining")
        return self._executor.join(max(seconds, MOMENT_SECONDS))


def _empty_reply(ticket: Ticket, row: Row) -> ForwardReply:
    output = WireTensor(ticket.form.reply_dtype, (0, ticket.resident.spec.hidden), memoryview(b""))
    waited = time.monotonic_ns() - ticket.arrived_ns
    request_id = ticket.call.request_id
    return ForwardReply(
        output,
        row.backend,
        row.mode,
        row.entry,
        waited,
        request_id=request_id,
        generation=ticket.resident.generation,
        weights_digest=ticket.resident.digest,
    )
