"""A call as the messages that its carrier takes best: one, or several one after the other."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertd_client.arrays import kind_of
from expertd_client.calls import ArrayT, Reply, decode_reply, decoded, encoded, reply_of
from expertd_client.errors import ExpertdError
from expertd_client.sharding import messages, most_rows
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import DTYPES, WireTensor, to_numpy

Exchange = Generator[bytes, bytes, Reply[ArrayT]]
"""Yields a request, is sent its reply or thrown its error, and so on; returns the whole answer."""


def exchange(call: ForwardCall, like: ArrayT, message_bytes: int) -> Exchange[ArrayT]:
    """A call's requests, each of at most so many bytes of rows, and what their replies make.

    The plan is the first message's, the times are all messages' together. One answer never comes
    from two sets of weights: if the layer was loaded again meanwhile, or a proxy asked servers that
    differ, all rows travel once more, as one message.
    """
    cuts = _cuts(call, message_bytes)
    if len(cuts) > 1:
        whole = _Whole(cuts[-1].stop)
        for rows in cuts:
            try:
                data = yield encoded(_some(call, rows))
            except ExpertdError as error:
                error.add_note(f"rows are counted from row {rows.start} of the call")
                raise
            whole.add(rows, *decoded(data))
        if len({reply.weights_digest or reply.generation for reply in whole.replies}) == 1:
            output = kind_of("hidden_states", like).adopt(whole.output, like)
            return reply_of(output, whole.reply())
    return decode_reply((yield encoded(call)), like)


class _Whole:
    """The output of a call, filled message by message."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.output: NDArray[Any] = np.empty(0)
        self.replies: list[ForwardReply] = []

    def add(self, rows: slice, output: WireTensor, reply: ForwardReply) -> None:
        """The answer to some rows; raises ExpertdError if it is none."""
        count = rows.stop - rows.start
        if not self.replies:
            shape = (self._tokens, *output.shape[1:])
            self.output = np.empty(shape, DTYPES[output.dtype])
        expected = (self.output.dtype.name, (count, *self.output.shape[1:]))
        if (output.dtype, output.shape) != expected:
            raise ExpertdError(
                f"the server answered {count} rows with {output.dtype} {list(output.shape)}, "
                f"where {expected[0]} {list(expected[1])} was expected"
            )
        self.output[rows] = to_numpy(output)
        self.replies.append(reply._replace(output=None))

    def reply(self) -> ForwardReply:
        """The first message's, with all messages' times."""
        return self.replies[0]._replace(
            queued_ns=sum(reply.queued_ns for reply in self.replies),
            staged_ns=sum(reply.staged_ns for reply in self.replies),
            computed_ns=sum(reply.computed_ns for reply in self.replies),
        )


def _cuts(call: ForwardCall, message_bytes: int) -> list[slice]:
    """All rows at once also where some tensor has other rows than the call: that is to be refused,
    and cut, it could become messages that each look right."""
    rows = call.hidden_states
    if rows is None or rows.nbytes <= message_bytes:
        return [slice(0, 0)]
    if len({tensor.shape[:1] for tensor in _tensors(call).values()}) > 1:
        return [slice(0, 0)]
    return messages(rows.shape[0], most_rows(rows.nbytes, rows.shape[0], message_bytes))


def _some(call: ForwardCall, rows: slice) -> ForwardCall:
    """Those rows of every tensor."""
    cut: dict[str, Any] = {name: _rows_of(tensor, rows) for name, tensor in _tensors(call).items()}
    return call._replace(**cut)


def _tensors(call: ForwardCall) -> dict[str, WireTensor]:
    return {name: value for name, value in call._asdict().items() if type(value) is WireTensor}


def _rows_of(tensor: WireTensor, rows: slice) -> WireTensor:
    size = tensor.nbytes // tensor.shape[0]
    shape = (rows.stop - rows.start, *tensor.shape[1:])
    return WireTensor(tensor.dtype, shape, tensor.data[rows.start * size : rows.stop * size])
