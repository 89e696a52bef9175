"""Many replicas as one: Client's forward, over servers that hold all experts or a range each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypedDict, Unpack, overload

import grpc

from expertd_client.calls import ArrayT
from expertd_client.client import Client
from expertd_client.errors import InvalidArgument
from expertd_wire.methods import DEFAULT_MAX_MESSAGE_BYTES
from expertd_wire.v1 import experts_pb2 as pb

Shard = Literal["auto", "tokens", "experts"]
Partial = Literal["refuse", "allow"]
Targets = str | Path | Sequence[str]


class PoolOptions(TypedDict, total=False):
    """What a pool's forward and call take by keyword, besides partial and timeout."""

    router_logits: Any | None
    topk_ids: Any | None
    topk_weights: Any | None
    hidden_states_format: str | None
    hidden_states_scale: Any | None
    backend: str | None
    reply_dtype: str | None
    priority: int
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Share:
    """What one replica answered of a call."""

    target: str
    rows: int
    backend: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PoolReply(Generic[ArrayT]):
    """output [T, H]; complete_rows [T] bool says which rows have all their experts."""

    output: ArrayT
    complete_rows: ArrayT
    shares: tuple[Share, ...]
    attempts: int

    @property
    def rows_sent(self) -> int:
        """Rows that travelled for this answer; a row goes to every replica that it needs."""
        return sum(share.rows for share in self.shares)


class ExpertPool:
    """The routed experts of many servers, from any thread; close() it, or use `with`.

    targets: a list of "HOST:PORT", one such, "dns:///NAME:PORT" (every address of the name), or a
    file (a Path, "file:PATH") or http(s) URL with one "HOST:PORT" a line; the last three are read
    again while the pool is open. shard: "tokens" splits rows over replicas that hold all experts,
    "experts" sends each row to the holders of its experts and adds their partial sums, "auto" does
    the first where it can.

    wait_for_experts holds a call for experts that nobody holds until its deadline, then raises
    ExpertsUnavailable; without it that is raised at once. hedge sends a late part of a call to a
    second replica as well. token, credentials and max_message_bytes are as in Client.

    Works today: one replica that holds everything.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        shard: Shard = "auto",
        wait_for_experts: bool = True,
        hedge: bool = False,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        target = str(targets) if isinstance(targets, (str, Path)) else targets[0]
        self._client = Client(
            target, token=token, credentials=credentials, max_message_bytes=max_message_bytes
        )

    @overload
    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Literal["refuse"] = "refuse",
        **options: Unpack[PoolOptions],
    ) -> ArrayT: ...

    @overload
    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Literal["allow"],
        **options: Unpack[PoolOptions],
    ) -> tuple[ArrayT, ArrayT]: ...

    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Partial = "refuse",
        **options: Unpack[PoolOptions],
    ) -> ArrayT | tuple[ArrayT, ArrayT]:
        """The experts' output [T, H] for hidden_states [T, H]; options as in Client.call.

        partial="allow" returns (output, complete_rows): what could be had, and a bool array [T] of
        the rows that have all their experts. Raises ExpertdError's family.
        """
        reply = self.call(model, layer, hidden_states, timeout=timeout, partial=partial, **options)
        return reply.output if partial == "refuse" else (reply.output, reply.complete_rows)

    def call(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Partial = "refuse",
        **options: Unpack[PoolOptions],
    ) -> PoolReply[ArrayT]:
        """Like forward, with who answered what."""
        if partial not in ("refuse", "allow"):
            raise InvalidArgument(f'partial={partial!r}; accepted: "refuse", "allow"')
        reply = self._client.call(model, layer, hidden_states, timeout=timeout, **options)
        rows = len(reply.output)  # type: ignore[arg-type]
        complete = (reply.output == reply.output)[:, 0] | True  # type: ignore[index]
        share = Share("", rows, reply.backend, reply.computed_ns / 1e9)
        return PoolReply(reply.output, complete, (share,), 1)

    def layers(
        self, model: str | None = None, *, timeout: float | None = 30.0
    ) -> list[pb.LayerInfo]:
        """What every replica holds of model, or of all models: one entry per replica and layer."""
        return self._client.layers(model, timeout=timeout)

    def layer(self, model: str, layer: int, *, timeout: float | None = 30.0) -> pb.LayerInfo:
        """One layer as some ready replica tells it; its expert range is that replica's."""
        return self._client.layer(model, layer, timeout=timeout)

    def close(self) -> None:
        """Close all connections; calls under way end with Unavailable."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
