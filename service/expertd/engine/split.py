"""A call too large for one launch: split into pieces that are queued, and joined again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from expertd.engine.staging import copy_bytes
from expertd.engine.ticket import Ticket
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import WireTensor


def split(ticket: Ticket, limit: int, give_up: Callable[[Ticket], None]) -> Ticket:
    """The ticket, with pieces of at most limit rows if it has more; its future joins theirs.

    The first piece that fails fails the call; give_up(ticket) then takes back what still waits.
    """
    if ticket.tokens > limit:
        ticket.pieces = tuple(_pieces(ticket, limit))
        # What waits and may be cancelled is the pieces; the whole only ever gets an answer.
        ticket.future.set_running_or_notify_cancel()
        joint = _Joint(ticket, give_up)
        for piece in ticket.pieces:
            piece.future.add_done_callback(joint.callback(piece))
    return ticket


def _pieces(ticket: Ticket, limit: int) -> Iterator[Ticket]:
    for begin in range(0, ticket.tokens, limit):
        end = min(begin + limit, ticket.tokens)
        call = _rows_of(ticket, begin, end)
        yield replace(
            ticket,
            call=call,
            tokens=end - begin,
            nbytes=call.nbytes,
            future=Future(),
            first_row=begin,
        )


def _rows_of(ticket: Ticket, begin: int, end: int) -> ForwardCall:
    """The call's rows from begin to end; what a layer without experts ignores is left out."""

    def rows(tensor: WireTensor | None, routing: bool = False) -> WireTensor | None:
        if tensor is None or (routing and not ticket.resident.spec.num_experts):
            return None
        row = tensor.nbytes // tensor.shape[0]
        shape = (end - begin, *tensor.shape[1:])
        return WireTensor(tensor.dtype, shape, tensor.data[begin * row : end * row])

    call = ticket.call
    return call._replace(
        hidden_states=rows(call.hidden_states),
        hidden_states_scale=rows(call.hidden_states_scale),
        router_logits=rows(call.router_logits, routing=True),
        topk_ids=rows(call.topk_ids, routing=True),
        topk_weights=rows(call.topk_weights, routing=True),
    )


class _Joint:
    """Copies each piece's answer to its place, as it comes; the last one answers the call."""

    def __init__(self, whole: Ticket, give_up: Callable[[Ticket], None]) -> None:
        self._whole = whole
        self._count = len(whole.pieces)
        self._give_up = give_up
        self._lock = threading.Lock()
        self._failed = False
        self._replies: list[ForwardReply] = []
        self._output = memoryview(b"")

    def callback(self, piece: Ticket) -> Callable[[Future[ForwardReply]], None]:
        """For the piece's future, which keeps it: what it knows must not lead back to the piece."""
        tokens, first_row = piece.tokens, piece.first_row
        return lambda future: self._done(tokens, first_row, future)

    def _done(self, tokens: int, first_row: int, future: Future[ForwardReply]) -> None:
        error = future.exception()
        if error is None:
            self._place(tokens, first_row, future.result())
        elif self._fails_first():
            self._whole.future.set_exception(error)
            self._give_up(self._whole)
            self._whole.pieces = ()

    def _fails_first(self) -> bool:
        with self._lock:
            first, self._failed = not self._failed, True
        return first

    def _place(self, tokens: int, first_row: int, reply: ForwardReply) -> None:
        assert reply.output is not None
        row_bytes = reply.output.nbytes // tokens
        if not self._replies:
            self._output = np.empty(row_bytes * self._whole.tokens, np.uint8).data
        begin = row_bytes * first_row
        copy_bytes(self._output[begin : begin + reply.output.nbytes], reply.output.data)
        self._replies.append(reply._replace(output=reply.output._replace(data=memoryview(b""))))
        if len(self._replies) == self._count:
            self._whole.pieces = ()
            self._whole.future.set_result(self._reply(reply.output))

    def _reply(self, last: WireTensor) -> ForwardReply:
        """The plan and the wait of the first piece, the times of all together."""
        shape = (self._whole.tokens, *last.shape[1:])
        return self._replies[0]._replace(
            output=WireTensor(last.dtype, shape, self._output),
            staged_ns=sum(reply.staged_ns for reply in self._replies),
            computed_ns=sum(reply.computed_ns for reply in self._replies),
        )
