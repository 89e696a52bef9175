"""The two hot messages as plain tuples: what the codec makes of bytes and bytes of."""

from __future__ import annotations

from typing import NamedTuple

from expertd_wire.tensors import WireTensor


class ForwardCall(NamedTuple):
    """A ForwardRequest; tensors are views of the carrier's memory, values are not checked yet."""

    model: str = ""
    layer: int = 0
    hidden_states: WireTensor | None = None
    router_logits: WireTensor | None = None
    topk_ids: WireTensor | None = None
    topk_weights: WireTensor | None = None
    hidden_states_format: str = ""
    hidden_states_scale: WireTensor | None = None
    partial: bool = False
    backend: str = ""
    reply_dtype: str = ""
    request_id: str = ""
    priority: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        tensors = (
            self.hidden_states,
            self.router_logits,
            self.topk_ids,
            self.topk_weights,
            self.hidden_states_scale,
        )
        return sum(len(tensor.data) for tensor in tensors if tensor is not None)


class ForwardReply(NamedTuple):
    """A ForwardReply; status holds a serialised google.rpc.Status, on streams only."""

    output: WireTensor | None = None
    backend: str = ""
    mode: str = ""
    entry: str = ""
    queued_ns: int = 0
    staged_ns: int = 0
    computed_ns: int = 0
    request_id: str = ""
    status: bytes = b""
    generation: int = 0
    weights_digest: str = ""
